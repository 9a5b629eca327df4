"""What acts in the layer that is being computed: noted by its attention, read by its other modules.

Of a layer's modules only the attention is given the keywords of the decoder's forward, and it computes first.
So what the layer's parts add at other modules is noted here, in a place that each thread has for itself:
other threads have their own, and a layer that is computed again in the backward pass notes it again.
torch.compile traces a ``threading.local`` (fullgraph=True), but not the setting of a context variable.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LAYER = threading.local()


def note(acting: Any) -> None:
    """Note what acts in the layer that this thread begins to compute; None: nothing."""
    _LAYER.acting = acting


def noted() -> Any:
    """What acts in the layer that this thread computes; None: nothing."""
    return getattr(_LAYER, "acting", None)


@contextmanager
def nothing_acting() -> Iterator[None]:
    """Within it the layer's modules compute as they are."""
    before = noted()
    note(None)
    try:
        yield
    finally:
        note(before)

"""Tells a layer's modules which parts of an adapter act in it. Its attention notes them, other modules read
them.

Among a layer's modules only the attention receives the keywords of the decoder's forward, and it runs first.
So it notes here what the parts add at the layer's other modules. Each thread has a note of its own. A layer
that is recomputed in the backward pass notes again. torch.compile can trace a ``threading.local``
(fullgraph=True), but not the setting of a context variable.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LAYER = threading.local()


def note(acting: Any) -> None:
    """Note what acts in the layer that this thread is about to compute. None: nothing acts."""
    _LAYER.acting = acting


def noted() -> Any:
    """What acts in the layer that this thread is computing. None: nothing acts."""
    return getattr(_LAYER, "acting", None)


@contextmanager
def nothing_acting() -> Iterator[None]:
    """A context in which nothing acts: the layer's modules compute as without an adapter."""
    before = noted()
    note(None)
    try:
        yield
    finally:
        note(before)

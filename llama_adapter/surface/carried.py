"""Parts of the decoder that carry the active adapter: `model.model` and `get_decoder()` return such parts.

Some trainers (TRL's) compute the loss from the decoder's backbone and its head. The backbone alone has no
adapter: the loss would be the bare base's, and nothing would be trained.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def carry(owner: nn.Module, part: nn.Module) -> nn.Module:
    """The module ``part``, with a forward that reads the prompts of the owner's active adapter.

    Parameters, buffers, submodules and hooks are shared with ``part``: a change to one is a change to both.

    Args:
        owner: a `LlamaAdapter`.
        part: its decoder, or a module inside it that contains the decoder's attention layers.
    """
    kind = _carrying(type(part))  # type: ignore[arg-type]
    carried: nn.Module = kind.__new__(kind)
    object.__setattr__(carried, "__dict__", part.__dict__)
    object.__setattr__(carried, "_owner", owner)  # not as a submodule: that would be a cycle
    object.__setattr__(carried, "_part", part)
    return carried


@functools.cache
def _carrying(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a module's own class, so that isinstance still holds."""
    body = {
        "__slots__": ("_owner", "_part"),
        "forward": property(_forward),
        "__getattr__": _attribute,
        "__reduce_ex__": _reduce,
    }
    return type(f"Adapted{kind.__name__}", (kind,), body)


def _forward(carried: Any) -> Callable[..., Any]:
    # A property: an instance may have a forward of its own that hides the class's (accelerate's hooks).
    owner, part = carried._owner, carried._part

    @functools.wraps(part.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        names = inspect.signature(part.forward).parameters
        return owner.forward(**dict(zip(names, args, strict=False)), **kwargs, part=part)

    return forward


def _attribute(carried: Any, name: str) -> Any:
    value = getattr(carried._part, name)
    # Multimodal models have their text decoder inside the backbone.
    return carry(carried._owner, value) if isinstance(value, PreTrainedModel) else value


def _reduce(carried: Any, protocol: int) -> tuple[Any, ...]:
    return carry, (carried._owner, carried._part)

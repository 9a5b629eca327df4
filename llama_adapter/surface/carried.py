"""Parts of the decoder that carry the active adapter: what `model.model` and `get_decoder()` hand out.

Some trainers (TRL's) compute the loss from the decoder's backbone and its head. Called by itself, the
backbone knows of no adapter: the loss would be the bare base's, and nothing would be trained.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def carry(owner: nn.Module, part: nn.Module) -> nn.Module:
    """The same module, whose forward reads the prompts of the owner's active adapter.

    Parameters, buffers, submodules and hooks are those of ``part`` itself, so that whatever is done to the
    one is done to the other.

    Args:
        owner: a `LlamaAdapter`.
        part: its decoder, or a module in it that has the decoder's attention layers.
    """
    kind = _carrying(type(part))  # type: ignore[arg-type]
    carried: nn.Module = kind.__new__(kind)
    object.__setattr__(carried, "__dict__", part.__dict__)
    object.__setattr__(carried, "_owner", owner)  # not as a submodule, which would be a circle
    object.__setattr__(carried, "_part", part)
    return carried


@functools.cache
def _carrying(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a module's own class, so that it stays an instance of that."""
    body = {
        "__slots__": ("_owner", "_part"),
        "forward": property(_forward),
        "__getattr__": _attribute,
        "__reduce_ex__": _reduce,
    }
    return type(f"Adapted{kind.__name__}", (kind,), body)


def _forward(carried: Any) -> Callable[..., Any]:
    # A property, since an instance may have a forward of its own that hides the class's (accelerate's hooks).
    owner, part = carried._owner, carried._part

    @functools.wraps(part.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        names = inspect.signature(part.forward).parameters
        return owner.forward(**dict(zip(names, args, strict=False)), **kwargs, part=part)

    return forward


def _attribute(carried: Any, name: str) -> Any:
    value = getattr(carried._part, name)
    # Composite models have their text decoder inside the backbone.
    return carry(carried._owner, value) if isinstance(value, PreTrainedModel) else value


def _reduce(carried: Any, protocol: int) -> tuple[Any, ...]:
    return carry, (carried._owner, carried._part)

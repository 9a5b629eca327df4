"""Choosing sizes so that different methods have about equally many parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.part import Part
from llama_adapter.methods.shape import Layout
from llama_adapter.methods.table import parts_of_method


def choose_sizes(method: str, parameters: int, decoder: PreTrainedModel, layout: Layout) -> dict[str, Any]:
    """The size of each part of a method, by option, such that the whole is closest to ``parameters``.

    Parts that have no size, such as IA3, are left as they are. The other parts share the rest equally.

    Args:
        decoder: prepared for adapters.
        layout: the decoder's layout, with the names of its projections.
    """
    count = partial(count_parameters, decoder=decoder, layout=layout)
    parts = parts_of_method(method)
    fixed = sum(count(part) for part in parts if part.size is None)
    sized = [part for part in parts if part.size is not None]
    sizes: dict[str, Any] = {}
    for part in sized:
        sizes |= part.sized(_closest(partial(_count_at, part, count), (parameters - fixed) / len(sized)))
    return sizes


def _closest(count: Callable[[int], float], wanted: float) -> int:
    """The size, 1 or more, at which a rising count is closest to ``wanted``."""
    low, high = 1, 2
    while count(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:  # the count passes what is wanted between them
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    return min((low, high), key=lambda size: abs(count(size) - wanted))


def _count_at(part: type[Part], count: Callable[..., int], size: int) -> float:
    """How many parameters a part has at a size; infinity where the decoder is too small for it."""
    try:
        return count(part, **part.sized(size))
    except UsageError:
        return math.inf


def count_parameters(part: type[Part], *, decoder: PreTrainedModel, layout: Layout, **options: Any) -> int:
    """How many parameters a part has for a decoder. Allocates nothing."""
    config = part.complete(part.Config(**options), decoder)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in part(config, layout).parameters())

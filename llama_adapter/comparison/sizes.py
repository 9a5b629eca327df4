"""Choosing sizes so that different methods have about equally many parameters."""

from __future__ import annotations

from typing import Any

import torch

from llama_adapter.methods.part import Part
from llama_adapter.methods.shape import Layout
from llama_adapter.methods.table import parts_of_method


def choose_sizes(method: str, parameters: int, layout: Layout) -> dict[str, int]:
    """The size of each part of a method, by option, such that the whole is closest to ``parameters``.

    Parts that have no size, such as IA3, are left as they are. The other parts share the rest equally.

    Args:
        layout: the decoder's layout, with the names of its projections.
    """
    parts = parts_of_method(method)
    fixed = sum(count_parameters(part, layout) for part in parts if part.size is None)
    sized = [part for part in parts if part.size is not None]
    sizes: dict[str, int] = {}
    for part in sized:
        share = max(0, parameters - fixed) / len(sized)
        one, two = (count_parameters(part, layout, **part.sized(size)) for size in (1, 2))
        sizes |= part.sized(max(1, round(1 + (share - one) / (two - one))))  # grows linearly with the size
    return sizes


def count_parameters(part: type[Part], layout: Layout, **options: Any) -> int:
    """How many parameters a part has for a decoder. Allocates nothing."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in part(part.Config(**options), layout).parameters())

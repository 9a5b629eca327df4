"""Methods of about the same number of parameters."""

from __future__ import annotations

from typing import Any

import torch

from llama_adapter.methods.part import Part
from llama_adapter.methods.shape import Layout
from llama_adapter.methods.table import parts_of_method


def choose_sizes(method: str, parameters: int, layout: Layout) -> dict[str, int]:
    """The size of each part of a method, by option, with which the whole is closest to ``parameters``.

    Parts without a size, such as IA3, stay as they are. What these leave is shared alike among the others.

    Args:
        layout: of the decoder, with the names of its projections.
    """
    parts = parts_of_method(method)
    fixed = sum(count_parameters(part, layout) for part in parts if part.size is None)
    sized = [part for part in parts if part.size is not None]
    sizes: dict[str, int] = {}
    for part in sized:
        share = max(0, parameters - fixed) / len(sized)
        one, two = (count_parameters(part, layout, **part.sized(size)) for size in (1, 2))
        sizes |= part.sized(max(1, round(1 + (share - one) / (two - one))))  # it grows by as many each
    return sizes


def count_parameters(part: type[Part], layout: Layout, **options: Any) -> int:
    """How many parameters a part has for a decoder; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in part(part.Config(**options), layout).parameters())

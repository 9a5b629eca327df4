"""Bottleneck adapters: sequential (Houlsby et al., arXiv 1902.00751) and parallel (He et al., 2110.04366).

They act after attention and after the MLP. With h the output of the sub-layer and x its input:

    h + U act(D h + b) + c        sequential
    h + U act(D x + b) + c        parallel

U and c start at zero, so that an untrained adapter leaves the decoder unchanged.

Shapes: L adapted layers, R sets of a part's tensors (1 or B), D hidden size, W width of the bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.part import PartConfig
from llama_adapter.methods.shape import Layout
from llama_adapter.methods.sites import SitePart, register_parameters
from llama_adapter.methods.terms import ATTENTION, MLP, Term

PLACEMENTS = ("sequential", "parallel")


@dataclass(frozen=True)
class BottleneckConfig(PartConfig):
    """The settings of bottleneck adapters."""

    bottleneck_width: int = 16
    placement: str = "sequential"  # reads the sub-layer's output; "parallel" reads its input

    def __post_init__(self) -> None:
        if self.bottleneck_width < 1:
            raise UsageError(f"bottleneck width: {self.bottleneck_width} given; choose 1 or more")
        if self.placement not in PLACEMENTS:
            raise UsageError(f"placement: {self.placement!r} given; choose {' or '.join(PLACEMENTS)}")


class Bottleneck(SitePart):
    """Two small matrices with biases after each sub-layer.

    Attributes:
        SITE.down: D, (L, W, D), and SITE.down_bias: b, (L, W), drawn like those of torch's linear layers.
        SITE.up: U, (L, D, W), and SITE.up_bias: c, (L, D), zero at the start. In a parallel adapter all four
            names start with ``parallel_``, since rows of one batch may have either kind.
    """

    kind = "bottleneck"
    Config = BottleneckConfig
    size = "bottleneck_width"

    def __init__(
        self, config: BottleneckConfig, layout: Layout, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, layout, generator)
        layers, hidden, width = layout.adapted_layers, layout.shape.hidden_size, config.bottleneck_width
        prefix = "parallel_" if config.placement == "parallel" else ""
        bound = 1 / math.sqrt(hidden)
        for site in (ATTENTION, MLP):
            own = {
                "down": torch.empty(layers, width, hidden).uniform_(-bound, bound, generator=generator),
                "down_bias": torch.empty(layers, width).uniform_(-bound, bound, generator=generator),
                "up": torch.zeros(layers, hidden, width),
                "up_bias": torch.zeros(layers, hidden),
            }
            register_parameters(self, {f"{site}.{prefix}{name}": value for name, value in own.items()})

    @staticmethod
    def act(own: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        added = y
        for prefix, read in (("", y), ("parallel_", x)):
            if f"{prefix}down" in own:
                down, up = own[f"{prefix}down"], own[f"{prefix}up"]
                hidden = F.gelu(read @ down.mT + own[f"{prefix}down_bias"][:, None])
                added = added + hidden @ up.mT + own[f"{prefix}up_bias"][:, None]
        return added

    @staticmethod
    def terms(own: Mapping[str, Tensor]) -> Sequence[Term] | None:
        return [
            Term(
                bias=own[f"{prefix}up_bias"],
                down=own[f"{prefix}down"],
                down_bias=own[f"{prefix}down_bias"],
                up=own[f"{prefix}up"],
                reads_output=not prefix,
                gelu=True,
            )
            for prefix in ("", "parallel_")
            if f"{prefix}down" in own
        ]

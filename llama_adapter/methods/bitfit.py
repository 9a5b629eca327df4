"""BitFit: trains only biases (arXiv 2106.10199).

    y + b        for each linear projection y = W x

Decoders of the LLaMA family have no biases. Where a decoder has some, another bias is added to each.

Shapes: L adapted layers, R sets of a part's tensors (1 or B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_adapter.methods.part import PartConfig
from llama_adapter.methods.shape import Layout
from llama_adapter.methods.sites import SitePart, register_parameters
from llama_adapter.methods.terms import Term


@dataclass(frozen=True)
class BitFitConfig(PartConfig):
    """BitFit has no settings."""


class BitFit(SitePart):
    """A bias for each output of each projection.

    Attributes:
        NAME.bias: b, (L, out), zero at the start.
    """

    kind = "bitfit"
    foldable = True
    Config = BitFitConfig
    learning_rate = 3e-3

    def __init__(
        self, config: BitFitConfig, layout: Layout, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, layout, generator)
        for name, (_, outside) in layout.projections.items():
            register_parameters(self, {f"{name}.bias": torch.zeros(layout.adapted_layers, outside)})

    @staticmethod
    def act(own: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return y + own["bias"][:, None]

    @staticmethod
    def terms(own: Mapping[str, Tensor]) -> Sequence[Term] | None:
        return [Term(bias=own["bias"])]

    @staticmethod
    def fold(own: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, own["bias"][0] if bias is None else bias + own["bias"][0]

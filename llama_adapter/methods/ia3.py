"""IA3: infused adapter by inhibiting and amplifying inner activations (arXiv 2205.05638, section 3.3).

Keys, values and the MLP's hidden layer are rescaled, element by element:

    y * l        for y = W_k x, W_v x and the up projection

The part stores s = l - 1, which is zero at the start, and computes y + s * y. The paper rescales the input of
the MLP's last projection. In a gated MLP, down(act(gate(x)) * up(x)), rescaling up's output does the same.

Shapes: L adapted layers, R sets of a part's tensors (1 or B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_adapter.methods.part import PartConfig
from llama_adapter.methods.shape import Layout
from llama_adapter.methods.sites import SitePart, choose_projections, register_parameters
from llama_adapter.methods.terms import Term

TARGETS = ("k_proj", "v_proj", "up_proj")


@dataclass(frozen=True)
class Ia3Config(PartConfig):
    """IA3 has no settings."""


class Ia3(SitePart):
    """A factor for each output of the key, value and up projections.

    Attributes:
        NAME.scale: l - 1, (L, out), zero at the start.
    """

    kind = "ia3"
    foldable = True
    Config = Ia3Config
    learning_rate = 1e-2

    def __init__(self, config: Ia3Config, layout: Layout, generator: torch.Generator | None = None) -> None:
        super().__init__(config, layout, generator)
        for name, (_, outside) in choose_projections(layout.projections, TARGETS).items():
            register_parameters(self, {f"{name}.scale": torch.zeros(layout.adapted_layers, outside)})

    @staticmethod
    def act(own: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(y, y, own["scale"][:, None])

    @staticmethod
    def terms(own: Mapping[str, Tensor]) -> Sequence[Term] | None:
        return [Term(scale=own["scale"])]

    @staticmethod
    def fold(own: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factors = 1 + own["scale"][0]
        return weight * factors[:, None], None if bias is None else bias * factors

"""Scales and biases of a frozen decoder's projections: bias tuning (LLaMA-Adapter V2, arXiv 2304.15010, 3.1).

In an adapted layer each linear projection computes ``y + s * y + b`` in place of y = W x. Both s and b start
at zero, so an untrained adapter leaves the decoder unchanged. The paper writes s' (W x + b'), where s' = 1 +
s and b' = b / s'. Storing 1 + s itself would lose small steps in bfloat16. Unlike in the paper, norms and
layers below the adapted ones are not changed, and only the frozen weights make the prompts' keys and values.

Shapes: B rows, T tokens, L adapted layers, S scales and biases of a layer, R sets of them (1 or B), W width
of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.part import Inputs, Part, PartConfig, State
from llama_adapter.methods.shape import Layout
from llama_adapter.methods.sites import SitePart
from llama_adapter.methods.terms import Term


@dataclass(frozen=True)
class ScalesConfig(PartConfig):
    """Scales and biases have no settings that a user chooses.

    Attributes:
        width: S, for an adapter that was stored without the names of its projections (format version 1). 0:
            it follows from the projections.
    """

    width: int = field(default=0, metadata={"derived": True})

    def __post_init__(self) -> None:
        if self.width < 0:
            raise UsageError(f"width: {self.width} given; choose 0 or more")


class Scales(SitePart):
    """A scale and a bias for each output of each projection.

    Attributes:
        values: (L, S). For each projection, sorted by name, its scales and then its biases. Zero at the
            start.
    """

    kind = "scales"
    foldable = True
    Config = ScalesConfig
    learning_rate = 1e-3

    def __init__(
        self, config: ScalesConfig, layout: Layout, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, layout, generator)
        width = config.width or 2 * sum(out for _, out in layout.projections.values())
        self.values = nn.Parameter(torch.zeros(layout.adapted_layers, width))

    def add_state(self, states: dict[type[Part], State], inputs: Inputs) -> None:
        projections = self.layout.projections
        names = [f"{name}.{own}" for name in projections for own in ("scale", "bias")]
        sizes = [out for _, out in projections.values() for _ in range(2)]
        states[Scales] = dict(zip(names, self.values[None].split(sizes, dim=-1), strict=True))

    @staticmethod
    def act(own: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.addcmul(y, y, own["scale"][:, None]).add_(own["bias"][:, None])

    @staticmethod
    def terms(own: Mapping[str, Tensor]) -> Sequence[Term] | None:
        return [Term(scale=own["scale"], bias=own["bias"])]

    @staticmethod
    def fold(own: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factors, added = 1 + own["scale"][0], own["bias"][0]
        return weight * factors[:, None], added if bias is None else bias * factors + added

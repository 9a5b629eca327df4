"""Low-rank adaptation: LoRA (arXiv 2106.09685), and rsLoRA with another scale (arXiv 2312.03732).

A projection computes, in place of y = W x,

    y + s B A x        s = alpha / r, or alpha / sqrt(r) with rsLoRA

B starts at zero, so that an untrained adapter leaves the decoder unchanged.

Shapes: L adapted layers, R sets of a part's tensors (1 or B), r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.part import Inputs, Part, PartConfig, State
from llama_adapter.methods.shape import Layout
from llama_adapter.methods.sites import SitePart, choose_projections, register_parameters
from llama_adapter.methods.terms import Term


@dataclass(frozen=True)
class LoraConfig(PartConfig):
    """The settings of LoRA."""

    rank: int = 8  # r
    alpha: float = 16.0
    targets: tuple[str, ...] = ()  # projections by name or its end, such as q_proj; none: all
    rslora: bool = False
    dropout: float = 0.0  # share of a projection's inputs left out while training

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank: {self.rank} given; choose 1 or more")
        if not self.alpha > 0:
            raise UsageError(f"alpha: {self.alpha} given; choose a number above 0")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout: {self.dropout} given; choose 0 or more, below 1")

    @property
    def scale(self) -> float:
        """s, what the product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Lora(SitePart):
    """Two matrices for each projection.

    Attributes:
        NAME.down: A, (L, r, in), drawn as PEFT draws it. NAME.up: B, (L, out, r), zero at the start.
    """

    kind = "lora"
    foldable = True
    Config = LoraConfig
    size = "rank"
    config: LoraConfig

    def __init__(self, config: LoraConfig, layout: Layout, generator: torch.Generator | None = None) -> None:
        super().__init__(config, layout, generator)
        layers = layout.adapted_layers
        for name, (inside, outside) in choose_projections(layout.projections, config.targets).items():
            down = torch.empty(layers, config.rank, inside)
            down.uniform_(-1 / math.sqrt(inside), 1 / math.sqrt(inside), generator=generator)
            up = torch.zeros(layers, outside, config.rank)
            register_parameters(self, {f"{name}.down": down, f"{name}.up": up})

    def add_state(self, states: dict[type[Part], State], inputs: Inputs) -> None:
        state = {}
        for name, value in self.named_parameters():
            site, _, own = name.rpartition(".")
            state[name] = (value * self.config.scale if own == "up" else value)[None]
            if own == "down" and self.config.dropout and self.training and torch.is_grad_enabled():
                # On the CPU, where its value is read without waiting for the device.
                state[f"{site}.dropout"] = torch.full((1, len(value)), self.config.dropout)
        states[Lora] = state

    @staticmethod
    def act(own: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        if "dropout" in own:
            x = F.dropout(x, float(own["dropout"][0]))
        return add_low_rank(y, x, own["down"], own["up"])

    @staticmethod
    def terms(own: Mapping[str, Tensor]) -> Sequence[Term] | None:
        return None if "dropout" in own else [Term(down=own["down"], up=own["up"])]

    @staticmethod
    def fold(own: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + own["up"][0] @ own["down"][0], bias


def add_low_rank(y: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``y + up (down x)``, (B, T, out): x (B, T, in), down (R, r, in), up (R, out, r), with R = 1 or B."""
    if len(down) == 1 and len(up) == 1:  # y is large: add within the product
        return torch.addmm(y.flatten(0, -2), F.linear(x, down[0]).flatten(0, -2), up[0].T).view(y.shape)
    return y + x @ down.mT @ up.mT

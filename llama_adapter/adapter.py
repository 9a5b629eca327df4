"""The only trainable module: adaptation prompts and gates.

Shapes: L adapted layers, K prompts, D hidden size, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama_adapter.config import AdapterConfig


class Adapter(nn.Module):
    """K prompts for each of the top L layers and one gate a head (paper, section 3.1).

    Attributes:
        prompts: (L, K, D), drawn from N(0, 1); not normalised before the frozen projections.
        gates: (L, H), zero at the start, so that an untrained adapter leaves the decoder as it is.
    """

    def __init__(self, config: AdapterConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        layers, shape = config.adapted_layers, config.shape
        prompts = torch.randn(layers, config.prompt_length, shape.hidden_size, generator=generator)
        self.prompts = nn.Parameter(prompts)
        self.gates = nn.Parameter(torch.zeros(layers, shape.num_heads))

    def forward(self) -> Tensor:
        """The prompts of every adapted layer, (1, L, K, D)."""
        return self.prompts[None]

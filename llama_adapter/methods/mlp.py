"""A small network that turns narrow trainable vectors into vectors of any width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_TANH = 0.628  # the root mean square of tanh(x) for x from N(0, 1)


class Mlp(nn.Module):
    """``W2 tanh(W1 x + b1) + b2``, (..., W) -> (..., N).

    For x from N(0, 1), its output initially has mean 0 and root mean square 1.
    """

    def __init__(self, width: int, outputs: int, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights from ``generator``.

        Args:
            width: W, of the input and of the hidden layer.
            outputs: N.
        """
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, outputs)
        nn.init.normal_(self.hidden.weight, std=width**-0.5, generator=generator)
        nn.init.normal_(self.output.weight, std=width**-0.5 / _TANH, generator=generator)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Turn narrow vectors (..., W) into (..., N)."""
        y: Tensor = self.output(torch.tanh(self.hidden(x)))
        return y

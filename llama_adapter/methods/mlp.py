"""A small network behind trainable vectors: they are narrow, and it makes of them vectors of any width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_TANH = 0.628  # the root mean square of tanh of N(0, 1)


class Mlp(nn.Module):
    """``W2 tanh(W1 x + b1) + b2``, (..., W) -> (..., N).

    From x of N(0, 1) it gives numbers of mean 0 and root mean square 1 at the start.
    """

    def __init__(self, width: int, outputs: int, generator: torch.Generator | None = None) -> None:
        """Draw its weights from ``generator``.

        Args:
            width: W, of the input and of the hidden layer. outputs: N.
        """
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, outputs)
        nn.init.normal_(self.hidden.weight, std=width**-0.5, generator=generator)
        nn.init.normal_(self.output.weight, std=width**-0.5 / _TANH, generator=generator)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Narrow vectors (..., W) -> (..., N)."""
        y: Tensor = self.output(torch.tanh(self.hidden(x)))
        return y

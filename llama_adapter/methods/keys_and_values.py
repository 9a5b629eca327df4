"""How an attention layer computes keys and values, written down so that prompts can be treated alike.

Most layers have a ``k_proj`` and a ``v_proj``; some cut keys and values out of one fused product, normalise
them, or go through a smaller latent product first. The probe (`llama_adapter.methods.probe`) finds out which
of the layer's modules are run on which columns of what came before, and writes it down as `KeysAndValues`.

Shapes: B rows, K prompts, D hidden size, G key-value heads, d head width, N columns of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

MOST_PIECES = 512  # more than these are picked column by column

# Where a module finds the token among the dimensions of its input: (B, T, ...), (B, G, T, d) or (B * T, ...).
Layout = Literal["token second", "token third", "token first"]


@dataclass(frozen=True)
class Columns:
    """Columns of earlier results, joined.

    Attributes:
        pieces: (result, start, stop) each. Result 0 is the hidden states, result i what step i gave.
    """

    pieces: tuple[tuple[int, int, int], ...]

    @property
    def width(self) -> int:
        """How many they are."""
        return sum(stop - start for _, start, stop in self.pieces)

    def of(self, results: Sequence[Tensor]) -> Tensor:
        """Results (B, K, N) each -> their columns, (B, K, columns)."""
        if len(self.pieces) > MOST_PIECES:
            starts = [0]
            for result in results:
                starts.append(starts[-1] + result.shape[-1])
            picked = [starts[r] + column for r, start, stop in self.pieces for column in range(start, stop)]
            joined = torch.cat(tuple(results), dim=-1)
            return joined.index_select(-1, torch.tensor(picked, device=joined.device))
        parts = [
            results[r] if (start, stop) == (0, results[r].shape[-1]) else results[r][..., start:stop]
            for r, start, stop in self.pieces
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class Step:
    """One module of the layer and what it is run on.

    Attributes:
        module: its name within the attention layer.
        reads: the columns that are its input.
        shape: of one token's input: (columns,), or (G, d) where heads are apart.
        layout: how a token's input lies among those of other tokens.
    """

    module: str
    reads: Columns
    shape: tuple[int, ...]
    layout: Layout = "token second"

    def run(self, attention: nn.Module, results: Sequence[Tensor]) -> Tensor:
        """Results (B, K, N) each -> this step's, (B, K, columns)."""
        states = self.reads.of(results)
        rows = states.shape[:2]
        states = states.unflatten(-1, self.shape)
        if self.layout == "token third":
            states = states.transpose(1, 2)
        elif self.layout == "token first":
            states = states.flatten(0, 1)
        states = attention.get_submodule(self.module)(states)
        if self.layout == "token third":
            states = states.transpose(1, 2)
        return states.reshape(*rows, -1)


@dataclass(frozen=True)
class KeysAndValues:
    """All that a layer does to hidden states before its softmax, but for the rotary embedding.

    Attributes:
        steps: in the order in which they are run; each reads the results of those before it.
        keys, values: the columns that they are, head by head.
        heads: G, of the keys and values as they enter the attention.
    """

    steps: tuple[Step, ...]
    keys: Columns
    values: Columns
    heads: int

    def of(self, attention: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, K, D) -> keys and values, each (B, G, K, d), where the two d may differ."""
        results = [hidden]
        for step in self.steps:
            results.append(step.run(attention, results))
        keys, values = (
            columns.of(results).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for columns in (self.keys, self.values)
        )
        return keys, values


def usual_form(attention: nn.Module) -> KeysAndValues | None:
    """The form of a layer with ``k_proj``, ``v_proj`` and perhaps ``k_norm``; None for another.

    It stands in for the probe where there are no weights to compute with (the meta device).
    """
    names = ("k_proj", "v_proj")
    sizes = [int(getattr(getattr(attention, name, None), "out_features", 0)) for name in names]
    head_dim = getattr(attention, "head_dim", None)
    if not all(sizes) or head_dim is None:
        return None
    width = int(attention.k_proj.in_features)  # type: ignore[union-attr,arg-type]
    hidden = Columns(((0, 0, width),))
    steps = [Step(name, hidden, (width,)) for name in names]
    keys, values = (Columns(((result, 0, sizes[result - 1]),)) for result in (1, 2))
    norm = getattr(attention, "k_norm", None)
    if norm is not None:
        # OLMo 2 normalises all heads together, the others head by head.
        whole = norm.weight.ndim == 1 and norm.weight.shape[0] != head_dim
        shape = (sizes[0],) if whole else (sizes[0] // head_dim, head_dim)
        steps.append(Step("k_norm", keys, shape))
        keys = Columns(((3, 0, sizes[0]),))
    return KeysAndValues(tuple(steps), keys, values, sizes[0] // head_dim)

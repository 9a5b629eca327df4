"""Describes how an attention layer computes keys and values, so that prompts can be treated the same way.

Most layers have a ``k_proj`` and a ``v_proj``. Some cut keys and values out of one fused product, normalise
them, or first compute a smaller latent product. The probe (`llama_adapter.methods.probe`) finds out which
modules the layer runs, and on which columns of earlier results. `KeysAndValues` describes this.

Shapes: B rows, K prompts, D hidden size, G key-value heads, d head width, N columns of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

MOST_PIECES = 512  # if there are more, columns are selected one by one

# Where a token is among the dimensions of a module's input: (B, T, ...), (B, G, T, d) or (B * T, ...).
Layout = Literal["token second", "token third", "token first"]


@dataclass(frozen=True)
class Columns:
    """Columns of earlier results, joined.

    Attributes:
        pieces: (result, start, stop) each. Result 0 is the hidden states, result i the output of step i.
    """

    pieces: tuple[tuple[int, int, int], ...]

    @property
    def width(self) -> int:
        """The number of columns."""
        return sum(stop - start for _, start, stop in self.pieces)

    def of(self, results: Sequence[Tensor]) -> Tensor:
        """The columns of results: (B, K, N) each -> (B, K, columns)."""
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
    """One module of the layer, and its input.

    Attributes:
        module: its name within the attention layer.
        reads: the columns that are its input.
        shape: the shape of one token's input: (columns,), or (G, d) if heads are separate.
        layout: where a token's input is among those of other tokens.
    """

    module: str
    reads: Columns
    shape: tuple[int, ...]
    layout: Layout = "token second"

    def run(self, attention: nn.Module, results: Sequence[Tensor]) -> Tensor:
        """The output of this step, (B, K, columns), from results (B, K, N)."""
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
    """Everything that a layer does to hidden states before its softmax, except the rotary embedding.

    Attributes:
        steps: in the order in which they run. Each reads results of earlier ones.
        keys, values: which columns they are, head by head.
        heads: G, the number of heads of keys and values when they enter the attention.
    """

    steps: tuple[Step, ...]
    keys: Columns
    values: Columns
    heads: int

    def of(self, attention: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of hidden states (B, K, D): (B, G, K, d) each. Their d may differ."""
        results = [hidden]
        for step in self.steps:
            results.append(step.run(attention, results))
        keys, values = (
            columns.of(results).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for columns in (self.keys, self.values)
        )
        return keys, values


def usual_form(attention: nn.Module) -> KeysAndValues | None:
    """The form of a layer with ``k_proj``, ``v_proj`` and perhaps ``k_norm``; None for any other layer.

    It replaces the probe if there are no weights to compute with (on the meta device).
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
        # OLMo 2 normalises all heads together, other families each head separately.
        whole = norm.weight.ndim == 1 and norm.weight.shape[0] != head_dim
        shape = (sizes[0],) if whole else (sizes[0] // head_dim, head_dim)
        steps.append(Step("k_norm", keys, shape))
        keys = Columns(((3, 0, sizes[0]),))
    return KeysAndValues(tuple(steps), keys, values, sizes[0] // head_dim)

"""Answers that are made together, a token of each at a time; rows join and leave between tokens.

Newcomers' questions are read by themselves, then their cache stands beside the others'. The shorter ones are
padded on the left, which the mask hides, so that every row ends at the batch's last place. A decoder's
weights are read from memory once for a token of all rows, which is what takes the time with one row as well.

Shapes: B rows, T tokens of a question, G key-value heads, S places of the cache, d head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from llama_adapter.decoding.sampling import Sampling
from llama_adapter.decoding.streams import TokenChooser
from llama_adapter.methods.state import AdapterState, merge_states


@dataclass(eq=False)
class Row:
    """One answer of a batch.

    Attributes:
        choose: its tokens' chooser.
        adapter: what `LlamaAdapter.project` gives, of one row.
        length: how many tokens the cache holds: all but the latest.
        token: (1, 1), the latest.
    """

    choose: TokenChooser
    adapter: AdapterState
    length: int
    token: Tensor


class Batch:
    """Rows with different adapters, samplings and lengths, each answered as if it were alone.

    Args:
        forward: that of a `LlamaAdapter`.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.rows: list[Row] = []
        self._forward = forward
        self._cache = DynamicCache()
        self._adapter: AdapterState | None = None

    def join(self, question: Tensor, adapter: AdapterState, sampling: Sampling) -> Row:
        """Read a question, (1, T), and add its row, whose first token is chosen."""
        return self.join_together([(question, adapter, sampling)])[0]

    @torch.inference_mode()
    def join_together(self, asked: Sequence[tuple[Tensor, AdapterState, Sampling]]) -> list[Row]:
        """As `join`, for several questions that are read at once, best of about the same length."""
        lengths = [question.shape[1] for question, _, _ in asked]
        # One without a config keeps all places in every layer, so that rows of any length can be lined up;
        # a sliding window is then a matter of the mask.
        cache = DynamicCache()
        output = self._forward(
            input_ids=torch.cat([F.pad(q, (max(lengths) - q.shape[1], 0)) for q, _, _ in asked]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            adapter=merge_states([adapter for _, adapter, _ in asked]),
            **_padding(lengths, max(lengths), like=asked[0][0]),
        )
        newcomers = []
        for (question, adapter, sampling), logits in zip(asked, output.logits.split(1), strict=True):
            choose = TokenChooser(sampling, question)
            newcomers.append(Row(choose, adapter, question.shape[1], choose(logits[:, -1])))
        if self.rows:
            cache = _beside(self._cache, cache)
        together = [*self.rows, *newcomers]
        merged = merge_states([row.adapter for row in together])
        # Only now, so that the others go on as they were where something failed.
        self.rows, self._cache, self._adapter = together, cache, merged
        return newcomers

    @torch.inference_mode()
    def step(self) -> None:
        """Read every row's latest token and choose its next."""
        output = self._forward(
            input_ids=torch.cat([row.token for row in self.rows]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            adapter=self._adapter,
            **_padding([row.length + 1 for row in self.rows], 1, like=self.rows[0].token),
        )
        for row, logits in zip(self.rows, output.logits.split(1), strict=True):
            row.length += 1
            row.token = row.choose(logits[:, -1])

    @torch.inference_mode()
    def leave(self, *gone: Row) -> None:
        """Take rows out, and the places that they alone needed."""
        kept = [number for number, row in enumerate(self.rows) if row not in gone]
        self.rows = [self.rows[number] for number in kept]
        if not self.rows:
            self._cache = DynamicCache()
            return
        places = max(row.length for row in self.rows)
        layers: Any = self._cache.layers
        for layer in layers:
            layer.keys, layer.values = (
                states[kept, :, states.shape[2] - places :] for states in (layer.keys, layer.values)
            )
        self._adapter = merge_states([row.adapter for row in self.rows])


def _padding(lengths: Sequence[int], read: int, *, like: Tensor) -> dict[str, Tensor]:
    """What tells the decoder of rows' padding on the left; nothing where there is none.

    Args:
        lengths: tokens of each row, those in the cache counted.
        read: how many of them, padding counted, are read now.
    """
    longest = max(lengths)
    if min(lengths) == longest:
        return {}
    places = (
        torch.arange(longest, device=like.device)
        - longest
        + torch.tensor(lengths, device=like.device)[:, None]
    )
    return {"attention_mask": (places >= 0).long(), "position_ids": places[:, -read:].clamp(min=0)}


def _beside(ours: DynamicCache, theirs: DynamicCache) -> DynamicCache:
    """The rows of two caches in one, the shorter cache padded in front."""
    places = max(ours.get_seq_length(), theirs.get_seq_length())

    def joined(*several: Tensor) -> Tensor:  # (B, G, S, d) each
        return torch.cat([F.pad(states, (0, 0, places - states.shape[2], 0)) for states in several])

    together = DynamicCache()
    layers: Any = zip(ours.layers, theirs.layers, strict=True)
    for index, (mine, other) in enumerate(layers):
        together.update(joined(mine.keys, other.keys), joined(mine.values, other.values), index)
    return together

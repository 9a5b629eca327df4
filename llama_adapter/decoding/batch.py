"""A batch of answers that advance together, one token each at a time. Rows join and leave between tokens.

The questions of new rows are read separately, and their cache is then put beside that of the others. Shorter
rows are padded on the left, and the mask hides the padding, so every row ends at the batch's last position. A
decoder's weights are then read from memory once for the next token of all rows, and reading them takes most
of the time.

Shapes: B rows, T tokens of a question, G key-value heads, S positions of the cache, d head width, V
vocabulary.
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
from llama_adapter.methods.state import AdapterState, merge_states, share_a_decoder


@dataclass(eq=False)
class Row:
    """One answer of a batch.

    Attributes:
        choose: chooses its tokens.
        adapter: the result of `LlamaAdapter.project` for this row.
        length: how many tokens the cache holds: all but the latest.
        token: (1, 1), the latest token.
    """

    choose: TokenChooser
    adapter: AdapterState
    length: int
    token: Tensor


class Batch:
    """Rows with different adapters, sampling settings and lengths. Each is answered as if it were alone.

    Args:
        forward: the forward of a `LlamaAdapter`.

    Attributes:
        rows: the rows that are being answered.
        cache: the keys and values of their tokens.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.rows: list[Row] = []
        self._forward = forward
        self.cache = DynamicCache()
        self._adapter: AdapterState | None = None

    def takes(self, adapter: AdapterState) -> bool:
        """Whether one decoder computes this adapter and those of the rows, so that it can join them."""
        return share_a_decoder([adapter, *(row.adapter for row in self.rows)])

    def join(self, question: Tensor, adapter: AdapterState, sampling: Sampling) -> Row:
        """Read a question, (1, T), choose the first token of its answer, and add its row."""
        return self.join_together([(question, adapter, sampling)])[0]

    @torch.inference_mode()
    def join_together(self, asked: Sequence[tuple[Tensor, AdapterState, Sampling]]) -> list[Row]:
        """As `join`, for several questions that are read at once. They should be about equally long."""
        lengths = [question.shape[1] for question, _, _ in asked]
        # A cache without a config keeps all positions in every layer, so rows of any length can be aligned. A
        # sliding window is then applied by the mask.
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
            cache = _beside(self.cache, cache)
        together = [*self.rows, *newcomers]
        merged = merge_states([row.adapter for row in together])
        # Only now, so that the other rows can go on as before if something above fails.
        self.rows, self.cache, self._adapter = together, cache, merged
        return newcomers

    @torch.inference_mode()
    def step(self) -> None:
        """Read every row's latest token and choose its next."""
        output = self._forward(
            input_ids=torch.cat([row.token for row in self.rows]),
            past_key_values=self.cache,
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
        """Remove rows, and the positions of the cache that only they needed."""
        kept = [number for number, row in enumerate(self.rows) if row not in gone]
        self.rows = [self.rows[number] for number in kept]
        if not self.rows:
            self.cache = DynamicCache()
            return
        places = max(row.length for row in self.rows)
        layers: Any = self.cache.layers
        for layer in layers:
            layer.keys, layer.values = (
                states[kept, :, states.shape[2] - places :] for states in (layer.keys, layer.values)
            )
        self._adapter = merge_states([row.adapter for row in self.rows])


def _padding(lengths: Sequence[int], read: int, *, like: Tensor) -> dict[str, Tensor]:
    """The arguments that tell the decoder of padding on the left; empty if there is none.

    Args:
        lengths: the number of tokens of each row, including those in the cache.
        read: how many of them, padding included, are read now.
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
    """Join two caches' rows in one cache. The shorter cache is padded on the left."""
    places = max(ours.get_seq_length(), theirs.get_seq_length())

    def joined(*several: Tensor) -> Tensor:  # (B, G, S, d) each
        return torch.cat([F.pad(states, (0, 0, places - states.shape[2], 0)) for states in several])

    together = DynamicCache()
    layers: Any = zip(ours.layers, theirs.layers, strict=True)
    for index, (mine, other) in enumerate(layers):
        together.update(joined(mine.keys, other.keys), joined(mine.values, other.values), index)
    return together

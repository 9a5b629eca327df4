"""Answers that are made together, a token of each at a time; rows join and leave between tokens.

Newcomers' questions are read by themselves, then their cache stands beside the others'. The shorter ones are
padded on the left, which the mask hides, so that every row ends at the batch's last place. A decoder's
weights are read from memory once for a token of all rows, which is what takes the time with one row as well.

Shapes: B rows, T tokens of a question, S places of the cache, L adapted layers, H heads, K prompts, d head
width, V vocabulary; of tuning, S scales and biases of a layer.
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


@dataclass(eq=False)
class Row:
    """One answer of a batch.

    Attributes:
        choose: its tokens' chooser.
        prompts: what `LlamaAdapter.project` gives, of one row.
        length: how many tokens the cache holds: all but the latest.
        token: (1, 1), the latest.
    """

    choose: TokenChooser
    prompts: dict[str, Tensor]
    length: int
    token: Tensor


class Batch:
    """Rows with different prompts, samplings and lengths, each answered as if it were alone.

    Args:
        forward: that of a `LlamaAdapter` which takes the bare base where no prompts are given.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.rows: list[Row] = []
        self._forward = forward
        self._cache = DynamicCache()
        self._prompts: dict[str, Tensor] = {}

    def join(self, question: Tensor, prompts: dict[str, Tensor], sampling: Sampling) -> Row:
        """Read a question, (1, T), and add its row, whose first token is chosen."""
        return self.join_together([(question, prompts, sampling)])[0]

    @torch.inference_mode()
    def join_together(self, asked: Sequence[tuple[Tensor, dict[str, Tensor], Sampling]]) -> list[Row]:
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
            **merge_prompts([prompts for _, prompts, _ in asked]),
            **_padding(lengths, max(lengths), like=asked[0][0]),
        )
        newcomers = []
        for (question, prompts, sampling), logits in zip(asked, output.logits.split(1), strict=True):
            choose = TokenChooser(sampling, question)
            newcomers.append(Row(choose, prompts, question.shape[1], choose(logits[:, -1])))
        if self.rows:
            cache = _beside(self._cache, cache)
        together = [*self.rows, *newcomers]
        merged = merge_prompts([row.prompts for row in together])
        # Only now, so that the others go on as they were where something failed.
        self.rows, self._cache, self._prompts = together, cache, merged
        return newcomers

    @torch.inference_mode()
    def step(self) -> None:
        """Read every row's latest token and choose its next."""
        output = self._forward(
            input_ids=torch.cat([row.token for row in self.rows]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **self._prompts,
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
        self._prompts = merge_prompts([row.prompts for row in self.rows])


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


def merge_prompts(several: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The prompts of several rows as those of one batch.

    A row with fewer adapted layers, or none, has values of zero there, which add exactly nothing. Where rows
    have more or fewer prompts, a mask keeps the fill out of the softmax.

    Args:
        several: each ``prompt_keys`` and ``prompt_values`` (1, L, H, K, d), and perhaps ``tuning`` (1, L, S);
            or nothing for the bare base.

    Returns:
        ``prompt_keys`` and ``prompt_values`` (B, L, H, K, d); where they differ in K ``prompt_mask`` (B, K);
        where any has one ``tuning`` (B, L, S). Empty where all are bare.
    """
    shapes = {tuple(prompts["prompt_keys"].shape[1:]) for prompts in several if prompts}
    if not shapes:
        return {}
    layers, longest = max(shape[0] for shape in shapes), max(shape[2] for shape in shapes)
    like = next(prompts["prompt_keys"] for prompts in several if prompts)
    empty = like.new_zeros(1, layers, like.shape[2], longest, like.shape[4])

    def filled(states: Tensor) -> Tensor:
        # New layers below, since it is the topmost that are adapted; new prompts behind.
        return F.pad(states, (0, 0, 0, longest - states.shape[3], 0, 0, layers - states.shape[1], 0))

    merged = {
        name: torch.cat([filled(prompts[name]) if prompts else empty for prompts in several])
        for name in ("prompt_keys", "prompt_values")
    }
    tuned = next((prompts["tuning"] for prompts in several if "tuning" in prompts), None)
    if tuned is not None:
        nothing = tuned[:, :0]
        own = [prompts.get("tuning", nothing) for prompts in several]
        merged["tuning"] = torch.cat([F.pad(rows, (0, 0, layers - rows.shape[1], 0)) for rows in own])
    if len({shape[2] for shape in shapes}) > 1:
        # A bare row keeps all of its zeros: a softmax over nothing is no number.
        counts = [prompts["prompt_keys"].shape[3] if prompts else longest for prompts in several]
        there = torch.tensor(counts, device=like.device)[:, None]
        merged["prompt_mask"] = torch.arange(longest, device=like.device) < there
    return merged


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

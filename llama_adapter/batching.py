"""Answers that are made together, a token of each at a time; rows join and leave between tokens.

A newcomer's question is read alone, then its cache stands beside the others'. The shorter ones are padded on
the left, which the mask hides, so that every row ends at the batch's last place. A decoder's weights are read
from memory once for a token of all rows, which is what takes the time with one row as well.

Shapes: B rows, T tokens of a question, S places of the cache, L adapted layers, H heads, K prompts, d head
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from llama_adapter.generate import TokenChooser
from llama_adapter.sampling import Sampling


@dataclass(eq=False)
class Row:
    """One answer of a batch.

    Attributes:
        choose: its tokens' chooser.
        prompts: ``prompt_keys`` and ``prompt_values`` (1, L, H, K, d), as `LlamaAdapter.project` gives them.
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

    @torch.inference_mode()
    def join(self, question: Tensor, prompts: dict[str, Tensor], sampling: Sampling) -> Row:
        """Read a question, (1, T), and add its row, whose first token is chosen."""
        choose = TokenChooser(sampling, question)
        # One without a config keeps all places in every layer, so that rows of any length can be lined up;
        # a sliding window is then a matter of the mask.
        cache = DynamicCache()
        output = self._forward(
            input_ids=question, past_key_values=cache, use_cache=True, logits_to_keep=1, **prompts
        )
        row = Row(choose, prompts, question.shape[1], choose(output.logits[:, -1]))
        if self.rows:
            cache = _beside(self._cache, cache)
        merged = merge_prompts([*(each.prompts for each in self.rows), prompts])
        # Only now, so that the others go on as they were where something failed.
        self.rows.append(row)
        self._cache, self._prompts = cache, merged
        return row

    @torch.inference_mode()
    def step(self) -> None:
        """Read every row's latest token and choose its next."""
        output = self._forward(
            input_ids=torch.cat([row.token for row in self.rows]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **self._prompts,
            **self._places(),
        )
        for row, logits in zip(self.rows, output.logits.split(1), strict=True):
            row.length += 1
            row.token = row.choose(logits[:, -1])

    @torch.inference_mode()
    def leave(self, row: Row) -> None:
        """Take a row out, and the places that it alone needed."""
        kept = [number for number, each in enumerate(self.rows) if each is not row]
        self.rows.remove(row)
        if not self.rows:
            self._cache = DynamicCache()
            return
        places = max(each.length for each in self.rows)
        layers: Any = self._cache.layers
        for layer in layers:
            layer.keys, layer.values = (
                states[kept, :, states.shape[2] - places :] for states in (layer.keys, layer.values)
            )
        self._prompts = merge_prompts([each.prompts for each in self.rows])

    def _places(self) -> dict[str, Tensor]:
        """What tells the decoder of the padding; nothing where there is none."""
        lengths = [row.length for row in self.rows]
        longest = max(lengths)
        if min(lengths) == longest:
            return {}
        positions = torch.tensor(lengths, device=self.rows[0].token.device)[:, None]
        mask = torch.arange(longest + 1, device=positions.device) >= longest - positions
        return {"attention_mask": mask.long(), "position_ids": positions}


def merge_prompts(several: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The prompts of several rows as those of one batch.

    A row with fewer adapted layers, or none, has values of zero there, which add exactly nothing. Where rows
    have more or fewer prompts, a mask keeps the fill out of the softmax.

    Args:
        several: each ``prompt_keys`` and ``prompt_values`` (1, L, H, K, d), or nothing for the bare base.

    Returns:
        ``prompt_keys`` and ``prompt_values`` (B, L, H, K, d) and, where they differ in K, ``prompt_mask``
        (B, K); empty where all are bare.
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

"""Attention of rows that share a sequence without padding: a row sees itself and its context only.

Shapes: R sets of prompts, T tokens, H heads, G key-value heads, K prompts, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

# How many pairs of a query and a key a head computes in the time of one more call and its backward pass.
# The first as tried on a CPU (docs/engine.md), for other devices and for softcap too, which keeps all scores;
# the second is arithmetic: some 0.1 ms at an H100's 2,500 pairs a microsecond.
CALL_IN_PAIRS_CPU, CALL_IN_PAIRS_CUDA = 1_500, 250_000


@dataclass(frozen=True)
class Segment:
    """Tokens start..stop of a packed sequence; they see themselves and, before that, their context.

    The context is a segment of its own, given by its start and stop. ``prompts`` says which of the R sets of
    prompts they read, where there are several.
    """

    start: int
    stop: int
    context: tuple[int, int] | None = None
    prompts: int = 0


def segment_positions(segments: tuple[Segment, ...]) -> Tensor:
    """The position of every token of a packed sequence, (1, T): counted on from its context's end."""
    counts = []
    for segment in segments:
        start = 0 if segment.context is None else segment.context[1] - segment.context[0]
        counts.append(torch.arange(start, start + segment.stop - segment.start))
    return torch.cat(counts)[None]


def mask_of_segments(device: torch.device) -> Tensor:
    """The attention mask to give beside segments, which stand in for it.

    transformers takes one of four dimensions as it is, and so builds none.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float | None,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention, (B, H, T, d); ``softcap`` bounds the scores as Gemma 2 does, which sdpa cannot."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    scores = query @ keys.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = scores.new_ones((), dtype=torch.bool)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights.masked_fill(~mask, 0) @ values  # a row that sees nothing gets zeros, as from sdpa


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[Segment, ...],
    *,
    scaling: float | None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    chunk: int | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention of several rows packed in one sequence, (1, H, T, d).

    In calls of a few segments each, in place of one with a (T, T) mask: the work grows with the rows'
    lengths, not with their sum squared.

    Args:
        query: (1, H, T, d). key, value: (1, G, T, d).
        segments: what each stretch of the sequence sees; together they cover it in order.
        sliding_window: how many tokens back a layer sees, where the family limits it.
        chunk: how long the chunks are outside of which it sees nothing, where the family has them.
        prefix: keys and values that all tokens of all rows see, (1, G, K, d) each.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    mask_dtype = query.dtype if softcap is None else torch.bool
    front: tuple[tuple[Tensor, ...], ...] = ((), ())
    length = 0
    if prefix is not None:
        front = tuple((states.repeat_interleave(repeats, dim=1),) for states in prefix)
        length = prefix[0].shape[2]
    calls = calls_of(segments, sliding_window, mask_dtype, query.device, chunk, length)
    # Cut once: one slice has a gradient as long as the whole sequence, and all parts together have no more.
    queries = query.split([call.mask.shape[0] for call in calls], dim=2)
    keys, values = (
        states.split([segment.stop - segment.start for segment in segments], dim=2) for states in (key, value)
    )
    outputs = [
        attend(
            part,
            torch.cat([*front[0], *(keys[index] for index in call.seen)], dim=2),
            torch.cat([*front[1], *(values[index] for index in call.seen)], dim=2),
            scaling=scaling,
            mask=call.mask,
            softcap=softcap,
        )
        for part, call in zip(queries, calls, strict=True)
    ]
    return torch.cat(outputs, dim=2)


def attend_own_prompts(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: tuple[Segment, ...],
    *,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """What each stretch of a packed sequence reads from its own prompts: (1, H, T, d) from (R, H, K, d)."""
    runs = [(row, list(run)) for row, run in groupby(segments, key=lambda segment: segment.prompts)]
    queries = query.split([run[-1].stop - run[0].start for _, run in runs], dim=2)
    parts = [
        attend(part, keys[row : row + 1], values[row : row + 1], scaling=scaling, softcap=softcap)
        for part, (row, _) in zip(queries, runs, strict=True)
    ]
    return torch.cat(parts, dim=2)


@dataclass(frozen=True)
class _Call:
    """Successive segments that are computed together."""

    seen: tuple[int, ...]  # the segments that they see, in order
    mask: Tensor  # (tokens of theirs, keys of the prefix and tokens of the seen)


@lru_cache(maxsize=4)  # for all layers of a pack, with and without a window
def calls_of(
    segments: tuple[Segment, ...],
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
    chunk: int | None = None,
    prefix: int = 0,
) -> tuple[_Call, ...]:
    """The calls of a pack. Their masks are bool, or in a floating dtype what is added to the scores.

    sdpa would make that of a bool anew in every layer, and keep each for the backward pass. They begin with
    ``prefix`` columns for keys that all tokens see.
    """
    place = {(segment.start, segment.stop): index for index, segment in enumerate(segments)}
    context = [
        index if segment.context is None else place[segment.context] for index, segment in enumerate(segments)
    ]
    lengths = [segment.stop - segment.start for segment in segments]
    most_waste = CALL_IN_PAIRS_CUDA if device.type == "cuda" and dtype != torch.bool else CALL_IN_PAIRS_CPU
    positions = segment_positions(segments)[0].int()
    segment_of = torch.arange(len(segments)).repeat_interleave(
        torch.tensor(lengths), output_size=sum(lengths)
    )
    context_of = torch.tensor(context)[segment_of]
    tokens = torch.arange(len(positions)).split(lengths)
    calls = []
    with torch.inference_mode(False):  # or training could not use what an evaluation has made
        for together in groups(lengths, context, most_waste):
            seen = _seen(together, context)
            rows = torch.cat([tokens[index] for index in together])[:, None]
            columns = torch.cat([tokens[index] for index in seen])
            distance = positions[rows] - positions[columns]
            sees = segment_of[columns] == segment_of[rows]
            sees = (sees | (segment_of[columns] == context_of[rows])) & (distance >= 0)
            if window is not None:
                sees &= distance < window
            if chunk is not None:
                sees &= positions[rows] // chunk == positions[columns] // chunk
            sees = F.pad(sees, (prefix, 0), value=True)
            if dtype != torch.bool:
                # CUDA's sdpa copies, in each layer, a mask whose rows do not start at multiples of 8.
                width = -(-sees.shape[1] // 8) * 8
                added = torch.zeros(sees.shape[0], width, dtype=dtype, device=device)[:, : sees.shape[1]]
                sees = added.masked_fill_(~sees.to(device), -torch.inf)
            calls.append(_Call(tuple(seen), sees.to(device)))
    return tuple(calls)


def _seen(together: Sequence[int], context: Sequence[int]) -> list[int]:
    return sorted({*together, *(context[index] for index in together)})


def groups(lengths: Sequence[int], context: Sequence[int], most_waste: int) -> Iterator[list[int]]:
    """Successive segments, together while what a call computes in vain costs less than another call."""

    def pairs(together: Sequence[int]) -> int:
        seen = _seen(together, context)
        return sum(lengths[index] for index in together) * sum(lengths[index] for index in seen)

    together: list[int] = []
    needed = 0
    for index in range(len(lengths)):
        alone = pairs([index])
        if together and pairs([*together, index]) - needed - alone > most_waste:
            yield together
            together, needed = [], 0
        together.append(index)
        needed += alone
    yield together

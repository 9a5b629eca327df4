"""Attention of rows packed into one sequence without padding. A row sees only itself and its context.

Shapes: R prompt sets, T tokens, H heads, G key-value heads, K prompts, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# The number of query-key pairs that a head computes in the time of one more call with its backward pass. The
# first was measured on a CPU (docs/engine.md). It is also used with softcap, which keeps all scores, and on
# other devices than CUDA. The second was not measured: about 0.1 ms at an H100's 2,500 pairs a microsecond.
CALL_IN_PAIRS_CPU, CALL_IN_PAIRS_CUDA = 1_500, 250_000


@dataclass(frozen=True)
class Segment:
    """The tokens start..stop of a packed sequence. They see themselves and, before that, their context.

    The context is another segment, given by its start and stop. ``prompts`` is the index of the prompt set
    (of R) that the tokens read, if there are several.
    """

    start: int
    stop: int
    context: tuple[int, int] | None = None
    prompts: int = 0


def segment_positions(segments: tuple[Segment, ...]) -> Tensor:
    """The position of every token of a packed sequence, (1, T).

    A segment's positions follow its context's.
    """
    counts = []
    for segment in segments:
        start = 0 if segment.context is None else segment.context[1] - segment.context[0]
        counts.append(torch.arange(start, start + segment.stop - segment.start))
    return torch.cat(counts)[None]


def mask_of_segments(device: torch.device) -> Tensor:
    """The attention mask to pass together with segments. It is not used: the segments replace it.

    transformers accepts a mask of four dimensions unchanged, so it does not build one.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def kernels_of_any_length(device: torch.device) -> AbstractContextManager[None]:
    """A context in which sdpa does not use cuDNN on CUDA.

    On recent GPUs torch prefers cuDNN, which builds a plan for each new shape. That is slow, and the rows of
    a pack have new lengths in every step. What this gains was not measured here.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float | None,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention, (B, H, T, d). ``softcap`` bounds the scores, as in Gemma 2; sdpa can't do that."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    scores = query @ keys.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = scores.new_ones((), dtype=torch.bool)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return weights.masked_fill(~mask, 0) @ values  # zeros for a query that sees nothing, as from sdpa


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
    """Causal attention of several rows packed into one sequence, (1, H, T, d).

    It makes calls for a few segments each, not one call with a (T, T) mask. So the work grows with the rows'
    lengths and not with the square of their sum.

    Args:
        query: (1, H, T, d).
        key, value: (1, G, T, d).
        segments: what each part of the sequence sees. Together they cover it in order.
        sliding_window: how many tokens back a layer sees, if the family limits it.
        chunk: the length of chunks, if a token sees only its own chunk in this family.
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
    # Split once: the gradient of a single slice is as long as the whole sequence, and the gradients of all
    # parts of a split together are no longer.
    queries = query.split([call.mask.shape[0] for call in calls], dim=2)
    keys, values = (
        states.split([segment.stop - segment.start for segment in segments], dim=2) for states in (key, value)
    )
    with kernels_of_any_length(query.device):
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
    """What each part of a packed sequence reads from its own prompts: (1, H, T, d) from (R, H, K, d)."""
    if query.device.type == "cuda":  # there a call costs more than the work that padding adds
        return attend_own_prompts_padded(query, keys, values, segments, scaling=scaling, softcap=softcap)
    runs = [(row, list(run)) for row, run in groupby(segments, key=lambda segment: segment.prompts)]
    queries = query.split([run[-1].stop - run[0].start for _, run in runs], dim=2)
    parts = [
        attend(part, keys[row : row + 1], values[row : row + 1], scaling=scaling, softcap=softcap)
        for part, (row, _) in zip(queries, runs, strict=True)
    ]
    return torch.cat(parts, dim=2)


def attend_own_prompts_padded(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    segments: tuple[Segment, ...],
    *,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """The same as `attend_own_prompts` in one call, with the queries of each prompt set padded."""
    tokens, places = _padding_of(segments, len(keys), query.device)
    heads, width = query.shape[1], query.shape[3]
    padded = query[0].index_select(1, tokens).view(heads, len(keys), -1, width).transpose(0, 1)
    with kernels_of_any_length(query.device):
        read = attend(padded, keys, values, scaling=scaling, softcap=softcap)
    return read.transpose(0, 1).reshape(heads, -1, width).index_select(1, places)[None]


@lru_cache(maxsize=4)  # shared by all layers of a pack
def _padding_of(segments: tuple[Segment, ...], sets: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For queries padded to the most tokens of a prompt set, P, which token each one is, (R * P,), and where
    each token's query then is, (T,)."""
    rows: list[list[int]] = [[] for _ in range(sets)]
    for segment in segments:
        rows[segment.prompts] += range(segment.start, segment.stop)
    most = max(map(len, rows))
    with torch.inference_mode(False):  # or a training could not use what an evaluation has made
        places = torch.empty(segments[-1].stop, dtype=torch.long)
        for number, row in enumerate(rows):
            places[row] = number * most + torch.arange(len(row))
        tokens = torch.tensor([token for row in rows for token in row + [0] * (most - len(row))])
        return tokens.to(device), places.to(device)


@dataclass(frozen=True)
class _Call:
    """Successive segments that are computed together."""

    seen: tuple[int, ...]  # the indices of the segments that they see, in order
    mask: Tensor  # (their tokens, keys of the prefix and tokens of the seen segments)


@lru_cache(maxsize=4)  # shared by all layers of a pack, with and without a window
def calls_of(
    segments: tuple[Segment, ...],
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
    chunk: int | None = None,
    prefix: int = 0,
) -> tuple[_Call, ...]:
    """The calls for a pack. Their masks are bool or, in a floating dtype, numbers to add to the scores.

    From a bool mask sdpa would make such numbers again in every layer, and keep each copy for the backward
    pass. The masks start with ``prefix`` columns for keys that all tokens see.
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
    with torch.inference_mode(False):  # or a training could not use masks that an evaluation has made
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
                # CUDA's sdpa copies, in each layer, a mask whose lines do not start at multiples of 8.
                width = -(-sees.shape[1] // 8) * 8
                added = torch.zeros(sees.shape[0], width, dtype=dtype, device=device)[:, : sees.shape[1]]
                sees = added.masked_fill_(~sees.to(device), -torch.inf)
            calls.append(_Call(tuple(seen), sees.to(device)))
    return tuple(calls)


def _seen(together: Sequence[int], context: Sequence[int]) -> list[int]:
    return sorted({*together, *(context[index] for index in together)})


def groups(lengths: Sequence[int], context: Sequence[int], most_waste: int) -> Iterator[list[int]]:
    """Group successive segments, as long as the masked work costs less than a separate call."""

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

"""Rows of different lengths in one sequence, without padding and without seeing each other.

Rows that open with the same tokens (the template's first sentences) share them: the opening is computed once,
and each row's rest sees it as its context. The result is exact, since no row's opening depends on its rest,
and the opening's gradient is the sum over its rows. Rows with pictures share theirs with rows of the same
pictures only, whose prompts are the same.

Shapes: T tokens of the pack, N labelled ones, V vocabulary, I pictures, F features of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_adapter.attention import Segment
from llama_adapter.data import IGNORED, Example, PictureFile
from llama_adapter.processes import Processes

SHORTEST_OPENING = 16  # tokens; a shorter one is not worth a stretch of its own
ALONE = Processes()


@dataclass(frozen=True)
class Pack:
    """Several rows in one sequence.

    Attributes:
        input_ids, position_ids: (1, T).
        segments: what each stretch of the sequence sees.
        predicting: (N,) indices of the tokens whose successor is labelled.
        targets: (N,) those successors.
        rows: the rows' numbers in their source.
        pictures: (I,) those of the rows, each as often as there are sets of prompts that it belongs to.
        owners: (I,) the set of prompts that each belongs to; the segments say who reads which.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    predicting: Tensor
    targets: Tensor
    rows: tuple[int, ...]
    pictures: tuple[PictureFile, ...]
    owners: Tensor

    def to(self, device: torch.device) -> Pack:
        """The same pack with its tensors on another device."""
        names = ("input_ids", "position_ids", "predicting", "targets", "owners")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)


def pack(examples: Sequence[Example]) -> Pack:
    """Put rows into one sequence, rows with the same opening behind it."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predicting: list[int] = []
    targets: list[int] = []

    def append(
        tokens: Sequence[int], first_position: int, context: tuple[int, int] | None, prompts: int
    ) -> int:
        start = len(ids)
        ids.extend(tokens)
        positions.extend(range(first_position, first_position + len(tokens)))
        segments.append(Segment(start, len(ids), context, prompts))
        return start

    sets: dict[tuple[PictureFile, ...], int] = {}
    groups = _by_opening(examples)
    for group in groups:
        prompts = sets.setdefault(group[0].images, len(sets))
        shared = _shared_opening(group)
        context = None
        if shared:
            start = append(group[0].input_ids[:shared], 0, None, prompts)
            context = (start, start + shared)
        for example in group:
            start = append(example.input_ids[shared:], shared, context, prompts)
            for index, label in enumerate(example.labels[shared + 1 :]):
                if label != IGNORED:
                    predicting.append(start + index)
                    targets.append(label)
    return Pack(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        segments=tuple(segments),
        predicting=torch.tensor(predicting),
        targets=torch.tensor(targets),
        rows=tuple(example.row for group in groups for example in group),
        pictures=tuple(picture for pictures in sets for picture in pictures),
        owners=torch.tensor(
            [number for pictures, number in sets.items() for _ in pictures], dtype=torch.long
        ),
    )


def _by_opening(examples: Sequence[Example]) -> list[list[Example]]:
    """Rows that may share their opening, side by side; rows of the same pictures next to each other."""
    groups: dict[tuple[PictureFile, ...], dict[tuple[int, ...], list[Example]]] = {}
    for example in examples:
        opening = tuple(example.input_ids[:SHORTEST_OPENING])
        groups.setdefault(example.images, {}).setdefault(opening, []).append(example)
    return [group for openings in groups.values() for group in openings.values()]


def _shared_opening(group: Sequence[Example]) -> int:
    """How many leading tokens all rows share, each row's first prediction left to itself."""
    if len(group) == 1:
        return 0
    unlabelled = min(sum(1 for _ in takewhile(lambda label: label == IGNORED, e.labels)) for e in group)
    columns = zip(*(example.input_ids for example in group), strict=False)
    equal = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    shared = min(equal, unlabelled - 1)
    return shared if shared >= SHORTEST_OPENING else 0


def split_by_tokens(examples: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Consecutive runs of rows of at most ``max_tokens`` tokens (a longer single row stands alone)."""
    run: list[Example] = []
    tokens = 0
    for example in examples:
        if run and tokens + len(example.input_ids) > max_tokens:
            yield run
            run, tokens = [], 0
        run.append(example)
        tokens += len(example.input_ids)
    if run:
        yield run


def answer_loss(
    model: Callable[..., Any],
    packed: Pack,
    *,
    features: Mapping[PictureFile, Tensor] | None = None,
    reduction: str = "sum",
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy of the labelled tokens, in float32, summed or (N,); logits exist at those places only.

    Args:
        reduction: "sum", or "none" for each token's own.
        model: takes the arguments of `LlamaAdapter.forward`, ``kwargs`` among them.
        features: (F,) of each picture of the pack; None for rows without.
    """
    if packed.pictures:
        assert features is not None
        seen = torch.stack([features[picture] for picture in packed.pictures])
        kwargs |= {"image_features": seen.to(packed.owners.device), "image_owners": packed.owners}
    output = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        segments=packed.segments,
        logits_to_keep=packed.predicting,
        use_cache=False,
        **kwargs,
    )
    return F.cross_entropy(output.logits[0].float(), packed.targets, reduction=reduction)


def deal(examples: Sequence[Example], processes: int) -> list[list[Example]]:
    """Share rows out to processes, about as many tokens to each: the longest first, each to who has least.

    Every process works out the same shares, so nothing has to be sent around.
    """
    if processes == 1:
        return [list(examples)]
    shares: list[list[Example]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    for example in sorted(examples, key=lambda example: len(example.input_ids), reverse=True):
        least = tokens.index(min(tokens))
        shares[least].append(example)
        tokens[least] += len(example.input_ids)
    return shares


def accumulate_gradient(
    model: Callable[..., Any],
    examples: Sequence[Example],
    *,
    device: torch.device,
    max_tokens: int,
    features: Mapping[PictureFile, Tensor] | None = None,
    processes: Processes = ALONE,
    **kwargs: Any,
) -> float:
    """Add the gradient of the mean loss a labelled token to the trainable parameters; returns that loss.

    Of several processes each computes the part of its rows, in the gradient and in the loss: both are to be
    summed. The mean is over the labelled tokens of all rows, wherever they are computed.
    """
    labelled = sum(label != IGNORED for example in examples for label in example.labels[1:])
    # Rows with the same opening side by side, so that they share it within a pack.
    shares = [
        list(split_by_tokens([row for group in _by_opening(share) for row in group], max_tokens))
        for share in deal(examples, processes.count)
    ]
    total = 0.0
    for run, weight in _in_step(shares, min(examples, key=lambda row: len(row.input_ids)), processes):
        loss = answer_loss(model, pack(run).to(device), features=features, **kwargs) / labelled
        (loss * weight if weight != 1 else loss).backward()
        total += weight * float(loss.detach())
    return total


def _in_step(
    shares: Sequence[Sequence[list[Example]]], filler: Example, processes: Processes
) -> list[tuple[list[Example], int]]:
    """This process's runs of rows, each with weight 1.

    A sharded decoder's layers are gathered by all processes together, so there all make as many passes: who
    has fewer runs adds some of one row, with weight 0.
    """
    own = [(run, 1) for run in shares[processes.index]]
    if not processes.sharded:
        return own
    return own + [([filler], 0)] * (max(map(len, shares)) - len(own))


@torch.no_grad()
def mean_answer_loss(
    model: Callable[..., Any],
    examples: Sequence[Example],
    *,
    device: torch.device,
    max_tokens: int = 2048,
    features: Mapping[PictureFile, Tensor] | None = None,
    progress: Callable[[int], None] = lambda rows: None,
    processes: Processes = ALONE,
    **kwargs: Any,
) -> tuple[float, int]:
    """Mean cross-entropy in nats over all labelled tokens of all rows, and how many tokens they are.

    Of several processes each computes a part; all get the whole.
    """
    total, tokens, rows = 0.0, 0, 0
    examples = sorted(examples, key=lambda e: len(e.input_ids))
    runs = list(split_by_tokens(examples, max_tokens))
    shares = [runs[index :: processes.count] for index in range(processes.count)]
    for run, weight in _in_step(shares, examples[0], processes):
        packed = pack(run).to(device)
        total += weight * float(answer_loss(model, packed, features=features, **kwargs))
        tokens += weight * packed.targets.numel()
        rows += len(run) * processes.count
        progress(min(rows, len(examples)))
    if processes.count > 1:
        summed = processes.sum(torch.tensor([total, tokens], dtype=torch.float64, device=device)).tolist()
        total, tokens = summed[0], int(summed[1])
    return total / tokens, tokens

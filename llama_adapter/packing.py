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

SHORTEST_OPENING = 16  # tokens; a shorter one is not worth a stretch of its own


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


def accumulate_gradient(
    model: Callable[..., Any],
    examples: Sequence[Example],
    *,
    device: torch.device,
    max_tokens: int,
    features: Mapping[PictureFile, Tensor] | None = None,
    **kwargs: Any,
) -> float:
    """Add the gradient of the mean loss a labelled token to the trainable parameters; returns that loss."""
    # Rows with the same opening side by side, so that they share it within a pack.
    examples = [example for group in _by_opening(examples) for example in group]
    packs = [pack(run) for run in split_by_tokens(examples, max_tokens)]
    labelled = sum(packed.targets.numel() for packed in packs)
    total = 0.0
    for packed in packs:
        loss = answer_loss(model, packed.to(device), features=features, **kwargs) / labelled
        loss.backward()
        total += float(loss.detach())
    return total


@torch.no_grad()
def mean_answer_loss(
    model: Callable[..., Any],
    examples: Sequence[Example],
    *,
    device: torch.device,
    max_tokens: int = 2048,
    features: Mapping[PictureFile, Tensor] | None = None,
    progress: Callable[[int], None] = lambda rows: None,
    **kwargs: Any,
) -> tuple[float, int]:
    """Mean cross-entropy in nats over all labelled tokens of all rows, and how many tokens they are."""
    total, tokens, rows = 0.0, 0, 0
    for run in split_by_tokens(sorted(examples, key=lambda e: len(e.input_ids)), max_tokens):
        packed = pack(run).to(device)
        total += float(answer_loss(model, packed, features=features, **kwargs))
        tokens += packed.targets.numel()
        rows += len(run)
        progress(rows)
    return total / tokens, tokens

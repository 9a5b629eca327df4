"""Packs rows of different lengths into one sequence, without padding and without rows seeing each other.

Rows that start with the same tokens (the first sentences of the template) share them. This opening is
computed once, and the rest of each row sees it as its context. The result is exact: no row's opening depends
on its rest, and the opening's gradient is the sum over its rows. A row with pictures shares its opening only
with rows of the same pictures, which have the same prompts.

Shapes: T tokens of the pack, N labelled tokens, I pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor

from llama_adapter.data.examples import IGNORED, Example
from llama_adapter.data.records import PictureFile
from llama_adapter.methods.packed_attention import Segment

SHORTEST_OPENING = 16  # tokens; it does not pay to share a shorter one


@dataclass(frozen=True)
class Pack:
    """Several rows in one sequence.

    Attributes:
        input_ids: (1, T).
        position_ids: (1, T).
        segments: which tokens each part of the sequence sees.
        predicting: (N,) indices of the tokens whose next token is labelled.
        targets: (N,) these next tokens.
        answers: (N,) for each target, the index of its example among the packed ones.
        pictures: (I,) the rows' pictures. A picture appears once for each prompt set that it belongs to.
        owners: (I,) the prompt set that each picture belongs to. The segments say which set each row reads.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    predicting: Tensor
    targets: Tensor
    answers: Tensor
    pictures: tuple[PictureFile, ...]
    owners: Tensor

    def to(self, device: torch.device) -> Pack:
        """The same pack with its tensors on another device."""
        names = ("input_ids", "position_ids", "predicting", "targets", "answers", "owners")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved)


def pack(examples: Sequence[Example]) -> Pack:
    """Put rows into one sequence, each group of rows after the opening that it shares."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predicting: list[int] = []
    targets: list[int] = []
    answers: list[int] = []

    def append(
        tokens: Sequence[int], first_position: int, context: tuple[int, int] | None, prompts: int
    ) -> int:
        start = len(ids)
        ids.extend(tokens)
        positions.extend(range(first_position, first_position + len(tokens)))
        segments.append(Segment(start, len(ids), context, prompts))
        return start

    sets: dict[tuple[PictureFile, ...], int] = {}
    for places in _by_opening(examples):
        group = [examples[place] for place in places]
        prompts = sets.setdefault(group[0].images, len(sets))
        shared = _shared_opening(group)
        context = None
        if shared:
            start = append(group[0].input_ids[:shared], 0, None, prompts)
            context = (start, start + shared)
        for place, example in zip(places, group, strict=True):
            start = append(example.input_ids[shared : _read(example)], shared, context, prompts)
            for index, label in enumerate(example.labels[shared + 1 :]):
                if label != IGNORED:
                    predicting.append(start + index)
                    targets.append(label)
                    answers.append(place)
    return Pack(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        segments=tuple(segments),
        predicting=torch.tensor(predicting),
        targets=torch.tensor(targets),
        answers=torch.tensor(answers),
        pictures=tuple(picture for pictures in sets for picture in pictures),
        owners=torch.tensor(
            [number for pictures, number in sets.items() for _ in pictures], dtype=torch.long
        ),
    )


def _by_opening(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of rows, grouped by the opening that they share. Rows with the same pictures are neighbours.

    Rows with the same question share all of it. Others share the first sentences of their template.
    """
    questions = [(e.images, tuple(e.input_ids[: _unlabelled(e)])) for e in examples]
    several = Counter(questions)
    groups: dict[tuple[PictureFile, ...], dict[tuple[int, ...], list[int]]] = {}
    for place, (images, question) in enumerate(questions):
        opening = question if several[images, question] > 1 else question[:SHORTEST_OPENING]
        groups.setdefault(images, {}).setdefault(opening, []).append(place)
    return [group for openings in groups.values() for group in openings.values()]


def sort_by_opening(examples: Sequence[Example]) -> list[Example]:
    """The same rows, those that can share an opening next to each other."""
    return [examples[place] for group in _by_opening(examples) for place in group]


def _unlabelled(example: Example) -> int:
    """The number of tokens before the first answer."""
    return sum(1 for _ in takewhile(lambda label: label == IGNORED, example.labels))


def _read(example: Example) -> int:
    """The number of tokens that predictions are made from. The last labelled token is never read."""
    return max(index for index, label in enumerate(example.labels) if label != IGNORED)


def _tokens(example: Example) -> int:
    """The number of tokens that a row takes in a pack.

    Its rivals share its question: only their answers count.
    """
    return _read(example) + sum(_read(rival) + 1 - _unlabelled(rival) for rival in example.rivals)


def _shared_opening(group: Sequence[Example]) -> int:
    """How many leading tokens all rows share. Each row keeps its first prediction to itself."""
    if len(group) == 1:
        return 0
    columns = zip(*(example.input_ids for example in group), strict=False)
    equal = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    shared = min(equal, min(map(_unlabelled, group)) - 1)
    return shared if shared >= SHORTEST_OPENING else 0


def split_by_tokens(examples: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Split rows into consecutive groups of at most ``max_tokens`` tokens; a longer row stands alone."""
    run: list[Example] = []
    tokens = 0
    for example in examples:
        own = _tokens(example)
        if run and tokens + own > max_tokens:
            yield run
            run, tokens = [], 0
        run.append(example)
        tokens += own
    if run:
        yield run


def deal(examples: Sequence[Example], processes: int) -> list[list[Example]]:
    """Share rows out to processes so that all get about equally many tokens.

    Rows are dealt from the longest to the shortest, each to the process that has the fewest tokens so far.
    Every process computes the same shares, so nothing has to be sent.
    """
    if processes == 1:
        return [list(examples)]
    shares: list[list[Example]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    for example in sorted(examples, key=_tokens, reverse=True):
        least = tokens.index(min(tokens))
        shares[least].append(example)
        tokens[least] += _tokens(example)
    return shares

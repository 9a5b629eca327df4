"""A linear classifier from a question's words, and its picture, to one of the answers of other rows.

People answer a question about a photo in many ways: "what is on the desk?" has nearly as many answers as
desks. What such a classifier holds most likely after all other rows is an answer without that noise, to learn
from (knowledge distillation, Hinton et al. 2015, arXiv 1503.02531, with the most likely answer alone, as in
Kim and Rush 2016, arXiv 1606.07947, section 3.2). It is the usual baseline of visual question answering
besides (Zhou et al. 2015, arXiv 1512.02167).

Shapes: N rows, V words and phrases, A answers, F features of a picture, C components of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_adapter.data import PictureFile
from llama_adapter.errors import UsageError
from llama_adapter.scoring import question_type

_WORD = re.compile(r"\w+")
_LONGEST_PHRASE = 3
_LEAST_ROWS = 2  # of a phrase: what one row has tells nothing of others
_MOST_PHRASES = 20_000  # with as many answers as below: a gigabyte, with the optimiser's moments
_MOST_ANSWERS = 3000  # as is usual for VQA v2
_COMPONENTS = 64
_PICTURE_SCALE = 0.05  # of a component beside the words, which have length 1 together
_CONSTANT = 0.05  # little: it is for questions of which nothing is known
_EPOCHS, _BATCH_SIZE, _LEARNING_RATE = 8, 256, 0.03


@dataclass(frozen=True)
class QuestionRow:
    """A question with its answer; `picture` is None where it has none."""

    question: str
    answer: str
    picture: Path | None = None

    @cached_property  # each is asked for in every pass of every fit
    def phrases(self) -> list[str]:
        """The question's words, and runs of two and three of them, its beginning and end marked."""
        words = ["<", *_WORD.findall(self.question.lower()), ">"]
        return words[1:-1] + [
            " ".join(words[start : start + length])
            for length in range(2, _LONGEST_PHRASE + 1)
            for start in range(len(words) - length + 1)
        ]

    @cached_property
    def type(self) -> str:
        """What kind of answer the question wants; never "yes/no", which would tell it."""
        return question_type(self.question, "")


class Teacher:
    """The classifier, fitted to rows: softmax regression on words and phrases of up to three words, and on
    the picture's components, which weigh differently by the type of the question.

    It knows the 20,000 most frequent phrases and gives one of the 3,000 most frequent answers; a question
    of which it knows nothing gets the most frequent answer of all.

    Args:
        rows: what to fit to.
        components: (C,) of each picture that rows here or in `answers` name (`principal_components`); may
            be empty, and a picture that has none in it counts as none.
        seed: of the order of the rows.

    Raises UsageError when there are no rows.
    """

    def __init__(
        self, rows: Sequence[QuestionRow], components: Mapping[PictureFile, Tensor], *, seed: int = 0
    ) -> None:
        if not rows:
            raise UsageError("there are no rows to fit a classifier to")
        self._components = components
        self._width = next((len(value) for value in components.values()), 0)
        self._types = sorted({row.type for row in rows})
        held = Counter(phrase for row in rows for phrase in set(row.phrases))
        known = [phrase for phrase, count in held.most_common(_MOST_PHRASES) if count >= _LEAST_ROWS]
        self._places = {phrase: place for place, phrase in enumerate(known)}
        self._answers = [
            answer for answer, _ in Counter(row.answer for row in rows).most_common(_MOST_ANSWERS)
        ]
        number = {answer: place for place, answer in enumerate(self._answers)}
        rows = [row for row in rows if row.answer in number]

        inputs = len(known) + len(self._types) * self._width + 1
        self._weights = torch.zeros(inputs, len(self._answers), requires_grad=True)
        optimizer = torch.optim.Adam([self._weights], lr=_LEARNING_RATE)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(_EPOCHS):
            for batch in torch.randperm(len(rows), generator=generator).split(_BATCH_SIZE):
                shown = [rows[place] for place in batch.tolist()]
                wanted = torch.tensor([number[row.answer] for row in shown])
                optimizer.zero_grad()
                F.cross_entropy(self._inputs(shown) @ self._weights, wanted).backward()
                optimizer.step()

    @torch.no_grad()
    def answers(self, rows: Sequence[QuestionRow]) -> list[str]:
        """The most likely answer to each row's question; its own is not looked at."""
        found: list[str] = []
        for start in range(0, len(rows), _BATCH_SIZE):
            scores = self._inputs(rows[start : start + _BATCH_SIZE]) @ self._weights
            found += [self._answers[place] for place in scores.argmax(1).tolist()]
        return found

    def _inputs(self, rows: Sequence[QuestionRow]) -> Tensor:
        """(N, V + types * C + 1): words and phrases, at length 1 together; components; a constant."""
        words = torch.zeros(len(rows), len(self._places))
        pictures = torch.zeros(len(rows), len(self._types), self._width)
        for number, row in enumerate(rows):
            for phrase in row.phrases:
                if (place := self._places.get(phrase)) is not None:
                    words[number, place] = 1
            own = None if row.picture is None else self._components.get(row.picture)
            if own is not None and row.type in self._types:
                pictures[number, self._types.index(row.type)] = own
        constant = torch.full((len(rows), 1), _CONSTANT)
        return torch.cat([F.normalize(words), _PICTURE_SCALE * pictures.flatten(1), constant], 1)


def answers_from_other_rows(
    rows: Sequence[QuestionRow],
    components: Mapping[PictureFile, Tensor],
    *,
    folds: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The answer to each row by a `Teacher` that has seen neither the row nor its picture.

    The pictures (of rows without one, the questions) are dealt into `folds` parts by `seed`; each part is
    answered by what is fitted to the others.

    Raises UsageError for folds below 2 or more than there are pictures.
    """
    groups = [row.question if row.picture is None else row.picture for row in rows]
    distinct = list(dict.fromkeys(groups))
    if not 2 <= folds <= len(distinct):
        raise UsageError(f"{len(distinct)} pictures or questions cannot be dealt into {folds} parts")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    part = {distinct[place]: number % folds for number, place in enumerate(order)}
    answers = [""] * len(rows)
    done = 0
    for fold in range(folds):
        here = [number for number, group in enumerate(groups) if part[group] == fold]
        others = [row for row, group in zip(rows, groups, strict=True) if part[group] != fold]
        found = Teacher(others, components, seed=seed).answers([rows[number] for number in here])
        for number, answer in zip(here, found, strict=True):
            answers[number] = answer
        progress(done := done + len(here))
    return answers


def principal_components(features: Mapping[PictureFile, Tensor]) -> dict[PictureFile, Tensor]:
    """(C,) of each picture's (F,) features, C at most 64, each of variance 1 over the pictures.

    Features that are the same in all pictures, and a single picture, have no components: C is 0 then.
    """
    if not features:
        return {}
    stacked = torch.stack([value.float() for value in features.values()])
    stacked = (stacked - stacked.mean(0)) / (stacked.std(0, correction=0) + 1e-5)
    left, sizes, _ = torch.linalg.svd(stacked, full_matrices=False)
    kept = min(_COMPONENTS, int((sizes > max(1e-3, 1e-4 * float(sizes[0]))).sum()))
    return dict(zip(features, left[:, :kept] * len(features) ** 0.5, strict=True))

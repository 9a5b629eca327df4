"""A classifier of a question's words, together with its picture, that answers it as other rows were answered.

People answer a question about a photo in many ways: "what is on the desk?" has nearly as many answers as
desks. What such a classifier holds most likely after all other rows is an answer without that noise, to learn
from (knowledge distillation, Hinton et al. 2015, arXiv 1503.02531, with the most likely answer alone, as in
Kim and Rush 2016, arXiv 1606.07947, section 3.2). It is a baseline of visual question answering besides.

Shapes: N rows fitted to, M rows asked, V phrases, A answers, F features of a picture.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_adapter.data import PictureFile
from llama_adapter.errors import UsageError

_WORD = re.compile(r"\w+")
_LONGEST_PHRASE = 3
_MOST_ROWS = 20_000  # their similarities to each other take 1.6 GB, and solving for them minutes
_MOST_ANSWERS = 3000  # as is usual for VQA v2
_RIDGE = 1.0
_AT_ONCE = 1000  # rows, whose phrases are held as a dense matrix


@dataclass(frozen=True)
class QuestionRow:
    """A question with its answer; `picture` is None where it has none."""

    question: str
    answer: str
    picture: Path | None = None

    @cached_property  # each is asked for in every fit
    def phrases(self) -> tuple[str, ...]:
        """The question's distinct words, and runs of two and three of them, its beginning and end marked."""
        words = ["<", *_WORD.findall(self.question.lower()), ">"]
        runs = (
            " ".join(words[start : start + length])
            for length in range(2, _LONGEST_PHRASE + 1)
            for start in range(len(words) - length + 1)
        )
        return tuple(dict.fromkeys((*words[1:-1], *runs)))


class Teacher:
    """Kernel ridge regression (Saunders et al. 1998) to answers as one-hot vectors, the ridge 1.

    Two rows are as similar as k = (words · words') (1 + picture · picture'): `words` marks a question's
    phrases of up to three words and has length 1, `picture` is of `directions` and has length 1, or 0 where a
    row has none. So a row about a picture like this one counts more, and what a picture tells may differ by
    what is asked.

    It gives one of the 3,000 most frequent answers; a question of which it knows no word gets the most
    frequent of all. Of more than 20,000 rows it is fitted to so many, drawn by `seed`.

    Args:
        rows: what to fit to.
        pictures: (F,) of each picture that rows here or in `answers` name (`directions`); may be empty, and a
            picture that is not in it counts as none.

    Raises UsageError when there are no rows.
    """

    def __init__(
        self, rows: Sequence[QuestionRow], pictures: Mapping[PictureFile, Tensor], *, seed: int = 0
    ) -> None:
        if not rows:
            raise UsageError("there are no rows to fit a classifier to")
        if len(rows) > _MOST_ROWS:
            rows = random.Random(seed).sample(rows, _MOST_ROWS)
        self._pictures = pictures
        self._features = next((len(value) for value in pictures.values()), 0)
        known = dict.fromkeys(phrase for row in rows for phrase in row.phrases)
        self._places = {phrase: place for place, phrase in enumerate(known)}
        counts = Counter(row.answer for row in rows)
        self._answers = [answer for answer, _ in counts.most_common(_MOST_ANSWERS)]
        number = {answer: place for place, answer in enumerate(self._answers)}
        wanted = torch.zeros(len(rows), len(self._answers))
        for place, row in enumerate(rows):
            if row.answer in number:
                wanted[place, number[row.answer]] = 1

        self._words, self._seen = self._vectors(rows)
        similarity = torch.cat([self._similarity(part) for part in _parts(rows)])
        similarity.diagonal().add_(_RIDGE)
        self._weights = torch.cholesky_solve(wanted, torch.linalg.cholesky(similarity))  # (N, A)

    def answers(self, rows: Sequence[QuestionRow]) -> list[str]:
        """The most likely answer to each row's question; its own is not looked at."""
        found: list[str] = []
        for part in _parts(rows):
            scores = self._similarity(part) @ self._weights
            found += [self._answers[place] for place in scores.argmax(1).tolist()]
        return found

    def _vectors(self, rows: Sequence[QuestionRow]) -> tuple[Tensor, Tensor]:
        """Of M rows: (M, V) words, sparse, phrases that are not known left out; (M, F) pictures."""
        places = [[self._places[phrase] for phrase in row.phrases if phrase in self._places] for row in rows]
        numbers = [number for number, known in enumerate(places) for _ in known]
        values = torch.tensor([len(places[number]) ** -0.5 for number in numbers])
        indices = torch.tensor([numbers, list(chain.from_iterable(places))], dtype=torch.long)
        words = torch.sparse_coo_tensor(
            indices, values, (len(rows), len(self._places)), check_invariants=True
        )
        nothing = torch.zeros(self._features)
        pictures = [self._pictures.get(row.picture, nothing) if row.picture else nothing for row in rows]
        return words, torch.stack(pictures)

    def _similarity(self, rows: Sequence[QuestionRow]) -> Tensor:
        """(M, N) of M rows to those fitted to."""
        words, pictures = self._vectors(rows)
        alike = torch.sparse.mm(self._words, words.to_dense().t()).t()
        return alike * (1 + pictures @ self._seen.t())


def _parts(rows: Sequence[QuestionRow]) -> Iterator[Sequence[QuestionRow]]:
    for start in range(0, len(rows), _AT_ONCE):
        yield rows[start : start + _AT_ONCE]


def answers_from_other_rows(
    rows: Sequence[QuestionRow],
    pictures: Mapping[PictureFile, Tensor],
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
        found = Teacher(others, pictures, seed=seed).answers([rows[number] for number in here])
        for number, answer in zip(here, found, strict=True):
            answers[number] = answer
        progress(done := done + len(here))
    return answers


def directions(features: Mapping[PictureFile, Tensor]) -> dict[PictureFile, Tensor]:
    """(F,) of each picture's (F,) features, less their mean over the pictures, in standard deviations, at
    length 1; of zeros where all pictures are the same.
    """
    if not features:
        return {}
    stacked = torch.stack([value.float() for value in features.values()])
    stacked = (stacked - stacked.mean(0)) / (stacked.std(0, correction=0) + 1e-5)
    return dict(zip(features, F.normalize(stacked), strict=True))

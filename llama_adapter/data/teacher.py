"""A teacher: a classifier that answers a row's question, with its picture, as the other rows were answered.

People answer a question about a photo in many ways: "what is on the desk?" has nearly as many answers as
there are desks. The answer that a classifier finds most likely, given all other rows, is free of that noise,
and a better one to learn from (knowledge distillation, Hinton et al. 2015, arXiv 1503.02531; with only the
most likely answer, as in Kim and Rush 2016, arXiv 1606.07947, section 3.2). The teacher is also a baseline of
visual question answering.

Shapes: N rows it is fitted to, M rows to answer, V phrases, A answers, F features of a picture.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import PictureFile

_WORD = re.compile(r"\w+")
_LONGEST_PHRASE = 3
MOST_ROWS = 10_000  # to fit at once
_MOST_ANSWERS = 3000  # as is usual for VQA v2
_RIDGE = 2.0
_AT_ONCE = 1000  # rows whose phrases are held as a dense matrix


@dataclass(frozen=True)
class QuestionRow:
    """A question with its answer. `picture` is None if it has none."""

    question: str
    answer: str
    picture: Path | None = None

    @cached_property  # every fit needs it
    def phrases(self) -> tuple[str, ...]:
        """The question's different words, and its runs of two and three, with its start and end marked."""
        words = ["<", *_WORD.findall(self.question.lower()), ">"]
        runs = (
            " ".join(words[start : start + length])
            for length in range(2, _LONGEST_PHRASE + 1)
            for start in range(len(words) - length + 1)
        )
        return tuple(dict.fromkeys((*words[1:-1], *runs)))


class Teacher:
    """Kernel ridge regression (Saunders et al. 1998) to answers as one-hot vectors, with a ridge of 2.

    The similarity of two rows is k = (words · words') (1 + picture · picture'). `words` marks which phrases
    of up to three words a question has, and has length 1. `picture` comes from `directions`; it has length 1,
    or 0 if a row has no picture. So rows with a similar picture count more, and what a picture tells may
    depend on the question.

    The teacher answers with one of the 3,000 most frequent answers. For a question without a known word this
    is the most frequent one. Memory grows with N^2 and time with N^3: some gigabytes and minutes for
    `MOST_ROWS` rows.

    Args:
        rows: the rows to fit.
        pictures: (F,) for each picture that rows name, here or in `answers` (see `directions`). It may be
            empty; a row whose picture is not in it counts as one without a picture.

    Attributes:
        known_answers: the A answers that it chooses from.
        weights: (N, A) of the fit. Similarities to the rows, times these, give the scores of the answers.

    Raises UsageError if there are no rows.
    """

    def __init__(self, rows: Sequence[QuestionRow], pictures: Mapping[PictureFile, Tensor]) -> None:
        if not rows:
            raise UsageError("there are no rows to fit a classifier to")
        self._pictures = pictures
        self._features = next((len(value) for value in pictures.values()), 0)
        known = dict.fromkeys(phrase for row in rows for phrase in row.phrases)
        self._places = {phrase: place for place, phrase in enumerate(known)}
        counts = Counter(row.answer for row in rows)
        self.known_answers = [answer for answer, _ in counts.most_common(_MOST_ANSWERS)]
        number = {answer: place for place, answer in enumerate(self.known_answers)}
        wanted = torch.zeros(len(rows), len(self.known_answers), dtype=torch.double)
        for place, row in enumerate(rows):
            if row.answer in number:
                wanted[place, number[row.answer]] = 1

        self._words, self._seen = self._vectors(rows)
        similarity = torch.cat([self.similarity(part) for part in _parts(rows)])
        similarity.diagonal().add_(_RIDGE)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(similarity))  # (N, N)
        self.weights = self._inverse @ wanted  # (N, A)

    def answers(self, rows: Sequence[QuestionRow]) -> list[str]:
        """The most likely answer to each row's question. The row's own answer is not used."""
        found: list[str] = []
        for part in _parts(rows):
            found += self._most_likely(self.similarity(part) @ self.weights)
        return found

    def answers_without(
        self, rows: Sequence[QuestionRow], left_out: Sequence[Sequence[int]]
    ) -> Iterator[str]:
        """The answers of teachers fitted to all rows except some: for each row, `left_out` lists their
        numbers.

        They follow from the fit to all rows. Let H be the inverse of the similarity matrix with its ridge,
        W = H y the weights, and g the rows left out. The new weights are W - H_g (H_gg)^-1 W_g (the inverse
        of a block matrix).
        """
        groups = iter(left_out)
        for part in _parts(rows):
            similarity = self.similarity(part)
            scores = similarity @ self.weights
            for similar, score, group in zip(similarity, scores, groups, strict=False):  # groups has more
                gone = torch.tensor(group)
                inverse = self._inverse[gone]
                weights = torch.linalg.solve(inverse[:, gone], self.weights[gone])
                score -= (inverse @ similar) @ weights
            yield from self._most_likely(scores)

    def _most_likely(self, scores: Tensor) -> list[str]:
        # Rounded, so that among equally likely answers the most frequent wins: it comes first.
        return [self.known_answers[place] for place in scores.round(decimals=6).argmax(1).tolist()]

    def _vectors(self, rows: Sequence[QuestionRow]) -> tuple[Tensor, Tensor]:
        """Vectors of M rows: words (M, V), sparse, unknown phrases left out, and pictures (M, F)."""
        places = [[self._places[phrase] for phrase in row.phrases if phrase in self._places] for row in rows]
        numbers = [number for number, known in enumerate(places) for _ in known]
        values = torch.tensor([len(places[number]) ** -0.5 for number in numbers], dtype=torch.double)
        indices = torch.tensor([numbers, list(chain.from_iterable(places))], dtype=torch.long)
        words = torch.sparse_coo_tensor(
            indices, values, (len(rows), len(self._places)), check_invariants=True
        )
        nothing = torch.zeros(self._features, dtype=torch.double)
        pictures = [self._pictures.get(row.picture, nothing) if row.picture else nothing for row in rows]
        return words, torch.stack(pictures)

    def similarity(self, rows: Sequence[QuestionRow]) -> Tensor:
        """Similarity (M, N) of M rows to the rows of the fit."""
        words, pictures = self._vectors(rows)
        alike = torch.sparse.mm(self._words, words.to_dense().t()).t()
        return alike * (1 + pictures @ self._seen.t())


def _parts(rows: Sequence[QuestionRow]) -> Iterator[Sequence[QuestionRow]]:
    for start in range(0, len(rows), _AT_ONCE):
        yield rows[start : start + _AT_ONCE]


def answer_from_other_rows(
    rows: Sequence[QuestionRow],
    pictures: Mapping[PictureFile, Tensor],
    *,
    kept_back: Sequence[QuestionRow] = (),
    more_pictures: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[QuestionRow], list[QuestionRow], list[QuestionRow]]:
    """Answer rows with a `Teacher` that has not seen them: returns three lists.

    - `rows`, answered by a teacher that has seen neither the row nor its picture;
    - each question about a picture, asked about `more_pictures` other pictures of `rows`, chosen at random,
      and answered by a teacher that has seen neither picture;
    - `kept_back`, answered by a teacher that has seen none of them.

    For a row without a picture, the teacher has not seen its question. With many rows, groups of about
    `MOST_ROWS` are fitted separately, and the first group answers `kept_back`.

    Raises UsageError for fewer than two pictures or questions, or fewer than `more_pictures` + 2 pictures.
    """
    groups: dict[str | Path, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(_subject(row), []).append(number)
    if len(groups) < 2:
        raise UsageError(
            f"{len(groups)} pictures or questions; expected 2 or more: none is answered by itself. Give more "
            "rows as --data, or a smaller --validation-rows"
        )
    draw = random.Random(0)
    dealt = list(groups)
    draw.shuffle(dealt)
    parts = min(-(-len(rows) // MOST_ROWS), len(groups) // 2)
    answered = list(rows)
    more: list[QuestionRow] = []
    theirs: list[QuestionRow] = []
    done = 0
    for part in range(parts):
        here = dealt[part::parts]
        numbers = [number for subject in here for number in groups[subject]]
        own = [rows[number] for number in numbers]
        teacher = Teacher(own, pictures)
        if part == 0:
            answers = teacher.answers(kept_back)
            theirs = [replace(row, answer=answer) for row, answer in zip(kept_back, answers, strict=True)]

        # Each row to answer, with the pictures or questions whose rows are left out of the fit.
        asked = [(row, [_subject(row)]) for row in own]
        if more_pictures:
            asked += _of_other_pictures(own, more_pictures, draw)
        places = {number: place for place, number in enumerate(numbers)}
        left_out = [
            [places[number] for subject in subjects for number in groups[subject]] for _, subjects in asked
        ]
        given: list[QuestionRow] = []
        questions = [row for row, _ in asked]
        for row, answer in zip(questions, teacher.answers_without(questions, left_out), strict=True):
            given.append(replace(row, answer=answer))
            progress(done := done + 1)
        for number, row in zip(numbers, given, strict=False):
            answered[number] = row
        more += given[len(numbers) :]
    return answered, more, theirs


def _subject(row: QuestionRow) -> str | Path:
    """What a row is about: its picture, else its question.

    Rows about the same thing never answer each other.
    """
    return row.question if row.picture is None else row.picture


def _of_other_pictures(
    rows: Sequence[QuestionRow], count: int, draw: random.Random
) -> list[tuple[QuestionRow, list[str | Path]]]:
    """Each row about a picture, asked about `count` other pictures; with both pictures."""
    seen = list(dict.fromkeys(row.picture for row in rows if row.picture is not None))
    if len(seen) < count + 2:
        raise UsageError(
            f"{len(seen)} pictures; expected {count + 2} or more to ask each question of {count} other "
            "pictures; give a smaller --more-pictures"
        )
    more: list[tuple[QuestionRow, list[str | Path]]] = []
    for row in rows:
        if row.picture is not None:
            # One more is drawn, since the row's own picture may be among them.
            others = [picture for picture in draw.sample(seen, count + 1) if picture != row.picture]
            more += [(replace(row, picture=other), [row.picture, other]) for other in others[:count]]
    return more


def directions(features: Mapping[PictureFile, Tensor]) -> dict[PictureFile, Tensor]:
    """Standardise each picture's features and scale them to length 1: (F,) -> (F,).

    The mean over the pictures is subtracted, and the result is divided by the standard deviation. All zeros
    if all pictures are the same.
    """
    if not features:
        return {}
    stacked = torch.stack([value.double() for value in features.values()])
    stacked = (stacked - stacked.mean(0)) / (stacked.std(0, correction=0) + 1e-5)
    return dict(zip(features, F.normalize(stacked), strict=True))

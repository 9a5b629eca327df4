"""ScienceQA (Lu et al., arXiv 2209.09513): its problems, how they are split and shuffled, and their groups.

Whether a problem has a picture is a fact about the problem, read from its row. Whether the file of that
picture is here is another matter: it decides what a model can be shown, but never in which column a problem
counts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from llama_adapter.data.choosing import draw_groups, exchange_pictures, split_refusal
from llama_adapter.data.records import PictureFile

LETTERS = "ABCDE"  # as in the official script. No problem has more choices.


@dataclass(frozen=True)
class Problem:
    """One question of ScienceQA.

    Attributes:
        pid: its id. In the hub's copy, its number within the split, from 1.
        answer: index of the right choice.
        hint: its context in words; "" if it has none, None if that is unknown.
        image: its picture, or None if it has none or the file is not here. Problems that share a picture have
            the same value.
        has_image: whether it has a picture, here or not; None if its row does not say.
        caption: a machine's caption of its picture, or "".
        subject, grade: as in the files, such as "natural science" and "grade2"; None if unknown.
    """

    pid: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str | None = None
    image: PictureFile | None = None
    caption: str = ""
    subject: str | None = None
    grade: str | None = None
    lecture: str = ""
    solution: str = ""
    # Left out of the repr. The fingerprint of the data is made from it, and has to stay the same for runs
    # that are resumed and results that are continued.
    has_image: bool | None = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if self.image is not None:
            object.__setattr__(self, "has_image", True)


# --- choosing -----------------------------------------------------------------------------------------------


def split_problems(
    problems: Sequence[Problem], *, validation_rows: int, seed: int = 0
) -> tuple[list[Problem], list[Problem]]:
    """Split off problems to validate on, with and without pictures in proportion. Both keep their order.

    Problems with the same picture stay together. Those with the same question need not: the official splits
    were drawn at random, so a test problem's question often occurs in training.

    Raises:
        UsageError: one of the two parts would be empty.
    """
    kept = _kept_back(problems, validation_rows, seed)
    if not 0 < len(kept) < len(problems):
        raise split_refusal(
            f"{len(problems):,} problems",
            "problems",
            len(problems),
            validation_rows,
            lambda count: _kept_back(problems, count, seed),
        )
    return [p for p in problems if p.pid not in kept], [p for p in problems if p.pid in kept]


def _kept_back(problems: Sequence[Problem], validation_rows: int, seed: int) -> set[str]:
    """The pids of the problems to validate on: about ``validation_rows``, never more."""
    kept: set[str] = set()
    with_picture = [problem for problem in problems if problem.image is not None]
    share = len(with_picture) / max(1, len(problems))
    for part, count in (
        (with_picture, round(validation_rows * share)),
        ([problem for problem in problems if problem.image is None], round(validation_rows * (1 - share))),
    ):
        groups: dict[object, list[str]] = {}
        for problem in part:
            groups.setdefault(problem.image or problem.pid, []).append(problem.pid)
        kept.update(draw_groups(groups.values(), count, seed=seed))
    return kept


def shuffle_choices(problem: Problem, *, seed: int) -> Problem:
    """The problem with its choices in another order, given by the seed and its id. The answer is adjusted."""
    order = list(range(len(problem.choices)))
    random.Random(f"{seed}/{problem.pid}").shuffle(order)
    return replace(
        problem,
        choices=tuple(problem.choices[place] for place in order),
        answer=order.index(problem.answer),
    )


def rotate_choices(problem: Problem, places: int) -> Problem:
    """The problem with its first choices moved behind the others, so many of them. The answer is adjusted."""
    choices = problem.choices[places:] + problem.choices[:places]
    return replace(problem, choices=choices, answer=(problem.answer - places) % len(choices))


def shuffle_pictures(problems: Sequence[Problem], *, seed: int) -> list[Problem]:
    """The problems with each other's pictures. Those without a picture still have none.

    Raises UsageError unless there are two different pictures.
    """
    other = exchange_pictures((p.image for p in problems if p.image is not None), seed=seed)
    return [p if p.image is None else replace(p, image=other[p.image]) for p in problems]


# --- groups of the table ------------------------------------------------------------------------------------

SUBJECTS: Mapping[str, str] = {
    "NAT": "natural science",
    "SOC": "social science",
    "LAN": "language science",
}
GROUPS = (*SUBJECTS, "TXT", "IMG", "NO", "G1-6", "G7-12", "AVG")  # the paper's columns, table 3


def groups_of(problem: Problem) -> set[str]:
    """The columns of the table in which a problem counts. If fields are unknown, it may be AVG only.

    As in the official evaluate_acc.py: TXT for a hint, IMG for a picture (both may apply), NO for neither.
    Whether the picture's file is here does not matter.
    """
    found = {"AVG"}
    found |= {name for name, subject in SUBJECTS.items() if problem.subject == subject}
    if problem.hint:
        found.add("TXT")
    if problem.has_image:
        found.add("IMG")
    if problem.hint == "" and problem.has_image is False:
        found.add("NO")
    grade = (problem.grade or "").removeprefix("grade")
    if grade.isdecimal() and 1 <= int(grade) <= 12:
        found.add("G1-6" if int(grade) <= 6 else "G7-12")
    return found

"""ScienceQA (Lu et al., arXiv 2209.09513): reads its files as problems, and writes problems as text.

The official release is a folder with problems.json, pid_splits.json, captions.json and pictures at
images/SPLIT/PID/. The hub's copy is a data set whose rows contain the pictures' bytes; its problems are
numbered from 1 within their split. Both give the same problems. A text field that is null is unknown.

Whether a problem has a picture is a fact about the problem, read from its row. Whether the file of that
picture is here is another matter: it decides what a model can be shown, but never in which column a problem
counts.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import Example, PictureFile, Record, encode_records, exchange_pictures
from llama_adapter.data.sources import read_dataset, read_rows
from llama_adapter.data.templates import Turn, check_unicode

LETTERS = "ABCDE"  # as in the official script. No problem has more choices.
DEFAULT_FORMAT = "QCM-A"
SPLITS = ("train", "val", "test")

_INPUTS = {
    "CQM": "Context: {context}\nQuestion: {question}\nOptions: {choices}\n",
    "QCM": "Question: {question}\nContext: {context}\nOptions: {choices}\n",
    "QCML": "Question: {question}\nContext: {context}\nOptions: {choices}\nBECAUSE: {lecture}\n",
    "QCME": "Question: {question}\nContext: {context}\nOptions: {choices}\nBECAUSE: {solution}\n",
    "QCMLE": "Question: {question}\nContext: {context}\nOptions: {choices}\nBECAUSE: {lecture} {solution}\n",
    "QCLM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture}\nOptions: {choices}\n",
    "QCEM": "Question: {question}\nContext: {context}\nBECAUSE: {solution}\nOptions: {choices}\n",
    "QCLEM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture} {solution}\nOptions: {choices}\n",
}
# In "AL" follows the solution, in "AE" the lecture, as in the official script. "O" is ours: the option's
# text.
_OUTPUTS = {
    "A": "The answer is {letter}.",
    "AL": "The answer is {letter}. BECAUSE: {solution}",
    "AE": "The answer is {letter}. BECAUSE: {lecture}",
    "ALE": "The answer is {letter}. BECAUSE: {lecture} {solution}",
    "AEL": "The answer is {letter}. BECAUSE: {solution} {lecture}",
    "LA": "{lecture} The answer is {letter}.",
    "EA": "{solution} The answer is {letter}.",
    "LEA": "{lecture} {solution} The answer is {letter}.",
    "ELA": "{solution} {lecture} The answer is {letter}.",
    "O": "{option}",
}


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


@dataclass(frozen=True)
class ProblemsSummary:
    """A summary of the problems that were read.

    Attributes:
        with_picture: problems that have a picture, here or not.
        pictures: different pictures that are here.
        without_file: problems whose picture is not here.
        by_caption: those of `with_picture` for which only a caption shows that they have a picture.
        unknown_picture, unknown_hint, unknown_subject, unknown_grade: problems whose row does not say.
        fingerprint: shows whether data have changed.
    """

    source: str
    split: str
    rows: int
    with_picture: int
    pictures: int
    without_file: int
    by_caption: int
    unknown_picture: int
    unknown_hint: int
    unknown_subject: int
    unknown_grade: int
    fingerprint: str

    def __str__(self) -> str:
        parts = [f"{self.source}, {self.split}: {self.rows:,} problems"]
        if self.with_picture:
            parts.append(f"{self.with_picture:,} with a picture ({self.pictures:,} different ones here)")
        if self.by_caption:
            parts.append(f"{self.by_caption:,} of them known by their caption alone")
        if self.without_file:
            parts.append(f"{self.without_file:,} whose picture is not here (shown as text)")
        for what in ("picture", "hint", "subject", "grade"):
            if count := getattr(self, f"unknown_{what}"):
                parts.append(f"{what} unknown: {count:,}")
        return ", ".join(parts)


# --- reading ------------------------------------------------------------------------------------------------


def read_problems(source: str | Path, split: str) -> tuple[list[Problem], ProblemsSummary]:
    """Read the problems of a split, in the order of the files.

    Args:
        source: the official folder, a folder or file in the hub's layout, or a hub id.
        split: "train", "val" or "test".

    Raises:
        UsageError: a source of neither layout, a split that it does not have, or a wrong row, which is named.
    """
    folder = Path(source)
    official = (folder / "problems.json").is_file()
    if official:
        rows, root, captions = _official_rows(folder, split)
    elif folder.is_dir() and any(path.suffix == ".json" for path in folder.glob("pid_splits*")):
        raise UsageError(f"{folder}: there is pid_splits.json but no problems.json; get the whole release")
    else:
        if folder.suffix in (".json", ".jsonl"):
            data = [row for _, row in read_rows(folder).rows]
        else:
            data = read_dataset(source, "validation" if split == "val" else split)
        rows = [(str(number), row) for number, row in enumerate(data, start=1)]
        root, captions = folder if folder.is_dir() else folder.parent, {}
    if not rows:
        raise UsageError(f"{source}: no problem in its split {split!r}")
    problems = []
    same: dict[str, PictureFile] = {}
    by_caption = 0
    digest = hashlib.sha256()
    for pid, row in rows:
        caption = captions.get(pid, "")
        try:
            if not isinstance(row, dict):
                raise UsageError(f"expected an object, found {type(row).__name__}")
            has_image = _has_image(row)
            # If the pictures were removed from the data, a caption may be the only sign of one.
            only_caption = bool(caption) and not has_image and row.get("has_image") is None
            splits = (str(row.get("split") or split), split)
            folders = [root / name / pid for name in splits] if official else [root]
            image = _picture(row, folders, same)
            problem = _problem(pid, row, image, True if only_caption else has_image, caption)
        except UsageError as error:
            raise UsageError(f"{source}: problem {pid}: {error}") from None
        by_caption += only_caption
        problems.append(problem)
        digest.update(repr(replace(problem, image=None)).encode("utf-8", "surrogatepass"))
    for content in same:
        digest.update(content.encode())
    return problems, ProblemsSummary(
        source=str(source),
        split=split,
        rows=len(problems),
        with_picture=sum(problem.has_image is True for problem in problems),
        pictures=len({problem.image for problem in problems} - {None}),
        without_file=sum(problem.has_image is True and problem.image is None for problem in problems),
        by_caption=by_caption,
        unknown_picture=sum(problem.has_image is None for problem in problems),
        unknown_hint=sum(problem.hint is None for problem in problems),
        unknown_subject=sum(problem.subject is None for problem in problems),
        unknown_grade=sum(problem.grade is None for problem in problems),
        fingerprint=digest.hexdigest(),
    )


def _official_rows(folder: Path, split: str) -> tuple[list[tuple[str, Any]], Path, dict[str, str]]:
    problems = _read_object(folder / "problems.json")
    splits_file = folder / "pid_splits.json"
    if splits_file.is_file():
        splits = _read_object(splits_file)
    else:  # a folder with a single split may have no such file
        splits = {}
        for pid, row in problems.items():
            splits.setdefault(str(row.get("split") if isinstance(row, dict) else None), []).append(pid)
    if not isinstance(splits.get(split), list):
        there = ", ".join(sorted(str(name) for name in splits)) or "none"
        raise UsageError(f"{folder} has no split {split!r}; its splits are {there}")
    missing = [str(pid) for pid in splits[split] if str(pid) not in problems]
    if missing:
        raise UsageError(
            f"{splits_file}: problem {missing[0]} ({len(missing):,} in all) is not in problems.json"
        )
    captions: dict[str, str] = {}
    # In the official repository captions.json is one folder up.
    for path in (folder / "captions.json", folder.parent / "captions.json"):
        if path.is_file() and isinstance(found := _read_object(path).get("captions"), dict):
            captions = {str(pid): text for pid, text in found.items() if isinstance(text, str)}
            break
    root = folder / "images" if (folder / "images").is_dir() else folder
    return [(str(pid), problems[str(pid)]) for pid in splits[split]], root, captions


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected an object, found {type(found).__name__}")
    return found


def _has_image(row: dict[str, Any]) -> bool | None:
    """Whether a row says that its problem has a picture; None if it does not say.

    `image` names or holds the picture; null means none, as in the official release. Data whose pictures were
    removed may say it in `has_image` instead.
    """
    named, said = row.get("image"), row.get("has_image")
    if isinstance(named, dict):  # the hub's layout: bytes, a path or both
        named = named.get("bytes") or named.get("path")
    if said is not None and not isinstance(said, bool):
        raise UsageError(f"field 'has_image': expected true, false or null, found {said!r:.60}")
    if named and said is False:
        raise UsageError("field 'has_image' is false, but 'image' names a picture; correct one of the two")
    if named or said:
        return True
    return False if "image" in row or said is False else None


def _picture(
    row: dict[str, Any], folders: Sequence[Path], same: dict[str, PictureFile]
) -> PictureFile | None:
    """The row's picture, if it is here.

    Args:
        folders: where a file of its name may be.
        same: the pictures so far by their SHA-256, so that equal pictures become the same. New ones are
        added.
    """
    named = row.get("image")
    plain = not isinstance(named, dict)
    if isinstance(named, dict):  # the hub's layout: bytes, or the path of a file
        if content := named.get("bytes"):
            if not isinstance(content, bytes):
                raise UsageError("field 'image': expected the bytes of a picture, as in the hub's layout")
            return same.setdefault(hashlib.sha256(content).hexdigest(), content)
        named = named.get("path")
    if not named:
        return None
    if not isinstance(named, str) or (plain and Path(named).name != named):
        raise UsageError(f"field 'image': expected the name of a file, found {named!r:.60}")
    for folder in folders:
        if (path := folder / named).is_file():
            return same.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    return None


def _problem(
    pid: str, row: dict[str, Any], image: PictureFile | None, has_image: bool | None, caption: str
) -> Problem:
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise UsageError(f"field 'question': expected text, found {question!r:.60}")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise UsageError(f"field 'choices': expected a list of texts, found {choices!r:.60}")
    if not 2 <= len(choices) <= len(LETTERS):
        raise UsageError(f"field 'choices': expected 2 to {len(LETTERS)}, found {len(choices)}")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise UsageError(
            f"field 'answer': expected the number of a choice, 0 to {len(choices) - 1}, found {answer!r:.60}"
        )
    texts = {name: row.get(name) for name in ("hint", "subject", "grade", "lecture", "solution")}
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise UsageError(f"field {name!r}: expected text or null, found {text!r:.60}")
    check_unicode("".join([question, *choices, *(text or "" for text in texts.values())]))
    return Problem(
        pid=pid,
        question=question,
        choices=tuple(choices),
        answer=answer,
        hint=texts["hint"],
        image=image,
        has_image=has_image,
        caption=caption,
        subject=texts["subject"],
        grade=texts["grade"],
        lecture=texts["lecture"] or "",
        solution=texts["solution"] or "",
    )


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
        works = (n for n in range(max(1, len(problems) // 10), len(problems)))
        fits = next((n for n in works if 0 < len(_kept_back(problems, n, seed)) < len(problems)), None)
        raise UsageError(
            f"{len(problems):,} problems cannot be split into {validation_rows:,} for validation "
            "(--validation-rows) and the rest for training; "
            + (f"give --validation-rows {fits}, or more problems" if fits else "give more problems")
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
        order = list(groups.values())
        random.Random(seed).shuffle(order)
        drawn: list[str] = []
        for group in order:
            if len(drawn) + len(group) <= count:
                drawn += group
        kept.update(drawn)
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


# --- prompts ------------------------------------------------------------------------------------------------


def check_format(name: str) -> None:
    """Raise UsageError unless the format has an official name, or ends in "-O", which is ours."""
    given, _, wanted = name.partition("-")
    if given not in _INPUTS or wanted not in _OUTPUTS:
        raise UsageError(
            f"no format {name!r}; expected one of {', '.join(_INPUTS)}, then '-', then one of "
            f"{', '.join(_OUTPUTS)}, such as {DEFAULT_FORMAT} or QCM-ALE"
        )


def question_text(problem: Problem, format: str = DEFAULT_FORMAT, *, caption: bool = False) -> str:
    """The text before "Answer:", as the official create_one_example writes it.

    Args:
        caption: add the machine's caption of the picture after the hint.
    """
    check_format(format)
    context = " ".join([problem.hint or "", problem.caption if caption else ""]).strip() or "N/A"
    text = _INPUTS[format.partition("-")[0]].format(
        context=context, choices=_lettered(problem.choices), question=problem.question, **_reasons(problem)
    )
    return text.replace("  ", " ").removesuffix("\n")  # single spaces, as in the official script


def answer_text(problem: Problem, format: str = DEFAULT_FORMAT, *, choice: int | None = None) -> str:
    """The text after "Answer: ". With ``choice``, as if that were the right one."""
    check_format(format)
    choice = problem.answer if choice is None else choice
    text = _OUTPUTS[format.partition("-")[2]].format(
        letter=LETTERS[choice], option=problem.choices[choice], **_reasons(problem)
    )
    whole = f"Answer: {text}".replace("  ", " ").strip()  # single spaces, as in the official script
    return whole.removesuffix("BECAUSE:").rstrip().removeprefix("Answer:").removeprefix(" ")


def _reasons(problem: Problem) -> dict[str, str]:
    # As in the official script, a line break is written as backslash and n: a real one would end the text.
    return {name: getattr(problem, name).replace("\n", "\\n") for name in ("lecture", "solution")}


def _lettered(choices: Sequence[str]) -> str:
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def problem_records(
    problems: Sequence[Problem], format: str = DEFAULT_FORMAT, *, caption: bool = False, images: bool = True
) -> list[Record]:
    """The problems as training rows for the template "scienceqa", with or without their pictures."""
    return [
        Record(
            turns=(
                Turn("user", question_text(problem, format, caption=caption)),
                Turn("assistant", answer_text(problem, format)),
            ),
            row=number,
            images=(problem.image,) if images and problem.image is not None else (),
        )
        for number, problem in enumerate(problems, start=1)
    ]


def encode_problems(
    problems: Sequence[Problem],
    format: str = DEFAULT_FORMAT,
    *,
    caption: bool = False,
    images: bool = True,
    rivals: bool = False,
    **encoding: Any,
) -> list[Example]:
    """`problem_records` as tokens. With ``rivals``, each has the answers of its other choices as rivals.

    ``encoding``, and what is dropped: see `data.encode_records`.
    """
    how: dict[str, Any] = {"format": format, "caption": caption, "images": images}
    examples = encode_records(problem_records(problems, **how), **encoding)
    if not rivals:
        return examples
    others = [
        (row, replace(problem, answer=choice))
        for row, problem in enumerate(problems, start=1)
        for choice in range(len(problem.choices))
        if choice != problem.answer
    ]
    wrong = problem_records([problem for _, problem in others], **how)
    numbered = [replace(record, row=row) for record, (row, _) in zip(wrong, others, strict=True)]
    found: dict[int, list[Example]] = {}
    for example in encode_records(numbered, **encoding):
        found.setdefault(example.row, []).append(example)
    return [replace(example, rivals=tuple(found.get(example.row, ()))) for example in examples]


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

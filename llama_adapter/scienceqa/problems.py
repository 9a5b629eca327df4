"""ScienceQA (Lu et al., arXiv 2209.09513): files -> problems, and problems -> prompts by the official names.

The official release is a folder with problems.json, pid_splits.json, captions.json and pictures at
images/SPLIT/PID/. The hub's copy is a data set with the pictures' bytes in its rows, which are numbered from
1 within their split. Both give the same problems. A text field that is null is unknown.

Whether a problem has a picture is a fact of the problem, read from its row. Whether the file of that picture
is here is another matter: it decides what a model can be shown, never in which column a problem counts.
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

LETTERS = "ABCDE"  # the official script's, and the most choices there are
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
# "AL" has the solution and "AE" the lecture: so it is in the official script. "O" is ours: the option's text.
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
        pid: its id; in the hub's copy its number within the split, from 1.
        answer: index of the right choice.
        hint: its context in words; "" where it has none, None where that is unknown.
        image: its picture as it can be shown, or None: it has none, or its file is not here. A picture that
            several problems have is the same everywhere.
        has_image: whether it has a picture, here or not; None where its row does not say.
        caption: a machine's words for its picture, or "".
        subject, grade: as in the files, such as "natural science" and "grade2"; None where unknown.
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
    # Not in the repr, from which the fingerprint of the data is made: that has to stay the same for runs that
    # are resumed and results that are continued.
    has_image: bool | None = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if self.image is not None:
            object.__setattr__(self, "has_image", True)


@dataclass(frozen=True)
class ProblemsSummary:
    """What was found.

    Attributes:
        with_picture: problems that have a picture, here or not.
        pictures: different pictures that are here.
        without_file: problems whose picture is not here.
        by_caption: problems of `with_picture` of which only a caption says that they have one.
        unknown_picture, unknown_hint, unknown_subject, unknown_grade: problems whose row does not say.
        fingerprint: tells changed data from the same.
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
    """The problems of a split, in the order of the files.

    Args:
        source: the official folder, a folder or file of the hub's layout, or a hub id.
        split: "train", "val" or "test".

    Raises:
        UsageError: a source that is neither, a split that it lacks, or a row at fault, which is named.
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
            # Of a picture that was taken out of the data its caption may be all that is left.
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
    else:  # a folder with one split may come without
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
    # The official repository has it one folder up.
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
    """Whether a row says that its problem has a picture; None where it says neither.

    `image` names or holds the picture; null means none, as in the official release. Data from which the
    pictures were taken out may say it in `has_image` instead.
    """
    named, said = row.get("image"), row.get("has_image")
    if isinstance(named, dict):  # the hub's layout: bytes, path or both
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
    """The row's picture where it is here.

    Args:
        folders: where a file of its name may be.
        same: the pictures so far by their SHA-256, each of which is given again; grows.
    """
    named = row.get("image")
    plain = not isinstance(named, dict)
    if isinstance(named, dict):  # the hub's layout: bytes, or where they are
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
    """Problems to train on and some to validate on, with pictures as often as there; in their old order.

    Problems with the same picture fall on the same side. Those with the same question need not: the official
    splits were drawn at random, so a test problem's question is often among those trained on.

    Raises:
        UsageError: nothing would be left to train on, or nothing to validate on.
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
    """The problem with its choices in another order, drawn by the seed and its id; the answer follows."""
    order = list(range(len(problem.choices)))
    random.Random(f"{seed}/{problem.pid}").shuffle(order)
    return replace(
        problem,
        choices=tuple(problem.choices[place] for place in order),
        answer=order.index(problem.answer),
    )


def shuffle_pictures(problems: Sequence[Problem], *, seed: int) -> list[Problem]:
    """The problems with other problems' pictures; those without one stay so.

    Raises UsageError where there are not two different pictures.
    """
    other = exchange_pictures((p.image for p in problems if p.image is not None), seed=seed)
    return [p if p.image is None else replace(p, image=other[p.image]) for p in problems]


# --- prompts ------------------------------------------------------------------------------------------------


def check_format(name: str) -> None:
    """Raise UsageError for a format that is none of the official names (nor ends in our own "-O")."""
    given, _, wanted = name.partition("-")
    if given not in _INPUTS or wanted not in _OUTPUTS:
        raise UsageError(
            f"no format {name!r}; expected one of {', '.join(_INPUTS)}, then '-', then one of "
            f"{', '.join(_OUTPUTS)}, such as {DEFAULT_FORMAT} or QCM-ALE"
        )


def question_text(problem: Problem, format: str = DEFAULT_FORMAT, *, caption: bool = False) -> str:
    """What comes before "Answer:", as the official create_one_example writes it.

    Args:
        caption: put the machine's caption of the picture behind the hint.
    """
    check_format(format)
    context = " ".join([problem.hint or "", problem.caption if caption else ""]).strip() or "N/A"
    text = _INPUTS[format.partition("-")[0]].format(
        context=context, choices=_lettered(problem.choices), question=problem.question, **_reasons(problem)
    )
    return text.replace("  ", " ").removesuffix("\n")  # the official script's spaces


def answer_text(problem: Problem, format: str = DEFAULT_FORMAT, *, choice: int | None = None) -> str:
    """What follows "Answer: "; ``choice``: as if that were the right one."""
    check_format(format)
    choice = problem.answer if choice is None else choice
    text = _OUTPUTS[format.partition("-")[2]].format(
        letter=LETTERS[choice], option=problem.choices[choice], **_reasons(problem)
    )
    whole = f"Answer: {text}".replace("  ", " ").strip()  # the official script's spaces
    return whole.removesuffix("BECAUSE:").rstrip().removeprefix("Answer:").removeprefix(" ")


def _reasons(problem: Problem) -> dict[str, str]:
    # As in the official script, a line break becomes the two characters of its escape: it would end the text.
    return {name: getattr(problem, name).replace("\n", "\\n") for name in ("lecture", "solution")}


def _lettered(choices: Sequence[str]) -> str:
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def problem_records(
    problems: Sequence[Problem], format: str = DEFAULT_FORMAT, *, caption: bool = False, images: bool = True
) -> list[Record]:
    """The problems as training rows for the template "scienceqa", with their pictures or without."""
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
    """`problem_records` as tokens, ``rivals``: with the answers that the other choices would make.

    ``encoding`` and what is dropped: see `data.encode_records`.
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
    """The columns of the table that a problem counts in; one with unknown fields may count in AVG alone.

    As in the official evaluate_acc.py: TXT has a hint, IMG a picture (both may hold), NO neither. Whether the
    picture's file is here plays no part.
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

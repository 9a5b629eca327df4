"""Reads the files of ScienceQA as problems.

The official release is a folder with problems.json, pid_splits.json, captions.json and pictures at
images/SPLIT/PID/. The hub's copy is a data set whose rows contain the pictures' bytes; its problems are
numbered from 1 within their split. Both give the same problems. A text field that is null is unknown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import PictureFile
from llama_adapter.data.sources import read_dataset, read_rows
from llama_adapter.data.templates import check_unicode
from llama_adapter.scienceqa.problems import LETTERS, Problem


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

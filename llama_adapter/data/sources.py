"""Files, folders and data sets -> rows: plain dicts, each with its number.

They come as a JSON list, as JSONL, as Parquet or Arrow, from a folder that `datasets` saved, from a folder of
pictures with captions.json or qa.json beside its images/, from the package easy-vqa, or from the hub.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.common.errors import UsageError

EASY_VQA = "easy-vqa"  # the source that stands for the package's data
_PICTURE_FILES = ("captions.json", "qa.json")  # in a folder, beside images/
_DATASET_FILES = {".parquet": "parquet", ".arrow": "arrow"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Rows:
    """What a source holds.

    Attributes:
        rows: each with its number in the source, from 1 (in JSONL: the line).
        root: where relative names of pictures start.
        fingerprint: SHA-256 of the file's bytes, or of the rows where there is no one file.
    """

    rows: list[tuple[int, Any]]
    root: Path
    fingerprint: str


def read_rows(source: str | Path) -> Rows:
    """The rows of a source. Raises UsageError for one that is missing, damaged or of no known kind."""
    if str(source) == EASY_VQA:
        return _easy_vqa_rows()
    path = Path(source)
    root = path.parent
    if path.is_dir():
        root = path
        named = [path / name for name in _PICTURE_FILES if (path / name).is_file()]
        if named and (path / "images").is_dir():
            root = path / "images"
            if len(named) > 1:
                raise UsageError(
                    f"{path} holds {' and '.join(file.name for file in named)}; name one of them, with "
                    f"--image-root {root}"
                )
            path = named[0]
    if path.exists() and not path.is_dir() and path.suffix not in _DATASET_FILES:
        content = _read_bytes(path)
        return Rows(_json_rows(content, path), root, hashlib.sha256(content).hexdigest())
    rows = read_dataset(source)
    return Rows(list(enumerate(rows, start=1)), root, _fingerprint(rows))


def _easy_vqa_rows() -> Rows:
    """Questions about pictures of one shape (github.com/vzhou842/easy-VQA), of both splits."""
    try:
        import easy_vqa
    except ImportError:
        raise UsageError("the data set easy-vqa is a package: pip install easy-vqa") from None
    rows: list[dict[str, str]] = []
    for split, questions, paths in (
        ("train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        ("test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    ):
        for question, answer, image in zip(*questions, strict=True):
            rows.append({"image": paths[image], "question": question, "answer": answer, "split": split})
    fingerprint = _fingerprint({**row, "image": Path(row["image"]).name} for row in rows)  # on any machine
    return Rows(list(enumerate(rows, start=1)), Path(), fingerprint)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


def _json_rows(content: bytes, path: Path) -> list[tuple[int, Any]]:
    """The rows of a JSON list, or of JSONL with one object a line, with their numbers."""
    try:
        text = content.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start + 1:,}); save it as UTF-8") from None
    if not text.strip():
        raise UsageError(f"{path}: the file is empty; expected a JSON list of rows, or one row a line")
    if text.lstrip().startswith("["):
        rows = _parse(text, f"{path}")
        return list(enumerate(rows, start=1))
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    lines = enumerate(text.split("\n"), start=1)
    return [(number, _parse(line, f"{path}: line {number}")) for number, line in lines if line.strip()]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut_off = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        fault = "it breaks off" if cut_off else f"{error.msg} at character {error.pos + 1:,}"
        expected = "expected a list of rows, or one row a line"
        raise UsageError(f"{where}: not valid JSON: {fault}; {expected}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; a thousand brackets
        raise UsageError(f"{where}: not readable JSON: {error}") from None


def read_dataset(source: str | Path, split: str = "train") -> list[Any]:
    """Rows through `datasets`: a Parquet or Arrow file, a saved folder, a folder of files, or a hub id.

    A single file is one split, whatever its name. Raises UsageError where it cannot be read.
    """
    path = Path(source)
    names_a_file = path.suffix in (".json", ".jsonl", *_DATASET_FILES) or not _HUB_ID.fullmatch(str(source))
    if not str(source) or (names_a_file and not path.exists()):
        raise UsageError(f"{source or repr(source)}: no such file or folder")
    import datasets  # slow to import, and most data are plain files

    try:
        if path.is_file():
            data = datasets.load_dataset(_DATASET_FILES[path.suffix], data_files=str(path), split="train")
        elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            data = datasets.load_from_disk(str(path))
            if isinstance(data, datasets.DatasetDict):
                if split not in data:
                    raise ValueError(f"its splits are {', '.join(data)}; expected one named {split}")
                data = data[split]
        else:
            data = datasets.load_dataset(str(source), split=split)
        rows: list[Any] = data.with_format("arrow")[:].to_pylist()  # pictures stay bytes
    except Exception as error:  # whatever its readers and the network raise
        fault = "cannot be read as a data set" if path.exists() else "neither here nor read from the hub"
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"{source}: {fault}: {reason}") from None
    return rows


def _fingerprint(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return digest.hexdigest()

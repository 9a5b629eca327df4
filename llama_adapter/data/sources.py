"""Files, folders and data sets -> rows: plain dicts, each with its number.

A source can be a file (a JSON list, JSONL, CSV, Parquet or Arrow), a folder that `datasets` saved, a folder
of pictures (captions.json or qa.json beside images/, or the hub's metadata.jsonl or metadata.csv), the
package easy-vqa, a data set on the hub, or made here: pictures that are drawn (`data.drawings`), questions
about the objects in photos (`data.objects`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.common.errors import UsageError
from llama_adapter.data.drawings import drawing_rows, is_drawings
from llama_adapter.data.objects import OBJECTS, object_rows
from llama_adapter.data.row_pictures import FILE_COLUMNS

EASY_VQA = "easy-vqa"  # the name for the data of that package
_PICTURE_FILES = ("captions.json", "qa.json")  # in a folder, beside images/
_METADATA_FILES = ("metadata.jsonl", "metadata.csv")  # in a folder from the hub, or in its folders of splits
_DATASET_FILES = {".parquet": "parquet", ".arrow": "arrow"}
_TABLES = {".csv": ",", ".tsv": "\t"}
_SPLITS = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Rows:
    """The rows of a source.

    Attributes:
        rows: each with its number in the source, from 1 (in JSONL: the line).
        root: the folder that relative names of pictures start from.
        fingerprint: SHA-256 of the file's bytes, or of the rows if there is no single file.
    """

    rows: list[tuple[int, Any]]
    root: Path
    fingerprint: str


def canonical_split(name: str) -> str:
    """A split's name in this library's spelling: train, val, test, or any other name unchanged."""
    return _SPLITS.get(name.strip().lower(), name.strip().lower())


def source_name(source: str | Path) -> str:
    """What a source goes by: the last part of where it is, as "coco" or "objects:coco"."""
    prefix = f"{OBJECTS}:" if str(source).startswith(f"{OBJECTS}:") else ""
    return prefix + Path(str(source).removeprefix(prefix)).name


def read_rows(source: str | Path, split: str | None = None) -> Rows:
    """Read the rows of a source.

    Args:
        split: which split of a data set to read; None reads train. It does not apply to a file whose rows
            name their split themselves.

    Raises:
        UsageError: a source that is missing, damaged, of no known kind, or without that split.
    """
    if str(source) == EASY_VQA:
        return _easy_vqa_rows()
    if is_drawings(source):
        drawn, fingerprint = drawing_rows(str(source), split)
        return Rows(list(enumerate(drawn, start=1)), Path(), fingerprint)
    if str(source).startswith(f"{OBJECTS}:"):
        return _object_rows(str(source), split)
    path = Path(source)
    root = path.parent
    if path.is_dir():
        root = path
        if tables := _metadata_files(path):
            return _metadata_rows(path, tables)
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
        return Rows(_text_rows(content, path), root, hashlib.sha256(content).hexdigest())
    rows = read_dataset(source, split or "train")
    return Rows(list(enumerate(rows, start=1)), root, _fingerprint(rows))


def _metadata_files(folder: Path) -> dict[str | None, Path]:
    """The hub's tables of a folder of pictures, by the split whose folder holds them (None: no split)."""
    places: dict[str | None, Path] = {None: folder}
    places |= {place.name: place for place in sorted(folder.iterdir()) if place.is_dir()}
    tables: dict[str | None, Path] = {}
    for split, place in places.items():
        found = [place / name for name in _METADATA_FILES if (place / name).is_file()]
        if len(found) > 1:
            raise UsageError(f"{place} holds {' and '.join(file.name for file in found)}; keep one of them")
        if found:
            tables[split] = found[0]
    return tables


def _metadata_rows(folder: Path, tables: dict[str | None, Path]) -> Rows:
    """The rows of all tables.

    Rows of a table in a split's folder get that split, and their file names become relative to `folder`.
    """
    rows: list[tuple[int, Any]] = []
    digest = hashlib.sha256()
    for split, table in tables.items():
        content = _read_bytes(table)
        digest.update(content)
        for number, row in _text_rows(content, table):
            if split is not None and isinstance(row, dict):
                files = {name: _behind(split, row[name]) for name in FILE_COLUMNS if name in row}
                row = {"split": split, **row, **files}
            rows.append((number if len(tables) == 1 else len(rows) + 1, row))
    return Rows(rows, folder, digest.hexdigest())


def _behind(folder: str, names: Any) -> Any:
    """The names of files in a folder, as seen from the folder above it."""
    if isinstance(names, list):
        return [_behind(folder, name) for name in names]
    return f"{folder}/{names}" if isinstance(names, str) and names else names


def _easy_vqa_rows() -> Rows:
    """Questions about pictures of a single shape (github.com/vzhou842/easy-VQA), both splits."""
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


def _object_rows(source: str, split: str | None) -> Rows:
    """Yes/no questions about the photos of a source; a folder's captions and its questions both count."""
    photos = source.removeprefix(f"{OBJECTS}:")
    folder = Path(photos)
    named = [folder / name for name in _PICTURE_FILES if (folder / name).is_file()]
    found = [read_rows(part, split) for part in (named if len(named) > 1 else [photos])]
    root = folder / "images" if len(named) > 1 else found[0].root
    try:
        rows = object_rows((row for part in found for row in part.rows), root)
    except UsageError as error:
        raise UsageError(f"{photos}: {error}") from None
    fingerprint = hashlib.sha256("".join(part.fingerprint for part in found).encode()).hexdigest()
    return Rows(list(enumerate(rows, start=1)), root, fingerprint)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


def _text_rows(content: bytes, path: Path) -> list[tuple[int, Any]]:
    """The rows of a CSV table, a JSON list, or JSONL (one object a line), with their numbers."""
    try:
        text = content.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start + 1:,}); save it as UTF-8") from None
    if not text.strip():
        raise UsageError(f"{path}: the file is empty; expected a JSON list of rows, or one row a line")
    if path.suffix in _TABLES:
        return _table_rows(text, path)
    if text.lstrip().startswith("["):
        rows = _parse(text, f"{path}")
        return list(enumerate(rows, start=1))
    # Not splitlines(): JSON strings may contain U+2028 and similar characters.
    lines = enumerate(text.split("\n"), start=1)
    return [(number, _parse(line, f"{path}: line {number}")) for number, line in lines if line.strip()]


def _table_rows(text: str, path: Path) -> list[tuple[int, Any]]:
    """The rows of a table whose first line names the columns. An empty cell is None."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_TABLES[path.suffix], strict=True)
    rows = []
    try:
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                wanted = len(reader.fieldnames or ())
                raise UsageError(
                    f"{path}: row {number}: expected {wanted} cells, one for each name in the first line"
                )
            rows.append((number, {name: cell or None for name, cell in row.items()}))
    except csv.Error as error:
        raise UsageError(f"{path}: row {len(rows) + 1}: not valid CSV: {error}") from None
    return rows


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut_off = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        fault = "it breaks off" if cut_off else f"{error.msg} at character {error.pos + 1:,}"
        expected = "expected a list of rows, or one row a line"
        raise UsageError(f"{where}: not valid JSON: {fault}; {expected}") from None
    except (ValueError, RecursionError) as error:  # such as a number of 5,000 digits, or a thousand brackets
        raise UsageError(f"{where}: not readable JSON: {error}") from None


def read_dataset(source: str | Path, split: str = "train") -> list[Any]:
    """Read rows with `datasets`: a Parquet or Arrow file, a saved folder, a folder of files, or a hub id.

    A single file is one split, whatever its name. Raises UsageError if it can't be read.
    """
    path = Path(source)
    names_a_file = path.suffix in (".json", ".jsonl", *_TABLES, *_DATASET_FILES)
    names_a_file |= not _HUB_ID.fullmatch(str(source))
    if not str(source) or (names_a_file and not path.exists()):
        raise UsageError(f"{source or repr(source)}: no such file or folder")
    import datasets  # slow to import, and most data are plain files

    try:
        if path.is_file():
            data = datasets.load_dataset(_DATASET_FILES[path.suffix], data_files=str(path), split="train")
        elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            data = datasets.load_from_disk(str(path))
            if isinstance(data, datasets.DatasetDict):
                data = data[_choose_split(split, data)]
        else:
            try:
                data = datasets.load_dataset(str(source), split=split)
            except ValueError:  # perhaps there is no such split
                names = datasets.get_dataset_split_names(str(source))
                data = datasets.load_dataset(str(source), split=_choose_split(split, names))
        rows: list[Any] = data.with_format("arrow")[:].to_pylist()  # keeps pictures as bytes
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    except Exception as error:  # its readers and the network raise all kinds of errors
        fault = "cannot be read as a data set" if path.exists() else "neither here nor read from the hub"
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"{source}: {fault}: {reason}") from None
    return rows


def _choose_split(wanted: str, names: Iterable[str]) -> str:
    """Find the wanted split among the names that a data set has."""
    names = list(names)
    found = [name for name in names if canonical_split(name) == canonical_split(wanted)]
    if not found:
        raise UsageError(
            f"its splits are {', '.join(names)}; expected one named {wanted} (choose by --split)"
        )
    return wanted if wanted in found else found[0]


def _fingerprint(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return digest.hexdigest()

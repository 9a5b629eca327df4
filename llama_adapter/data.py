"""Records from files and data sets -> token ids and labels.

Rows have one of three forms: Alpaca's {"instruction", "input", "output"}, chat {"messages": [{"role",
"content"}]}, or ShareGPT {"conversations": [{"from", "value"}]}; each may name its pictures in "image", as
LLaVA's files do. They come as a JSON list, as JSONL, as Parquet or Arrow, from a folder that `datasets`
saved, or from the hub.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_adapter.errors import UsageError
from llama_adapter.template import Turn, check_unicode, encode_dialogues, in_order

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that transformers' losses leave out
_ENCODED_AT_ONCE = 1000  # rows a call of the tokenizer: quick, and its by-products stay small
_DATASET_FILES = {".parquet": "parquet", ".arrow": "arrow"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}


@dataclass(frozen=True)
class Record:
    """One training row: a conversation that ends with the assistant's answer.

    `row` is where it stood in its source, from 1 (in JSONL: the line). `images` are the files of its
    pictures, not yet opened.
    """

    turns: tuple[Turn, ...]
    row: int
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class ReadSummary:
    """What reading a source came to.

    `skipped` counts the rows left out by reason. `fingerprint` is the SHA-256 of the file's bytes, or of the
    rows where there is no one file: it tells changed data from the same.
    """

    source: str
    rows: int
    skipped: Mapping[str, int]
    fingerprint: str

    def __str__(self) -> str:
        skipped = "".join(f", {count:,} skipped ({reason})" for reason, count in self.skipped.items())
        return f"{self.source}: {self.rows:,} rows{skipped}"


@dataclass(frozen=True)
class Example:
    """A record as tokens.

    `labels`, as long as `input_ids`, are the ids of the answers and their end tokens and -100 elsewhere
    (not yet shifted: transformers' losses shift).
    """

    input_ids: list[int]
    labels: list[int]
    images: tuple[Path, ...]
    row: int


def read_records(
    source: str | Path, *, image_root: str | Path | None = None
) -> tuple[list[Record], ReadSummary]:
    """Records of a file, a folder or a hub data set (its "train" split), with a summary of what was found.

    A row without an answer, without a question, or whose turns do not alternate is skipped and counted.
    `image_root` is where relative names of pictures start; by default the folder of the file. Raises
    UsageError for a source that is missing, damaged, of another shape, or has nothing in it to learn from;
    where a row is at fault it is named.
    """
    path = Path(source)
    is_file = path.exists() and not path.is_dir()
    if is_file and path.suffix not in _DATASET_FILES:
        content = _read_bytes(path)
        rows, fingerprint = _json_rows(content, path), hashlib.sha256(content).hexdigest()
    else:
        rows = list(enumerate(_dataset_rows(source, path), start=1))
        fingerprint = _rows_fingerprint(row for _, row in rows)
    root = Path(image_root) if image_root is not None else path.parent if is_file else path

    records: list[Record] = []
    skipped: Counter[str] = Counter()
    for number, row in rows:
        try:
            record = _record(row, number, root)
        except UsageError as error:
            raise UsageError(f"{source}: row {number}: {error}") from None
        if fault := _fault(record):
            skipped[fault] += 1
        else:
            records.append(record)
    summary = ReadSummary(str(source), len(rows), dict(skipped), fingerprint)
    if not records:
        raise UsageError(f"{summary}: nothing is left to learn from")
    return records, summary


# --- files -> rows ------------------------------------------------------------------------------------------


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


def _dataset_rows(source: str | Path, path: Path) -> list[Any]:
    """Rows through `datasets`: a Parquet or Arrow file, a saved folder, a folder of files, or a hub id."""
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
                if "train" not in data:
                    raise ValueError(f"its splits are {', '.join(data)}; expected one named train")
                data = data["train"]
        else:
            data = datasets.load_dataset(str(source), split="train")
        rows: list[Any] = data.with_format("arrow")[:].to_pylist()  # pictures stay bytes
    except Exception as error:  # whatever its readers and the network raise
        fault = "cannot be read as a data set" if path.exists() else "neither here nor read from the hub"
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"{source}: {fault}: {reason}") from None
    return rows


def _rows_fingerprint(rows: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


# --- rows -> records ----------------------------------------------------------------------------------------


def _record(row: Any, number: int, root: Path) -> Record:
    if not isinstance(row, dict):
        raise UsageError(f"expected an object with named fields, found {_kind(row)}")
    images = tuple(root / name for name in _image_names(row))
    if "messages" in row:
        turns = _chat_turns(row["messages"], "messages", "role", "content")
    elif "conversations" in row:
        turns = _chat_turns(row["conversations"], "conversations", "from", "value")
    elif "instruction" in row or "output" in row:
        given = "" if row.get("input") is None else _text(row, "input")
        turns = [Turn("user", _text(row, "instruction"), given), Turn("assistant", _text(row, "output"))]
    else:
        found = ", ".join(map(reprlib.repr, list(row)[:10])) or "none"
        expected = "'instruction' and 'output', or 'messages', or 'conversations'"
        raise UsageError(f"its fields are {found}; expected {expected}")
    if images:  # text rows keep it: to them it is a tag of SVG
        turns = [Turn(turn.role, turn.text.replace("<image>", "").strip(), turn.input) for turn in turns]
    while turns and turns[-1].role != "assistant":
        turns.pop()  # a last question that was never answered
    return Record(tuple(turns), number, images)


def _chat_turns(messages: Any, field: str, role_key: str, text_key: str) -> list[Turn]:
    if not isinstance(messages, list):
        raise UsageError(f"field {field!r}: expected a list of messages, found {_kind(messages)}")
    turns = []
    for number, message in enumerate(messages, start=1):
        try:
            if not isinstance(message, dict):
                raise UsageError(f"expected an object, found {_kind(message)}")
            role = _text(message, role_key)
            if role not in _ROLES:
                found = reprlib.repr(role)
                raise UsageError(f"field {role_key!r} is {found}; expected one of {', '.join(_ROLES)}")
            turns.append(Turn(_ROLES[role], _text(message, text_key)))
        except UsageError as error:
            raise UsageError(f"field {field!r}, message {number}: {error}") from None
    return turns


def _image_names(row: dict[str, Any]) -> list[str]:
    names = row.get("image")
    if names is None:
        return []
    names = names if isinstance(names, list) else [names]
    for name in names:
        if not isinstance(name, str) or not name:
            raise UsageError(f"field 'image': expected the name of a picture file, found {_kind(name)}")
    return names


def _text(row: dict[str, Any], field: str) -> str:
    if field not in row:
        raise UsageError(f"field {field!r} is missing")
    value = row[field]
    if not isinstance(value, str):
        raise UsageError(f"field {field!r}: expected text, found {_kind(value)}")
    try:
        check_unicode(value)
    except UsageError as error:
        raise UsageError(f"field {field!r}: {error}") from None
    return value


def _kind(value: Any) -> str:
    """What a value is, in JSON's words, for a person who looks at their file."""
    if value is None:
        return "null"
    if value == "":
        return "empty text"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return "an object" if isinstance(value, dict) else names.get(type(value), type(value).__name__)


def _fault(record: Record) -> str | None:
    """Why a record has nothing to teach, or None."""
    if not record.turns:
        return "no answer"
    if not in_order(record.turns):
        return "user and assistant do not alternate"
    blank = {turn.role for turn in record.turns if not (turn.text + turn.input).strip()}
    if "assistant" in blank:
        return "empty answer"
    if "user" in blank and not record.images:  # a picture alone can be the question
        return "empty question"
    return None


# --- records -> examples ------------------------------------------------------------------------------------


def split_records(
    records: Sequence[Record], *, validation_rows: int, seed: int
) -> tuple[list[Record], list[Record]]:
    """Records to train on and `validation_rows` to validate on, drawn by `seed`, both in their old order.

    Records about the same pictures, or with the same question, fall on the same side; where such groups do
    not add up to `validation_rows` there are fewer. Raises UsageError when nothing would be left on a side.
    """
    groups: dict[object, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(record.images or record.turns[:-1], []).append(index)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    validation: set[int] = set()
    for group in shuffled:
        if len(validation) + len(group) <= validation_rows:
            validation.update(group)
    if len(validation) == len(records) or (validation_rows and not validation):
        raise UsageError(
            f"{len(records):,} rows (with {len(groups):,} distinct questions) cannot be split into "
            f"{validation_rows:,} for validation and the rest for training; ask for fewer"
        )
    train = [record for index, record in enumerate(records) if index not in validation]
    return train, [records[index] for index in sorted(validation)]


def encode_records(
    records: Sequence[Record], *, template: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Example]:
    """Examples of at most `max_length` tokens, in the order of the records.

    A longer record is cut at its end, so that its answer has no end token; one that then has no answer left
    is dropped: there are fewer examples than records. Raises UsageError when none is left.
    """
    examples = []
    for start in range(0, len(records), _ENCODED_AT_ONCE):
        chunk = records[start : start + _ENCODED_AT_ONCE]
        encoded = encode_dialogues([record.turns for record in chunk], template, tokenizer)
        for record, (ids, is_answer) in zip(chunk, encoded, strict=True):
            labels = [token if kept else IGNORED for token, kept in zip(ids, is_answer, strict=True)]
            if any(is_answer[:max_length]):
                examples.append(Example(ids[:max_length], labels[:max_length], record.images, record.row))
    if not examples:
        raise UsageError(f"no answer starts within {max_length:,} tokens; allow longer rows")
    return examples

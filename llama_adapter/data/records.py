"""Rows -> records -> token ids and labels.

Rows have one of five forms: Alpaca's {"instruction", "input", "output"}, chat {"messages": [{"role",
"content"}]}, ShareGPT's {"conversations": [{"from", "value"}]}, {"image", "question", "answer"}, and
{"image", "captions"}, which makes a record of each caption. The first three may name pictures in "image" as
well, as LLaVA's files do. A row may name its "split".
"""

from __future__ import annotations

import random
import re
import reprlib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llama_adapter.common.errors import UsageError
from llama_adapter.data.sources import read_rows
from llama_adapter.data.templates import CAPTION_QUESTIONS, Turn, check_unicode, encode_dialogues, in_order

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

Pictures = TypeVar("Pictures", bound=Hashable)
PictureFile = Path | bytes  # its name, or what is in it

IGNORED = -100  # the label that transformers' losses leave out
_ENCODED_AT_ONCE = 1000  # rows a call of the tokenizer: quick, and its by-products stay small
# DAQUAR's night_stand: VQA's scores part such words too, and decoders know them apart.
_WORDS_JOINED = re.compile(r"(?<=[^\W_])_(?=[^\W_])")
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
    images: tuple[PictureFile, ...] = ()


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
    (not yet shifted: transformers' losses shift). `rivals` are the same question with answers that it must be
    told from, each as tokens of its own.
    """

    input_ids: list[int]
    labels: list[int]
    images: tuple[PictureFile, ...]
    row: int
    rivals: tuple[Example, ...] = ()


def read_records(
    source: str | Path, *, image_root: str | Path | None = None, split: str | None = None
) -> tuple[list[Record], ReadSummary]:
    """Records of whatever `read_rows` reads, with a summary of what was found.

    A row without an answer, without a question, or whose turns do not alternate is skipped and counted.

    Args:
        image_root: where relative names of pictures start; by default the folder of the file.
        split: only rows of this split; a row that names none belongs to every one. None takes all rows.

    Raises:
        UsageError: a source that is missing, damaged, of another shape, or has nothing in it to learn from;
            where a row is at fault it is named.
    """
    found = read_rows(source)
    root = found.root if image_root is None else Path(image_root)
    splits = {row["split"] for _, row in found.rows if isinstance(row, dict) and _names_split(row)}
    if (
        split is not None
        and splits
        and split not in splits
        and all(_names_split(row) for _, row in found.rows)
    ):
        raise UsageError(f"{source} has no split {split!r}; its splits are {', '.join(sorted(splits))}")

    records: list[Record] = []
    skipped: Counter[str] = Counter()
    count = 0
    for number, row in found.rows:
        if split is not None and _names_split(row) and row["split"] != split:
            continue
        count += 1
        try:
            several = _records(row, number, root)
        except UsageError as error:
            raise UsageError(f"{source}: row {number}: {error}") from None
        if not several:
            skipped["no caption"] += 1
        for record in several:
            if fault := _fault(record):
                skipped[fault] += 1
            else:
                records.append(record)
    summary = ReadSummary(str(source), count, dict(skipped), found.fingerprint)
    if not records:
        raise UsageError(f"{summary}: nothing is left to learn from")
    return records, summary


def _names_split(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("split"), str)


# --- rows -> records ----------------------------------------------------------------------------------------


def _records(row: Any, number: int, root: Path) -> list[Record]:
    """One record of a row; of a row of captions one for each."""
    if not isinstance(row, dict):
        raise UsageError(f"expected an object with named fields, found {_kind(row)}")
    images = tuple(_images(row, root))
    if "captions" in row:
        return _caption_records(row, number, images)
    if "messages" in row:
        turns = _chat_turns(row["messages"], "messages", "role", "content")
    elif "conversations" in row:
        turns = _chat_turns(row["conversations"], "conversations", "from", "value")
    elif "instruction" in row or "output" in row:
        given = "" if row.get("input") is None else _text(row, "input")
        turns = [Turn("user", _text(row, "instruction"), given), Turn("assistant", _text(row, "output"))]
    elif "question" in row:
        turns = [Turn("user", _text(row, "question")), Turn("assistant", _text(row, "answer"))]
    else:
        found = ", ".join(map(reprlib.repr, list(row)[:10])) or "none"
        expected = "'instruction' and 'output', 'messages', 'conversations', 'question' or 'captions'"
        raise UsageError(f"its fields are {found}; expected {expected}")
    if images:  # text rows keep it: to them it is a tag of SVG
        turns = [Turn(turn.role, turn.text.replace("<image>", "").strip(), turn.input) for turn in turns]
        if "question" in row:
            turns = [Turn(turn.role, _WORDS_JOINED.sub(" ", turn.text)) for turn in turns]
    while turns and turns[-1].role != "assistant":
        turns.pop()  # a last question that was never answered
    return [Record(tuple(turns), number, images)]


def _caption_records(row: dict[str, Any], number: int, images: tuple[PictureFile, ...]) -> list[Record]:
    captions = row["captions"]
    if not images:
        raise UsageError("it has captions but names no picture; expected one in 'image'")
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UsageError(f"field 'captions': expected a list of texts, found {_kind(captions)}")
    records = []
    for place, caption in enumerate(captions):
        check_unicode(caption)
        question = CAPTION_QUESTIONS[(number + place) % len(CAPTION_QUESTIONS)]
        # Flickr8k's are split into words, the full stop standing alone.
        text = re.sub(r"\s+([.,!?;:])", r"\1", " ".join(caption.split()))
        records.append(Record((Turn("user", question), Turn("assistant", text)), number, images))
    return records


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


def _images(row: dict[str, Any], root: Path) -> list[PictureFile]:
    """A row's pictures: files by name, or as the hub's data sets hold them, their bytes."""
    names = row.get("image")
    if names is None:
        return []
    names = names if isinstance(names, list) else [names]
    if names and all(isinstance(name, dict) and isinstance(name.get("bytes"), bytes) for name in names):
        return [name["bytes"] for name in names]
    for name in names:
        if not isinstance(name, str) or not name:
            raise UsageError(f"field 'image': expected the name of a picture file, found {_kind(name)}")
    return [root / name for name in names]


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
    records: Sequence[Record], *, validation_rows: int, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Records to train on and `validation_rows` to validate on, drawn by `seed`, both in their old order.

    The scripts leave the seed as it is: trainings with other seeds are compared on the same rows.

    Records about the same pictures, or with the same question, fall on the same side; where such groups do
    not add up to `validation_rows` there are fewer. Raises UsageError when nothing would be left on a side.
    """
    groups: dict[object, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(record.images or record.turns[:-1], []).append(index)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)

    def kept_back(count: int) -> set[int]:
        kept: set[int] = set()
        for group in shuffled:
            if len(kept) + len(group) <= count:
                kept.update(group)
        return kept

    validation = kept_back(validation_rows)
    if len(validation) == len(records) or (validation_rows and not validation):
        works = range(max(1, len(records) // 10), len(records))
        fits = next((count for count in works if 0 < len(kept_back(count)) < len(records)), None)
        raise UsageError(
            f"{len(records):,} rows (with {len(groups):,} distinct questions) cannot be split into "
            f"{validation_rows:,} for validation (--validation-rows) and the rest for training; "
            + (f"give --validation-rows {fits}, or more rows" if fits else "give more rows")
        )
    train = [record for index, record in enumerate(records) if index not in validation]
    return train, [records[index] for index in sorted(validation)]


def expect_text(records: Sequence[Record], source: str | Path) -> None:
    """Raise UsageError for a record with a picture, where nobody would look at it."""
    row = next((record.row for record in records if record.images), None)
    if row is not None:
        raise UsageError(
            f"{source}: row {row} names a picture; that is for train.vqa, eval.vqa, eval.captions"
        )


def draw_pictures(records: Sequence[Record], count: int, *, seed: int) -> list[Record]:
    """All records of so many sets of pictures, drawn by a seed, in their old order."""
    sets = list(dict.fromkeys(record.images for record in records))
    drawn = set(random.Random(seed).sample(sets, min(count, len(sets))))
    return [record for record in records if record.images in drawn]


def exchange_pictures(pictures: Iterable[Pictures], *, seed: int) -> dict[Pictures, Pictures]:
    """Another picture (or set of pictures) for each of these, none of them its own; each is given once.

    Raises UsageError where there are not two different ones.
    """
    order = list(dict.fromkeys(pictures))
    if len(order) < 2:
        raise UsageError("all rows have the same picture, so none can be exchanged; give rows of several")
    random.Random(seed).shuffle(order)
    return dict(zip(order, order[1:] + order[:1], strict=True))


def shuffle_pictures(records: Sequence[Record], *, seed: int) -> list[Record]:
    """The records with the pictures of others: what is still right then was not read from the picture.

    Every set of pictures goes to another's records. Raises UsageError where there is only one.
    """
    other = exchange_pictures((record.images for record in records), seed=seed)
    return [replace(record, images=other[record.images]) for record in records]


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
        raise UsageError(f"no answer starts within {max_length:,} tokens; give a larger --max-length")
    return examples


def balance_yes_no(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """How often each example is to come up, so that a question is answered yes as often as no.

    Where most answers to a question are the same, a model learns that from its wording and never looks at
    the picture. Questions with another answer, or only one of the two, stay as they are: 1 for each of their
    examples. The weights of a question's examples add up to their number.
    """
    asked = []
    for example in examples:
        labelled = list(zip(example.input_ids, example.labels, strict=True))
        question = tuple(token for token, label in labelled if label == IGNORED)
        answer = tokenizer.decode(
            [label for _, label in labelled if label != IGNORED], skip_special_tokens=True
        )
        asked.append((question, str(answer).strip().lower()))
    found: dict[tuple[int, ...], Counter[str]] = {}
    for question, answer in asked:
        found.setdefault(question, Counter())[answer] += 1
    return [
        found[question].total() / (2 * found[question][answer])
        if set(found[question]) == {"yes", "no"}
        else 1.0
        for question, answer in asked
    ]

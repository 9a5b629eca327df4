"""Rows -> records -> token ids and labels. docs/formats.md lists the rows that can be read."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llama_adapter.common.errors import UsageError
from llama_adapter.data.row_formats import read_row
from llama_adapter.data.row_pictures import PictureFile as PictureFile
from llama_adapter.data.sources import canonical_split, read_rows
from llama_adapter.data.templates import Turn, encode_whole_dialogues

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

Pictures = TypeVar("Pictures", bound=Hashable)

IGNORED = -100  # the label that the losses of transformers ignore
_ENCODED_AT_ONCE = 1000  # rows for each call of the tokenizer: fast, and its temporary lists stay small
_NAMES_SHOWN = 12  # of the columns that are not read


@dataclass(frozen=True)
class Record:
    """One training row: a conversation that ends with an answer of the assistant.

    `row` is its number in the source, from 1 (in JSONL: the line). `images` are the files of its pictures,
    not opened yet.
    """

    turns: tuple[Turn, ...]
    row: int
    images: tuple[PictureFile, ...] = ()


@dataclass(frozen=True)
class ReadSummary:
    """The result of reading a source, in numbers.

    Attributes:
        rows: the rows of the requested split.
        skipped: how many rows or captions are left out, by reason.
        fingerprint: SHA-256 of the file's bytes, or of the rows if there is no single file. It shows whether
            data have changed.
        unanswered: how many rows lost a last question that has no answer.
        unread: names of columns that are not read, in order of appearance.
        other_splits: how many rows each other split has. They are not read.
    """

    source: str
    rows: int
    skipped: Mapping[str, int]
    fingerprint: str
    unanswered: int = 0
    unread: tuple[str, ...] = ()
    other_splits: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.rows:,} rows"]
        parts += [f"{count:,} skipped ({reason})" for reason, count in self.skipped.items()]
        if self.unanswered:
            parts.append(f"{self.unanswered:,} without their last question, which has no answer")
        parts += [f"{count:,} rows of split {name} left out" for name, count in self.other_splits.items()]
        if self.unread:
            more = len(self.unread) - _NAMES_SHOWN
            names = [*self.unread[:_NAMES_SHOWN], *([f"{more:,} more"] if more > 0 else [])]
            parts.append(f"columns not read: {', '.join(names)}")
        return ", ".join(parts)

    def facts(self) -> dict[str, Any]:
        """The numbers that are saved with a run."""
        return {
            "rows": self.rows,
            "skipped": dict(self.skipped),
            "unanswered": self.unanswered,
            "unread": list(self.unread),
            "other_splits": dict(self.other_splits),
        }


@dataclass(frozen=True)
class Example:
    """A record as tokens.

    `labels` has the length of `input_ids`. It holds the ids of the answers and their end tokens, and -100
    elsewhere (not shifted: the losses of transformers shift). `rivals` are the same question with other
    answers, from which the right one is to be told apart; each is an example of its own. `cut` is True if the
    record was longer.
    """

    input_ids: list[int]
    labels: list[int]
    images: tuple[PictureFile, ...]
    row: int
    rivals: tuple[Example, ...] = ()
    cut: bool = False


@dataclass(frozen=True)
class EncodeSummary:
    """What became of records when they were encoded.

    Attributes:
        rows: the records given. A record with answers that have to be learnt separately counts once for each.
        dropped: those without an answer within `max_length` tokens.
        cut: examples that were cut at `max_length` tokens.
        pictures: how many different pictures there are.
        tokens: all tokens of the examples.
        learnt_tokens: the tokens of answers that are learnt, with their end tokens.
    """

    max_length: int
    rows: int
    dropped: int
    cut: int
    pictures: int
    tokens: int
    learnt_tokens: int

    @classmethod
    def count(cls, given: int, examples: Sequence[Example], max_length: int) -> EncodeSummary:
        """Count the examples made from `given` records."""
        return cls(
            max_length=max_length,
            rows=given,
            dropped=given - len(examples),
            cut=sum(example.cut for example in examples),
            pictures=len({image for example in examples for image in example.images}),
            tokens=sum(len(example.input_ids) for example in examples),
            learnt_tokens=sum(label != IGNORED for example in examples for label in example.labels),
        )

    def __str__(self) -> str:
        parts = [f"{self.rows - self.dropped:,} rows"]
        if self.dropped:
            parts.append(
                f"{self.dropped:,} of {self.rows:,} dropped (no answer within {self.max_length:,} tokens)"
            )
        if self.cut:
            parts.append(f"{self.cut:,} cut at {self.max_length:,} tokens")
        pictures = f"{self.pictures:,} pictures"
        return ", ".join([*parts, pictures, f"{self.tokens:,} tokens, {self.learnt_tokens:,} of them learnt"])

    @property
    def warning(self) -> str | None:
        """A warning if most rows are dropped or cut, else None."""
        if 2 * (self.dropped + self.cut) <= self.rows:
            return None
        return (
            f"warning: of {self.rows:,} rows {self.dropped:,} are dropped and {self.cut:,} cut, which are "
            f"longer than --max-length {self.max_length:,}; give a larger one"
        )

    def facts(self) -> dict[str, int]:
        """The numbers that are saved with a run."""
        return asdict(self)


def read_records(
    source: str | Path, *, image_root: str | Path | None = None, split: str | None = None
) -> tuple[list[Record], ReadSummary]:
    """Read the records of anything that `read_rows` reads, with a summary.

    A row is skipped and counted if it has no answer or no question, or if its turns do not alternate.

    Args:
        image_root: the folder that relative names of pictures start from; by default the file's folder.
        split: read only rows of this split, and rows that name none. None reads all rows.

    Raises:
        UsageError: a source that is missing, damaged, of another form, or with nothing to learn from. It
            names the row if one row is at fault.
    """
    found = read_rows(source, split)
    root = found.root if image_root is None else Path(image_root)
    wanted = None if split is None else canonical_split(split)
    splits = Counter(name for _, row in found.rows if (name := _split_of(row)) is not None)
    if wanted is not None and splits and wanted not in splits and splits.total() == len(found.rows):
        raise UsageError(f"{source} has no split {split!r}; its splits are {', '.join(sorted(splits))}")

    records: list[Record] = []
    skipped: Counter[str] = Counter()
    unread: dict[str, None] = {}
    count = unanswered = 0
    for number, row in found.rows:
        if wanted is not None and _split_of(row) not in (None, wanted):
            continue
        count += 1
        try:
            content = read_row(row, number, root)
        except UsageError as error:
            raise UsageError(f"{source}: row {number}: {error}") from None
        records += [Record(turns, number, content.images) for turns in content.conversations]
        skipped.update(content.faults)
        unread |= dict.fromkeys(content.unread)
        unanswered += content.unanswered and bool(content.conversations)
    others = {} if wanted is None else {name: n for name, n in sorted(splits.items()) if name != wanted}
    summary = ReadSummary(
        str(source), count, dict(skipped), found.fingerprint, unanswered, tuple(unread), others
    )
    if not records:
        raise UsageError(f"{summary}: nothing is left to learn from")
    return records, summary


def _split_of(row: Any) -> str | None:
    """The split that a row names, or None."""
    name = row.get("split") if isinstance(row, dict) else None
    return canonical_split(name) if isinstance(name, str) and name else None


# --- choosing among records ---------------------------------------------------------------------------------


def split_records(
    records: Sequence[Record], *, validation_rows: int, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Split records into those to train on and `validation_rows` to validate on, chosen with `seed`.

    The scripts never change this seed, so that trainings with different seeds are compared on the same rows.

    Both parts keep the order of the records. Records with the same pictures or the same question stay
    together; if such groups do not add up to `validation_rows`, there are fewer. Raises UsageError if one
    part would be empty.
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
    """Raise UsageError for a record with a picture, where pictures would not be looked at."""
    row = next((record.row for record in records if record.images), None)
    if row is not None:
        raise UsageError(
            f"{source}: row {row} names a picture; that is for train.vqa, eval.vqa, eval.captions"
        )


def draw_pictures(records: Sequence[Record], count: int, *, seed: int) -> list[Record]:
    """All records of `count` sets of pictures, chosen with a seed, in their old order."""
    sets = list(dict.fromkeys(record.images for record in records))
    drawn = set(random.Random(seed).sample(sets, min(count, len(sets))))
    return [record for record in records if record.images in drawn]


def exchange_pictures(pictures: Iterable[Pictures], *, seed: int) -> dict[Pictures, Pictures]:
    """Give each picture (or set of pictures) another one of these, never its own. Each is used once.

    Raises UsageError unless there are at least two different ones.
    """
    order = list(dict.fromkeys(pictures))
    if len(order) < 2:
        raise UsageError("all rows have the same picture, so none can be exchanged; give rows of several")
    random.Random(seed).shuffle(order)
    return dict(zip(order, order[1:] + order[:1], strict=True))


def shuffle_pictures(records: Sequence[Record], *, seed: int) -> list[Record]:
    """The records with each other's pictures. An answer that is still right was not read from the picture.

    All records of a set of pictures get the same other set. Raises UsageError if there is only one set.
    """
    other = exchange_pictures((record.images for record in records), seed=seed)
    return [replace(record, images=other[record.images]) for record in records]


# --- records -> examples ------------------------------------------------------------------------------------


def encode_records(
    records: Sequence[Record],
    *,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    date: str | None = None,
) -> list[Example]:
    """Encode records as examples of at most `max_length` tokens, in the order of the records.

    A longer record is cut at its end, so its answer has no end token. A record with no answer left after that
    is dropped, so there may be fewer examples than records. An answer that can be learnt only where it is the
    last one (see `data.chat_template`) gets an example of its own, after the record's.

    Args:
        date: such as 2026-11-28, for chat templates that write it. None is today.

    Raises:
        UsageError: a record that the template refuses (named by its row), or no answer left at all.
    """
    return encode_and_count(
        records, template=template, tokenizer=tokenizer, max_length=max_length, date=date
    )[0]


def encode_and_count(
    records: Sequence[Record],
    *,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    date: str | None = None,
) -> tuple[list[Example], EncodeSummary]:
    """`encode_records`, with a summary of what became of the records."""
    examples = []
    given = 0
    for start in range(0, len(records), _ENCODED_AT_ONCE):
        waiting = list(records[start : start + _ENCODED_AT_ONCE])
        while waiting:
            apart: list[Record] = []
            try:
                encoded = encode_whole_dialogues(
                    [record.turns for record in waiting], template, tokenizer, date=date
                )
            except UsageError:
                _refuse_by_row(waiting, template, tokenizer, date)
                raise
            for record, dialogue in zip(waiting, encoded, strict=True):
                apart += [_with_one_answer(record, place) for place in dialogue.untaught]
                if not any(dialogue.is_learnt):
                    continue  # all of its answers get examples of their own
                given += 1
                pairs = zip(dialogue.ids, dialogue.is_learnt, strict=True)
                labels = [token if learnt else IGNORED for token, learnt in pairs]
                if any(dialogue.is_learnt[:max_length]):
                    ids, cut = dialogue.ids[:max_length], len(labels) > max_length
                    examples.append(Example(ids, labels[:max_length], record.images, record.row, cut=cut))
            waiting = apart
    summary = EncodeSummary.count(given, examples, max_length)
    if not examples:
        raise UsageError(f"no answer starts within {max_length:,} tokens; give a larger --max-length")
    return examples, summary


def _refuse_by_row(
    records: Sequence[Record], template: str, tokenizer: PreTrainedTokenizerBase, date: str | None
) -> None:
    """Raise UsageError for the first record that the template refuses, if it accepts a plain conversation."""
    encode_whole_dialogues([[Turn("user", "?"), Turn("assistant", "!")]], template, tokenizer, date=date)
    for record in records:
        try:
            encode_whole_dialogues([record.turns], template, tokenizer, date=date)
        except UsageError as error:
            raise UsageError(f"row {record.row}: {error}") from None


def _with_one_answer(record: Record, place: int) -> Record:
    """The record up to the turn at index `place`. Only that turn is learnt."""
    before = (replace(turn, learnt=False) for turn in record.turns[:place])
    return replace(record, turns=(*before, record.turns[place]))


def balance_yes_no(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """A weight for each example, such that yes and no are equally frequent answers to each question.

    If most answers to a question are the same, a model learns that answer from the wording and never looks at
    the picture. The weights of a question's examples add up to their number. They are 1 for a question that
    has other answers, or only one of the two.
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

"""Rows -> records. docs/formats.md lists the rows that can be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_adapter.common.errors import UsageError
from llama_adapter.data.row_formats import read_row
from llama_adapter.data.row_pictures import PictureFile as PictureFile
from llama_adapter.data.sources import canonical_split, read_rows
from llama_adapter.data.turns import Turn

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

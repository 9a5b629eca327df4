"""Choosing among records: rows to validate on, rows of some pictures, and exchanged pictures."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import Record

Item = TypeVar("Item")
Pictures = TypeVar("Pictures", bound=Hashable)


def draw_groups(groups: Iterable[Sequence[Item]], count: int, *, seed: int) -> list[Item]:
    """The members of whole groups, drawn in an order given by the seed, as far as they fit in `count`."""
    order = list(groups)
    random.Random(seed).shuffle(order)
    drawn: list[Item] = []
    for group in order:
        if len(drawn) + len(group) <= count:
            drawn += group
    return drawn


def split_refusal(
    described: str,
    unit: str,
    total: int,
    validation_rows: int,
    kept_back: Callable[[int], Collection[object]],
) -> UsageError:
    """The error for data that cannot be split, with the smallest usual number of rows that would work.

    Args:
        described: the data, such as "12 rows". unit: its members, such as "rows".
        kept_back: what is kept back for a number of validation rows.
    """
    works = range(max(1, total // 10), total)
    fits = next((count for count in works if 0 < len(kept_back(count)) < total), None)
    return UsageError(
        f"{described} cannot be split into {validation_rows:,} for validation (--validation-rows) and the "
        "rest for training; "
        + (f"give --validation-rows {fits}, or more {unit}" if fits else f"give more {unit}")
    )


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

    def kept_back(count: int) -> set[int]:
        return set(draw_groups(groups.values(), count, seed=seed))

    validation = kept_back(validation_rows)
    if len(validation) == len(records) or (validation_rows and not validation):
        described = f"{len(records):,} rows (with {len(groups):,} distinct questions)"
        raise split_refusal(described, "rows", len(records), validation_rows, kept_back)
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

"""Records split, drawn, and with exchanged pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_adapter.common.errors import UsageError
from llama_adapter.data.choosing import draw_pictures, expect_text, shuffle_pictures, split_records
from llama_adapter.data.records import Record
from llama_adapter.data.templates import Turn


def record(question: str, answer: str = "!", *images: str, row: int = 1) -> Record:
    return Record((Turn("user", question), Turn("assistant", answer)), row, tuple(map(Path, images)))


# --- splitting ----------------------------------------------------------------------------------------------


def test_a_split_is_seeded_and_leaves_nothing_out() -> None:
    records = [record(f"question {i}", row=i) for i in range(100)]
    train, validation = split_records(records, validation_rows=10, seed=0)
    assert (len(train), len(validation)) == (90, 10)
    assert sorted(train + validation, key=lambda record: record.row) == records
    assert [r.row for r in train] == sorted(r.row for r in train)
    assert split_records(records, validation_rows=10, seed=0) == (train, validation)
    assert split_records(records, validation_rows=10, seed=1) != (train, validation)
    assert split_records(records, validation_rows=0, seed=0) == (records, [])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=12, max_size=40), st.integers(0, 5))
def test_a_question_or_picture_is_never_on_both_sides(names: list[str], seed: int) -> None:
    records = [record(name, str(i), row=i) for i, name in enumerate(names)]
    records += [record(f"about it, {i}", "!", f"{name}.jpg") for i, name in enumerate(names)]
    train, validation = split_records(records, validation_rows=len(names), seed=seed)
    assert 0 < len(validation) <= len(names)

    def sides(side: list[Record]) -> set[object]:
        return {r.images or r.turns[0].text for r in side}

    assert not sides(train) & sides(validation)


def test_a_split_that_leaves_a_side_empty_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"2 rows .* cannot be split into 2 for validation .*--validation-rows 1"
    ):
        split_records([record("a"), record("b")], validation_rows=2, seed=0)
    with pytest.raises(UsageError, match=r"2 rows \(with 1 distinct questions\)"):
        split_records([record("a"), record("a")], validation_rows=1, seed=0)


# --- pictures -----------------------------------------------------------------------------------------------


pictured = st.lists(
    st.lists(st.sampled_from("abcde"), min_size=1, max_size=2, unique=True), min_size=1, max_size=20
).map(lambda sets: [record("What?", "!", *names, row=row) for row, names in enumerate(sets, start=1)])


@settings(max_examples=100, deadline=None)
@given(pictured, st.integers(0, 3))
def test_shuffled_nobody_keeps_their_own_pictures(records: list[Record], seed: int) -> None:
    own = {r.images for r in records}
    if len(own) == 1:
        with pytest.raises(UsageError, match="all rows have the same picture"):
            shuffle_pictures(records, seed=seed)
        return
    shuffled = shuffle_pictures(records, seed=seed)
    assert shuffled == shuffle_pictures(records, seed=seed)
    given: dict[object, object] = {}
    for before, after in zip(records, shuffled, strict=True):
        assert (after.turns, after.row) == (before.turns, before.row)
        assert after.images in own and after.images != before.images
        assert given.setdefault(before.images, after.images) == after.images, "questions stay together"
    assert len(set(given.values())) == len(own), "each is used as often as before"


@settings(max_examples=100, deadline=None)
@given(pictured, st.integers(1, 8), st.integers(0, 3))
def test_pictures_are_drawn_with_all_their_questions(records: list[Record], count: int, seed: int) -> None:
    drawn = draw_pictures(records, count, seed=seed)
    assert drawn == draw_pictures(records, count, seed=seed)
    chosen = {r.images for r in drawn}
    assert len(chosen) == min(count, len({r.images for r in records}))
    assert drawn == [r for r in records if r.images in chosen]


def test_another_seed_draws_and_shuffles_otherwise() -> None:
    records = [record("What?", "!", f"{number}.jpg") for number in range(50)]
    for change in (shuffle_pictures, lambda rows, seed: draw_pictures(rows, 10, seed=seed)):
        assert change(records, seed=0) != change(records, seed=1)


def test_a_picture_where_nobody_would_look_is_told() -> None:
    expect_text([record("What?")], "data.json")
    with pytest.raises(UsageError, match=r"^data\.json: row 7 names a picture; that is for train\.vqa"):
        expect_text([record("What?"), record("What?", "!", "a.jpg", row=7)], "data.json")

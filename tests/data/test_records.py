"""Reading files of instructions, splitting them, and turning them into labelled tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import (
    IGNORED,
    Record,
    balance_yes_no,
    draw_pictures,
    encode_and_count,
    encode_records,
    expect_text,
    read_records,
    shuffle_pictures,
    split_records,
)
from llama_adapter.data.templates import CAPTION_QUESTIONS, Turn, encode_question
from tests.tiny import build_tiny_tokenizer

TINY = build_tiny_tokenizer()
ALPACA = Path(__file__).parents[3] / "shared/data/alpaca/alpaca_data.json"

COLOUR = {"instruction": "Name a colour.", "input": "", "output": "Red."}
FRENCH = {"instruction": "Translate to French.", "input": "red", "output": "rouge"}
COLOUR_TURNS = (Turn("user", "Name a colour."), Turn("assistant", "Red."))
FRENCH_TURNS = (Turn("user", "Translate to French.", "red"), Turn("assistant", "rouge"))

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows as a JSON list, text or bytes as they are, and give the file's path."""

    def write(content: Any, name: str = "data.json") -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def fault(path: str | Path) -> str:
    """The one line with which a source is refused."""
    with pytest.raises(UsageError) as refused:
        read_records(path)
    line = str(refused.value)
    assert "\n" not in line and line.startswith(str(path))
    return line.removeprefix(f"{path}: ")


# --- what is read -------------------------------------------------------------------------------------------


def test_pictures_may_be_bytes_in_the_rows(tmp_path: Path) -> None:
    import datasets

    rows = [{"image": {"bytes": b"one", "path": None}, "question": "What?", "answer": "A cat."}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    [record], _ = read_records(tmp_path / "rows.parquet")
    assert record.images == (b"one",)


def test_a_picture_without_captions_is_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"image": "a.jpg", "captions": []}, {"image": "b.jpg", "captions": ["B."]}]))
    records, summary = read_records(path)
    assert len(records) == 1 and summary.skipped == {"no caption": 1}


def test_alpaca_rows_are_read_from_a_list(write: Write) -> None:
    path = write([COLOUR, FRENCH, {"instruction": "Say nothing.", "output": "", "input": None}])
    records, summary = read_records(path)
    assert records == [Record(COLOUR_TURNS, 1), Record(FRENCH_TURNS, 2)]
    assert (summary.rows, summary.skipped) == (3, {"empty answer": 1})
    assert summary.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    assert str(summary) == f"{path}: 3 rows, 1 skipped (empty answer)"


def test_alpaca_rows_are_read_from_lines_which_number_them(write: Write) -> None:
    text = f"{json.dumps(COLOUR)}\r\n\n{json.dumps({**FRENCH, 'id': 7})}\n"
    records, _ = read_records(write(text, "data.jsonl"))
    assert records == [Record(COLOUR_TURNS, 1), Record(FRENCH_TURNS, 3)]
    assert read_records(write(text, "data.txt"))[0] == records


def test_line_separators_inside_a_text_do_not_end_its_line(write: Write) -> None:
    row = {"instruction": "One\u2028two\x85three", "output": "Four."}
    [record], _ = read_records(write(json.dumps(row, ensure_ascii=False), "data.jsonl"))
    assert record.turns[0].text == "One\u2028two\x85three"


@pytest.mark.parametrize("rows", ["[%s]", "%s\n"])
def test_a_byte_order_mark_is_no_part_of_the_data(write: Write, rows: str) -> None:
    records, _ = read_records(write(b"\xef\xbb\xbf" + (rows % json.dumps(COLOUR)).encode()))
    assert records == [Record(COLOUR_TURNS, 1)]


def test_chat_messages_and_sharegpt_give_the_same_turns(write: Write) -> None:
    turns = (
        Turn("system", "Be brief."),
        Turn("user", "Hello"),
        Turn("assistant", "Hi."),
        Turn("user", "Bye"),
        Turn("assistant", "Bye."),
    )
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    sharegpt = {"system": "system", "user": "human", "assistant": "gpt"}
    conversation = [{"from": sharegpt[turn.role], "value": turn.text} for turn in turns]
    unanswered = [*messages, {"role": "user", "content": "Still there?"}]
    rows = [{"messages": messages}, {"id": 1, "conversations": conversation}, {"messages": unanswered}]
    records, _ = read_records(write(rows))
    assert [record.turns for record in records] == [turns] * 3


def test_llava_rows_carry_their_pictures(write: Write) -> None:
    conversation = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    only_pictures = [{"from": "human", "value": "<image>\n<image>"}, {"from": "gpt", "value": "A dog."}]
    rows = [
        {"image": "cats/1.jpg", "conversations": conversation},
        {"image": ["a.jpg", "/b.jpg"], "conversations": only_pictures},
        {"image": None, "instruction": "Which tag is it?\n<image>", "output": "One of SVG."},
    ]
    path = write(rows)
    records, _ = read_records(path)
    assert [record.images for record in records] == [
        (path.parent / "cats/1.jpg",),
        (path.parent / "a.jpg", Path("/b.jpg")),
        (),
    ]
    questions = [record.turns[0].text for record in records]
    assert questions == ["What is it?", "", "Which tag is it?\n<image>"]
    assert read_records(path, image_root="/photos")[0][0].images == (Path("/photos/cats/1.jpg"),)


CAPTIONED = {"image": "dog.jpg", "captions": ["A dog runs .", " A  brown dog,\n running !", ""]}
ASKED = {"image": "dog.jpg", "question": "What is it?", "answer": "a dog"}


def test_a_row_of_captions_gives_a_record_of_each(write: Write) -> None:
    path = write([CAPTIONED, {"image": ["a.jpg", "b.jpg"], "captions": ["Two."]}])
    records, summary = read_records(path)
    assert [record.turns[1].text for record in records] == ["A dog runs.", "A brown dog, running!", "Two."]
    assert [record.images for record in records] == [
        (path.parent / "dog.jpg",),
        (path.parent / "dog.jpg",),
        (path.parent / "a.jpg", path.parent / "b.jpg"),
    ]
    assert [record.row for record in records] == [1, 1, 2]
    assert (summary.rows, summary.skipped) == (2, {"empty answer": 1})
    assert all(record.turns[0].text in CAPTION_QUESTIONS for record in records)
    many, _ = read_records(write([{**CAPTIONED, "captions": ["A dog."] * 5}] * 3))
    assert {record.turns[0].text for record in many} == set(CAPTION_QUESTIONS), "asked for in every way"


def test_questions_with_and_without_a_picture(write: Write) -> None:
    path = write([ASKED, {"question": "Two and two?", "answer": "Four."}])
    records, _ = read_records(path)
    assert records == [
        Record((Turn("user", "What is it?"), Turn("assistant", "a dog")), 1, (path.parent / "dog.jpg",)),
        Record((Turn("user", "Two and two?"), Turn("assistant", "Four.")), 2),
    ]


def test_of_a_question_about_a_picture_words_joined_by_underscores_are_read_apart(write: Write) -> None:
    joined = {"question": "what is on the night_stand?", "answer": "paper_towel_roll, _a, b__c"}
    records, _ = read_records(write([{**joined, "image": "room.jpg"}, joined]))
    assert [[turn.text for turn in record.turns] for record in records] == [
        ["what is on the night stand?", "paper towel roll, _a, b__c"],
        ["what is on the night_stand?", "paper_towel_roll, _a, b__c"],
    ]


def test_rows_of_a_split_are_read_with_those_that_name_none(write: Write) -> None:
    rows = [{**ASKED, "split": "train"}, {**ASKED, "split": "test"}, ASKED, {**ASKED, "split": None}]
    path = write(rows)
    for split, expected in (("train", [1, 3, 4]), ("test", [2, 3, 4]), ("val", [3, 4]), (None, [1, 2, 3, 4])):
        records, summary = read_records(path, split=split)
        assert [record.row for record in records] == expected
        assert summary.rows == len(expected)


def test_an_unknown_split_is_told_with_those_there_are(write: Write) -> None:
    path = write([{**ASKED, "split": name} for name in ("train", "test", "train")])
    with pytest.raises(UsageError) as error:
        read_records(path, split="val")
    assert str(error.value) == f"{path} has no split 'val'; its splits are test, train"
    bad = write([{**ASKED, "split": "train"}, {**ASKED, "split": "test", "answer": 3}])
    assert len(read_records(bad, split="train")[0]) == 1, "what is not read cannot be at fault"


def test_rows_that_teach_nothing_are_skipped_by_reason(write: Write) -> None:
    def messages(*roles: str) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": "?"} for role in roles]}

    rows = [
        COLOUR,
        {**COLOUR, "output": " \n"},
        {"instruction": "", "input": " ", "output": "Red."},
        messages("assistant", "user", "assistant"),
        messages("user", "user", "assistant"),
        messages("user"),
        messages(),
    ]
    records, summary = read_records(write(rows))
    assert [record.row for record in records] == [1]
    assert summary.skipped == {
        "empty answer": 1,
        "empty question": 1,
        "user and assistant do not alternate": 2,
        "no answer": 2,
    }


def test_data_sets_are_read_from_every_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = Dataset.from_list([COLOUR, FRENCH])
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "splits")
    data.to_parquet(tmp_path / "folder" / "train.parquet")
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    places = [
        tmp_path / "saved",
        tmp_path / "splits",
        tmp_path / "folder",
        tmp_path / "folder" / "train.parquet",
        arrow,
    ]
    prints = set()
    for place in places:
        records, summary = read_records(place)
        assert records == [Record(COLOUR_TURNS, 1), Record(FRENCH_TURNS, 2)]
        prints.add(summary.fingerprint)
    assert len(prints) == 1


def test_a_hub_id_is_read_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, *, split: str) -> Dataset:
        asked.append((name, split))
        return Dataset.from_list([{**COLOUR, "text": "unused"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_records("someone/alpaca-1.5")[0] == [Record(COLOUR_TURNS, 1)]
    assert asked == [("someone/alpaca-1.5", "train")]


def test_changed_data_has_another_fingerprint(write: Write, tmp_path: Path) -> None:
    prints = {read_records(write(rows))[1].fingerprint for rows in ([COLOUR], [FRENCH], [COLOUR, FRENCH])}
    for name, rows in (("a", [COLOUR]), ("b", [FRENCH])):
        Dataset.from_list(rows).save_to_disk(tmp_path / name)
        prints.add(read_records(tmp_path / name)[1].fingerprint)
    assert len(prints) == 5


@pytest.mark.skipif(not ALPACA.exists(), reason=f"{ALPACA} is not on this machine")
def test_the_real_alpaca_file_has_28_rows_without_an_answer() -> None:
    records, summary = read_records(ALPACA)
    assert (summary.rows, len(records)) == (51_502, 51_474)
    assert summary.skipped == {"empty answer": 28}


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty; expected a JSON list of rows, or one row a line"),
        (b" \n\xef\xbb\xbf"[:2], "the file is empty; expected a JSON list of rows, or one row a line"),
        (b"\xef\xbb\xbf", "the file is empty; expected a JSON list of rows, or one row a line"),
        (b"[]", "0 rows: nothing is left to learn from"),
        (b'[{"instruction": "a\xff"}]', "not UTF-8 text (byte 20); save it as UTF-8"),
        (
            b'[{"instruction": "Name',
            "not valid JSON: it breaks off; expected a list of rows, or one row a line",
        ),
        (b'[{"instruction": 1},\n', "not valid JSON: it breaks off; expected a list of rows"),
        (
            b"[{} {}]",
            "not valid JSON: Expecting ',' delimiter at character 5; expected a list of rows, or one",
        ),
        (b"Hello", "line 1: not valid JSON: Expecting value at character 1; expected a list of rows, or one"),
        (b"42", "row 1: expected an object with named fields, found a number"),
        (b"[" * 100_000, "not readable JSON: "),
        (b"[" + b"1" * 5_000 + b"]", "not readable JSON: "),
    ],
)
def test_a_file_of_another_shape_is_refused(write: Write, content: bytes, expected: str) -> None:
    assert fault(write(content)).startswith(expected)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (None, "expected an object with named fields, found null"),
        ([COLOUR], "expected an object with named fields, found a list"),
        (
            {},
            "its fields are none; expected 'instruction' and 'output', 'messages', 'conversations', "
            "'question' or 'captions'",
        ),
        ({"ask": "", "say": ""}, "its fields are 'ask', 'say'; expected 'instruction' and "),
        ({"instruction": "Name a colour."}, "field 'output' is missing"),
        ({"output": "Red."}, "field 'instruction' is missing"),
        ({**COLOUR, "output": None}, "field 'output': expected text, found null"),
        ({**COLOUR, "instruction": 3}, "field 'instruction': expected text, found a number"),
        ({**COLOUR, "input": ["red"]}, "field 'input': expected text, found a list"),
        ({**COLOUR, "output": "\ud83d"}, "field 'output': the text is not valid Unicode"),
        ({**COLOUR, "input": "\ud83d"}, "field 'input': the text is not valid Unicode"),
        ({**COLOUR, "image": ""}, "field 'image': expected the name of a picture file, found empty text"),
        ({**COLOUR, "image": {}}, "field 'image': expected the name of a picture file, found an object"),
        ({"captions": ["A dog."]}, "it has captions but names no picture; expected one in 'image'"),
        ({**CAPTIONED, "captions": "A dog."}, "field 'captions': expected a list of texts, found text"),
        ({**CAPTIONED, "captions": ["A dog.", None]}, "field 'captions': expected a list of texts"),
        ({**CAPTIONED, "captions": ["\ud83d"]}, "the text is not valid Unicode"),
        ({**CAPTIONED, "image": [None]}, "field 'image': expected the name of a picture file, found null"),
        ({"image": "dog.jpg", "question": "What is it?"}, "field 'answer' is missing"),
        ({**ASKED, "question": ["What?"]}, "field 'question': expected text, found a list"),
        ({"image": "dog.jpg"}, "its fields are 'image'; expected 'instruction' and 'output', 'messages'"),
        ({"messages": "Hi"}, "field 'messages': expected a list of messages, found text"),
        ({"messages": [True]}, "field 'messages', message 1: expected an object, found true or false"),
        ({"messages": [{"role": "user"}]}, "field 'messages', message 1: field 'content' is missing"),
        (
            {"conversations": [{"from": "human", "value": "?"}, {"from": "parrot", "value": "!"}]},
            "field 'conversations', message 2: field 'from' is 'parrot'; expected one of system, developer, ",
        ),
    ],
)
def test_a_bad_row_is_named_with_its_field(write: Write, row: Any, expected: str) -> None:
    assert fault(write([COLOUR, row])).startswith(f"row 2: {expected}")


def test_a_file_without_one_answer_is_refused(write: Write) -> None:
    assert fault(write([{**COLOUR, "output": ""}])) == (
        "1 rows, 1 skipped (empty answer): nothing is left to learn from"
    )


@pytest.mark.parametrize("name", ["none.json", "none.parquet", "./none", "/none/at/all", "~/none", "a/b/c"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str) -> None:
    assert fault(name) == "no such file or folder"


def test_an_unset_variable_is_no_source() -> None:
    with pytest.raises(UsageError, match="'': no such file or folder"):
        read_records("")


def test_damaged_data_sets_are_refused(write: Write, tmp_path: Path) -> None:
    for name in ("data.parquet", "data.arrow"):
        assert fault(write(b"PAR1 and no more", name)).startswith("cannot be read as a data set: ")
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in fault(tmp_path / "empty")
    DatasetDict({"test": Dataset.from_list([COLOUR])}).save_to_disk(tmp_path / "test-only")
    assert fault(tmp_path / "test-only").endswith(
        "its splits are test; expected one named train (choose by --split)"
    )


def test_a_data_set_that_the_hub_does_not_have_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, *, split: str) -> Dataset:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    expected = "neither here nor read from the hub: Couldn't reach 'someone/nothing' on the Hub"
    assert fault("someone/nothing") == expected


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "data.json"


def read_or_refuse(path: Path, content: bytes) -> list[Record] | None:
    """The records, or None after a clear refusal; anything else is a bug and raises."""
    path.write_bytes(content)
    try:
        return read_records(path)[0]
    except UsageError as error:
        assert "\n" not in str(error)
        return None


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_list_cut_anywhere_is_refused(scratch: Path, data: st.DataObject) -> None:
    whole = json.dumps([{**COLOUR, "output": "Rōt «🎨»"}, FRENCH], ensure_ascii=False).encode()
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert read_or_refuse(scratch, whole[:cut]) is None


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | st.binary(max_size=20).map(lambda junk: b'[{"instruction": "' + junk))
def test_random_bytes_are_refused(scratch: Path, content: bytes) -> None:
    assert read_or_refuse(scratch, content) is None


ROW_FIELDS = (
    "instruction",
    "input",
    "output",
    "messages",
    "conversations",
    "image",
    "question",
    "answer",
    "captions",
    "split",
)
MESSAGE_FIELDS = ("role", "content", "from", "value")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(ROW_FIELDS + MESSAGE_FIELDS),
            inner | st.sampled_from(["user", "assistant", "human", "gpt"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(json_values)
def test_rows_of_any_shape_are_read_or_refused(scratch: Path, rows: Any) -> None:
    for record in read_or_refuse(scratch, json.dumps(rows).encode()) or ():
        assert record.turns[-1].role == "assistant" and record.turns[-1].text.strip()


def test_the_summary_names_what_was_not_read(write: Write) -> None:
    rows = [
        {**COLOUR, "id": 1, "split": "train"},
        {**COLOUR, "id": None, "source": "a book", "split": "train"},
        {**COLOUR, "output": "", "split": "train"},
        {"messages": [{"role": role, "content": "?"} for role in ("user", "assistant", "user")]},
        {**COLOUR, "split": "test", "secret": 1},
    ]
    path = write(rows)
    records, summary = read_records(path, split="train")
    assert len(records) == 3
    assert str(summary) == (
        f"{path}: 4 rows, 1 skipped (empty answer), 1 without their last question, which has no answer, "
        "1 rows of split test left out, columns not read: id, source"
    )
    assert summary.facts() == {
        "rows": 4,
        "skipped": {"empty answer": 1},
        "unanswered": 1,
        "unread": ["id", "source"],
        "other_splits": {"test": 1},
    }
    _, summary = read_records(write([{**COLOUR, **{f"note {n}": n for n in range(20)}}]))
    assert str(summary).endswith("note 10, note 11, 8 more")


# --- splitting ----------------------------------------------------------------------------------------------


def record(question: str, answer: str = "!", *images: str, row: int = 1) -> Record:
    return Record((Turn("user", question), Turn("assistant", answer)), row, tuple(map(Path, images)))


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


# --- tokens -------------------------------------------------------------------------------------------------


ALPACA_512: dict[str, Any] = {"template": "alpaca", "tokenizer": TINY, "max_length": 512}


def test_only_the_answer_and_its_end_token_are_labelled() -> None:
    [example] = encode_records([record("Name a colour.", "Red.", "a.jpg", row=7)], **ALPACA_512)
    answer = TINY("Red.<|im_end|>")["input_ids"]
    assert example.input_ids[-len(answer) :] == answer
    assert example.labels == [IGNORED] * (len(example.input_ids) - len(answer)) + answer
    assert (example.row, example.images) == (7, (Path("a.jpg"),))


def test_a_long_row_is_cut_and_one_without_an_answer_left_is_dropped() -> None:
    records = [record("short", "answer", row=1), record("long " * 600, "lost", row=2)]
    records.append(record("short", "long " * 600, row=3))
    short, cut = encode_records(records, **ALPACA_512)
    assert (short.row, cut.row) == (1, 3)
    assert short.labels[-1] == TINY.eos_token_id
    assert len(cut.input_ids) == len(cut.labels) == 512
    assert cut.labels[-1] == cut.input_ids[-1] != TINY.eos_token_id


def test_a_length_that_leaves_no_answer_is_refused() -> None:
    with pytest.raises(UsageError, match="no answer starts within 8 tokens"):
        encode_records([record("short")], template="alpaca", tokenizer=TINY, max_length=8)


def test_what_became_of_rows_is_counted() -> None:
    records = [record("short", "answer", "a.jpg", row=1), record("long " * 600, "lost", row=2)]
    records += [record("short", "long " * 600, "a.jpg", "b.jpg", row=3)]
    examples, summary = encode_and_count(records, **ALPACA_512)
    assert [example.cut for example in examples] == [False, True]
    assert summary.facts() == {
        "max_length": 512,
        "rows": 3,
        "dropped": 1,
        "cut": 1,
        "pictures": 2,
        "tokens": sum(len(example.input_ids) for example in examples),
        "learnt_tokens": sum(label != IGNORED for example in examples for label in example.labels),
    }
    assert str(summary).startswith(
        "2 rows, 1 of 3 dropped (no answer within 512 tokens), 1 cut at 512 tokens, 2 pictures, "
    )
    assert summary.warning == (
        "warning: of 3 rows 1 are dropped and 1 cut, which are longer than --max-length 512; "
        "give a larger one"
    )
    _, fine = encode_and_count(records[:1], **ALPACA_512)
    assert fine.warning is None and "dropped" not in str(fine) and "cut" not in str(fine)


def test_answers_that_cannot_be_learnt_in_one_row_are_learnt_apart() -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = (  # in the manner of Qwen3
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ '<think></think>' if m.role == 'assistant' and loop.last else '' }}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think></think>' }}{% endif %}"
    )
    turns = (*record("a", "A").turns, *record("b", "B").turns, *record("c", "C").turns)
    records = [Record(turns, 1, (Path("x.jpg"),)), record("d", "D", row=2)]
    examples, summary = encode_and_count(records, template="chat", tokenizer=tokenizer, max_length=512)
    learnt = [tokenizer.decode([i for i in e.labels if i != IGNORED]) for e in examples]
    assert sorted(learnt) == [f"{answer}<|im_end|>" for answer in "ABCD"]
    assert (summary.rows, summary.dropped) == (4, 0)
    for example, answer in zip(examples, learnt, strict=True):
        if answer != "D<|im_end|>":
            place = "ABC".index(answer[0])
            question = encode_question(turns[: 2 * place + 1], "chat", tokenizer)
            assert example.input_ids[: len(question)] == question
            assert example.images == (Path("x.jpg"),) and example.row == 1


def test_a_row_that_the_chat_template_refuses_is_named() -> None:
    tokenizer = build_tiny_tokenizer()
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    tokenizer.chat_template = strict + str(tokenizer.chat_template)
    refused = replace(record("a"), turns=(Turn("system", "Be brief."), *record("a").turns), row=7)
    with pytest.raises(UsageError, match=r"^row 7: this base's chat template refuses .*: No system role"):
        encode_records([record("a"), refused], template="chat", tokenizer=tokenizer, max_length=512)


def test_rows_keep_their_order_beyond_one_call_of_the_tokenizer() -> None:
    records = [record(f"question {i}", f"answer {i}", row=i) for i in range(2_100)]
    examples = encode_records(records, **ALPACA_512)
    assert [example.row for example in examples] == list(range(2_100))
    [last] = encode_records(records[-1:], **ALPACA_512)
    assert examples[-1] == last


def test_yes_comes_up_as_often_as_no_for_each_question_that_has_both() -> None:
    answers = {
        "Is it red?": ["No", "no ", "no", "yes"],
        "Is it blue?": ["no", "no"],
        "What is it?": ["yes", "a dog"],
    }
    records = [record(question, text) for question, several in answers.items() for text in several]
    weights = balance_yes_no(encode_records(records, **ALPACA_512), TINY)
    assert weights == pytest.approx([4 / 6] * 3 + [4 / 2] + [1] * 4)

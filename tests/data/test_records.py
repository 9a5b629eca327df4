"""Reading files of instructions and of questions about pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import Record, read_records
from llama_adapter.data.templates import CAPTION_QUESTIONS, Turn
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

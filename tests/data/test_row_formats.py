"""The formats of rows that are in use: all that has a meaning is read, or refused by name."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_adapter.common.errors import UsageError
from llama_adapter.data.row_formats import RowContent, read_row
from llama_adapter.data.templates import CAPTION_QUESTIONS, Turn

ROOT = Path("/data")
PIXEL = b"\x89PNG and more"
DATA_URL = "data:image/png;base64," + base64.b64encode(PIXEL).decode()


def read(row: Any) -> RowContent:
    return read_row(row, 1, ROOT)


def turns_of(row: Any) -> tuple[Turn, ...]:
    """The turns of a row with one conversation, all of which is learnt."""
    [turns] = read(row).conversations
    assert not read(row).faults
    return turns


def said(row: Any) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in turns_of(row)]


def fault(row: Any) -> str:
    with pytest.raises(UsageError) as refused:
        read(row)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def messages(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


SYSTEM = ("system", "Be brief.")
HI = [("user", "Hi"), ("assistant", "Hello.")]
BYE = [("user", "Bye"), ("assistant", "See you.")]


# --- one question and its answer ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi", "input": "", "output": "Hello."},
        {"instruction": "Hi", "response": "Hello."},
        {"prompt": "Hi", "completion": "Hello."},
        {"prompt": "Hi", "response": "Hello."},
        {"question": "Hi", "answer": "Hello."},
        {"question": "Hi", "response": "Hello."},
        {"query": "Hi", "response": "Hello."},
        {"prompt": messages("Hi"), "completion": messages("", "Hello.")[1:]},
        {"prompt": messages("Hi"), "completion": "Hello."},
        {"messages": messages("Hi", "Hello.")},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"conversations": messages("Hi", "Hello.")},
        {"conversation": messages("Hi", "Hello.")},
        # Parquet has all columns in every row.
        {
            "instruction": None,
            "output": None,
            "messages": messages("Hi", "Hello."),
            "image": None,
            "tools": None,
        },
        {"instruction": "Hi", "output": "Hello.", "messages": [], "history": [], "system": "", "tools": "[]"},
    ],
)
def test_every_form_gives_the_same_turns(row: Any) -> None:
    assert said(row) == HI
    assert read(row).unread == ()


@pytest.mark.parametrize("column", ["input", "context", "query"])
def test_what_an_instruction_is_about_is_its_input(column: str) -> None:
    row = {"instruction": "Translate.", column: "red", "output": "rouge"}
    assert turns_of(row) == (Turn("user", "Translate.", "red"), Turn("assistant", "rouge"))


@pytest.mark.parametrize("text", ["[]", "{}", "null", " "])
def test_text_that_looks_like_nothing_is_text(text: str) -> None:
    row = {"instruction": "Parse this.", "input": text, "output": text + "!"}
    assert turns_of(row) == (Turn("user", "Parse this.", text), Turn("assistant", text + "!"))


def test_two_inputs_are_refused() -> None:
    row = {"instruction": "Translate.", "input": "red", "context": "blue", "output": "rouge"}
    assert fault(row) == "fields 'input' and 'context': expected one of them"


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Bye", "output": "See you."},
        {"question": "Bye", "response": "See you."},
        {"conversations": [{"from": "human", "value": "Bye"}, {"from": "gpt", "value": "See you."}]},
        {"messages": messages("Bye", "See you.")},
        {"messages": [{"role": "system", "content": "Be brief."}, *messages("Bye", "See you.")]},
    ],
)
def test_system_and_history_come_first(column: str, row: dict[str, Any]) -> None:
    assert said({**row, column: "Be brief."}) == [SYSTEM, *BYE]
    history = [["Hi", "Hello."]]
    assert said({**row, column: "Be brief.", "history": history}) == [SYSTEM, *HI, *BYE]


def test_system_texts_that_differ_are_refused() -> None:
    row = {
        "system": "Be long.",
        "messages": [{"role": "system", "content": "Be brief."}, *messages("a", "b")],
    }
    assert fault(row) == "field 'system': the row has two system texts that differ; expected one"
    both = {"system": "Be long.", "system_prompt": "Be brief.", "messages": messages("a", "b")}
    assert fault(both).startswith("field 'system' and 'system_prompt': the row has two system texts")


def test_developer_is_system_and_several_in_front_are_one() -> None:
    opening = [{"role": "system", "content": "Be kind."}, {"role": "developer", "content": "Be brief."}]
    assert said({"messages": [*opening, *messages("Hi", "Hello.")]}) == [
        ("system", "Be kind.\n\nBe brief."),
        *HI,
    ]


@pytest.mark.parametrize("history", ["Hi", [["Hi"]], [["Hi", 3]], ["Hi", "Hello."], [{"Hi": "Hello."}]])
def test_a_history_of_another_shape_is_refused(history: Any) -> None:
    row = {"instruction": "Bye", "output": "See you.", "history": history}
    assert fault(row) == "field 'history': expected a list of pairs, each a question and its answer"


# --- what is learnt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["weight", "train", "training", "train_on_turn", "loss"])
@pytest.mark.parametrize("off", [0, False, 0.0])
def test_an_answer_that_is_switched_off_is_context(flag: str, off: Any) -> None:
    chat = messages("2+2?", "five", "Sure?", "four")
    chat[1][flag] = off
    chat[3][flag] = 1
    assert [turn.learnt for turn in turns_of({"messages": chat}) if turn.role == "assistant"] == [False, True]
    chat[1][flag], chat[3][flag] = 1, off
    assert said({"messages": chat}) == [("user", "2+2?"), ("assistant", "five")], (
        "nothing is learnt behind it"
    )
    chat[1][flag] = off
    assert read({"messages": chat}).faults == ("no answer that is to be learnt",)
    chat[1][flag] = "no"
    assert (
        fault({"messages": chat})
        == f"field 'messages', message 2: field {flag!r}: expected 0 or 1, found 'no'"
    )


def test_of_a_prompt_of_messages_only_the_completion_is_learnt() -> None:
    row = {"prompt": messages("Hi", "Hello.", "Bye"), "completion": messages("", "See you.")[1:]}
    assert said(row) == [*HI, *BYE]
    assert [turn.learnt for turn in turns_of(row) if turn.role == "assistant"] == [False, True]
    assert fault({**row, "completion": messages("Hi")}).startswith(
        "field 'completion': expected messages that"
    )


def test_a_last_question_without_an_answer_is_left_out_and_told() -> None:
    row = {"messages": messages("Hi", "Hello.", "Still there?")}
    assert said(row) == HI and read(row).unanswered
    assert not read({"messages": messages("Hi", "Hello.")}).unanswered


# --- what is refused ----------------------------------------------------------------------------------------

CHAT = {"messages": messages("Hi", "Hello.")}
TOOL_CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**CHAT, "tools": [{"name": "f"}]}, "field 'tools': calls of tools are not read"),
        ({**CHAT, "functions": '[{"name": "f"}]'}, "field 'functions': calls of tools are not read"),
        ({**CHAT, "videos": ["a.mp4"]}, "field 'videos': only text and pictures are read"),
        ({**CHAT, "audios": ["a.wav"]}, "field 'audios': only text and pictures are read"),
        ({"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}, "field 'chosen': answers to compare"),
        (
            {"instruction": "Hi", "output": "Hello.", "rejected": "Go."},
            "field 'rejected': answers to compare",
        ),
        (
            {"chosen": messages("a", "b"), "rejected": messages("a", "c")},
            "field 'chosen': answers to compare",
        ),
        ({"prompt": "Hi", "completion": "Go.", "label": False}, "field 'label': answers to compare"),
        ({"prompt": "Hi", "completions": ["a"], "labels": [True]}, "field 'completions': answers to compare"),
        ({**CHAT, "kto_tag": False}, "field 'kto_tag': answers to compare"),
        ({**CHAT, "weight": 0.5}, "field 'weight': a row's weight is not read"),
        ({"question": "?", "choices": ["a", "b"], "answer": "a"}, "field 'choices': write the choices into"),
        (
            {"question": "?", "reasoning": "Hm.", "answer": "a"},
            "field 'reasoning': thoughts before an answer",
        ),
        ({**CHAT, "input": "red"}, "field 'input' is not read beside the others, and would be lost"),
        (
            {**CHAT, "conversations": messages("a", "b")},
            "field 'conversations' is not read beside the others",
        ),
        ({"question": "?", "answer": "a", "output": "b"}, "field 'answer' is not read beside the others"),
        (
            {**CHAT, "photo": "cat.jpg"},
            "field 'photo' seems to name a picture, and is not read; call it 'image'",
        ),
        ({**CHAT, "pixels": {"bytes": PIXEL, "path": None}}, "field 'pixels' seems to name a picture"),
    ],
)
def test_a_column_that_would_be_lost_is_refused(row: Any, expected: str) -> None:
    assert fault(row).startswith(expected)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "tool", "content": "42"}, "field 'role' is 'tool': calls of tools are not read"),
        ({"from": "function_call", "value": "{}"}, "field 'from' is 'function_call': calls of tools are not"),
        (
            {"from": "observation", "value": "{}"},
            "field 'from' is 'observation': calls of tools are not read",
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": TOOL_CALL},
            "field 'tool_calls': calls of tools",
        ),
        (
            {"role": "assistant", "content": "!", "reasoning_content": "Hm."},
            "field 'reasoning_content': thoughts",
        ),
        ({"role": "assistant", "content": None, "refusal": "No."}, "field 'refusal': write the refusal into"),
        ({"role": "user", "content": "?", "images": ["a.png"]}, "field 'images': name pictures in the row's"),
        (
            {"role": "parrot", "content": "!"},
            "field 'role' is 'parrot'; expected one of system, developer, user",
        ),
        ({"role": "user"}, "field 'content' is missing"),
        ({"from": "human"}, "field 'value' is missing"),
        (
            {"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]},
            "field 'content': expected parts of",
        ),
        (
            {"role": "user", "content": [3]},
            "field 'content': expected parts of type text, or image in a question",
        ),
    ],
)
def test_a_part_of_a_message_that_would_be_lost_is_refused(message: Any, expected: str) -> None:
    assert fault({"messages": [*messages("Hi", "Hello."), message]}).startswith(
        f"field 'messages', message 3: {expected}"
    )


def test_columns_that_repeat_a_turn_or_note_something_are_named_and_no_more() -> None:
    notes = {"id": 7, "source": "a book", "score": 0.5, "url": "https://a.b/c.png", "text": "### All of it"}
    row = {**CHAT, "prompt": "Hi", "answer": "Hello", **notes}
    assert said(row) == HI
    assert read(row).unread == ("prompt", "answer", *notes)


# --- pictures -----------------------------------------------------------------------------------------------

ASKED = {"question": "What is it?", "answer": "A cat."}


@pytest.mark.parametrize(
    "column", ["image", "images", "image_path", "image_paths", "file_name", "image_file_name"]
)
@pytest.mark.parametrize(
    ("value", "file"),
    [
        ("cats/1.jpg", ROOT / "cats/1.jpg"),
        (["cats/1.jpg"], ROOT / "cats/1.jpg"),
        ("/photos/1.png", Path("/photos/1.png")),
        ("file:///photos/a%20cat.png", Path("/photos/a cat.png")),
        ({"bytes": None, "path": "1.webp"}, ROOT / "1.webp"),
        ({"bytes": PIXEL, "path": "1.webp"}, PIXEL),
        ([{"bytes": PIXEL, "path": None}], PIXEL),
        (DATA_URL, PIXEL),
    ],
)
def test_every_column_and_spelling_of_a_picture(column: str, value: Any, file: Any) -> None:
    assert read({**ASKED, column: value}).images == (file,)


def test_a_picture_on_the_web_is_not_fetched() -> None:
    for column in ("image", "image_url"):
        row = {**ASKED, column: "https://a.b/cat.jpg"}
        assert fault(row).startswith(
            f"field {column!r}: https://a.b/cat.jpg is on the web, and pictures are not"
        )
    assert (
        fault({**ASKED, "image": "data:image/png;base64,%%"})
        == "field 'image': the data URL is not valid base64"
    )


def test_two_columns_of_pictures() -> None:
    assert read({**ASKED, "image": "a.png", "images": ["a.png"]}).images == (ROOT / "a.png",)
    assert fault({**ASKED, "image": "a.png", "image_path": "b.png"}).startswith(
        "fields 'image' and 'image_path' name"
    )
    shown = read({**ASKED, "image": {"bytes": PIXEL}, "image_path": "b.png", "file_name": "c.png"})
    assert shown.images == (PIXEL,) and shown.unread == ("file_name",)


def test_a_name_of_a_file_that_is_no_picture_is_a_note() -> None:
    shown = read({"instruction": "Explain.", "output": "It prints.", "file_name": "main.py"})
    assert shown.images == () and shown.unread == ("file_name",)


PART = {"type": "image"}
TEXT = {"type": "text", "text": "What is it?"}


@pytest.mark.parametrize(
    ("columns", "content", "expected"),
    [
        ({"images": ["a.png"]}, [PART, TEXT], (ROOT / "a.png",)),
        (
            {"images": ["a.png"]},
            [{**PART, "text": None, "index": 0}, {**TEXT, "index": None}],
            (ROOT / "a.png",),
        ),
        ({"images": ["a.png", "b.png"]}, [PART, PART, TEXT], (ROOT / "a.png", ROOT / "b.png")),
        ({"images": ["a.png"]}, [TEXT], (ROOT / "a.png",)),
        ({"images": ["a.png"]}, "<image>What is it?", (ROOT / "a.png",)),
        ({}, [{"type": "image_url", "image_url": {"url": DATA_URL}}, TEXT], (PIXEL,)),
        ({}, [{"type": "image_url", "image_url": "a.png"}, TEXT], (ROOT / "a.png",)),
        ({}, [{"type": "image", "image": "a.png"}, TEXT], (ROOT / "a.png",)),
        ({}, [{"type": "image", "path": "a.png"}, "What is it?"], (ROOT / "a.png",)),
        ({}, [{"type": "image", "image": {"bytes": PIXEL}}, TEXT], (PIXEL,)),
        ({}, [{"type": "image", "base64": base64.b64encode(PIXEL).decode()}, TEXT], (PIXEL,)),
        (
            {},
            [{"type": "input_image", "image_url": DATA_URL}, {"type": "input_text", "text": "What is it?"}],
            (PIXEL,),
        ),
    ],
)
def test_pictures_in_the_parts_of_a_message(columns: Any, content: Any, expected: Any) -> None:
    row = {
        **columns,
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}],
    }
    assert said(row) == [("user", "What is it?"), ("assistant", "A cat.")]
    assert read(row).images == expected


@pytest.mark.parametrize(
    ("columns", "content", "expected"),
    [
        ({}, [PART, TEXT], "its text has places for 1 pictures (<image>), and it names 0"),
        (
            {"images": ["a.png"]},
            [PART, PART, TEXT],
            "its text has places for 2 pictures (<image>), and it names 1",
        ),
        (
            {"images": ["a.png", "b.png"]},
            "<image>?",
            "its text has places for 1 pictures (<image>), and it names 2",
        ),
        (
            {"image": "a.png"},
            [{"type": "image", "image": "b.png"}, TEXT],
            "field 'messages', message 1: the row names",
        ),
    ],
)
def test_places_for_pictures_and_pictures_are_as_many(columns: Any, content: Any, expected: str) -> None:
    row = {
        **columns,
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}],
    }
    assert fault(row).startswith(expected)


def test_an_answer_holds_no_picture_but_may_speak_of_the_tag() -> None:
    parts = [{"role": "user", "content": "Draw."}, {"role": "assistant", "content": [PART]}]
    assert "found 'image' of the assistant" in fault({"images": ["a.png"], "messages": parts})
    row = {"image": "a.png", "question": "<image>Which tag is it?", "answer": "<image> is SVG's."}
    assert said(row) == [("user", "Which tag is it?"), ("assistant", "<image> is SVG's.")]
    text = {"question": "What does <image> do?", "answer": "It shows a picture."}
    assert said(text)[0] == ("user", "What does <image> do?")


# --- captions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["caption", "captions", "text"])
def test_captions_by_every_name(column: str) -> None:
    [turns] = read(
        {"file_name": "a.png", column: ["A cat ."] if column == "captions" else "A cat ."}
    ).conversations
    assert turns[0].text in CAPTION_QUESTIONS and turns[1].text == "A cat."


def test_a_row_with_a_question_and_a_caption_gives_both() -> None:
    shown = read({**ASKED, "image": "a.png", "caption": "A cat on a mat.", "text": "all of it"})
    assert [turns[1].text for turns in shown.conversations] == ["A cat.", "A cat on a mat."]
    assert shown.unread == ("text",)
    assert fault({**ASKED, "caption": "A cat on a mat."}).startswith(
        "field 'caption' is not read beside the others"
    )


# --- whatever comes -----------------------------------------------------------------------------------------

COLUMNS = (
    *(
        "messages",
        "conversations",
        "instruction",
        "prompt",
        "question",
        "query",
        "output",
        "response",
        "completion",
    ),
    *(
        "answer",
        "input",
        "context",
        "caption",
        "captions",
        "text",
        "system",
        "history",
        "image",
        "images",
        "id",
    ),
)
words = st.sampled_from(["red", "blue", "green", "grey", "pink", "gold"])
chats = st.lists(words, min_size=2, max_size=3).map(lambda texts: messages(*texts))
rows = st.dictionaries(st.sampled_from(COLUMNS), words | chats | st.just(["a.png"]) | st.none(), max_size=5)


@settings(max_examples=300, deadline=None)
@given(rows)
def test_no_word_is_lost_without_a_word(row: dict[str, Any]) -> None:
    """Every text of a row is in its turns, in its pictures or in a column that is named, or it is refused."""
    try:
        shown = read(row)
    except UsageError:
        return
    if shown.faults:
        return
    found = {text for turns in shown.conversations for turn in turns for text in (turn.text, turn.input)}
    found |= {str(image).removeprefix(f"{ROOT}/") for image in shown.images}
    for column, value in row.items():
        if column in shown.unread or value is None:
            continue
        texts = value if isinstance(value, list) else [value]
        last = texts and isinstance(texts[-1], dict) and shown.unanswered
        for text in texts[:-1] if last else texts:
            assert (text["content"] if isinstance(text, dict) else text) in found

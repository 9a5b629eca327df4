"""The chat's handlers: questions, answers, and all that can happen to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from llama_adapter.answering.engine import Engine
from llama_adapter.common.errors import UsageError
from llama_adapter.data import pictures as opening
from llama_adapter.data.pictures import MAX_PIXELS
from llama_adapter.model import NO_ADAPTER
from llama_adapter.page.chats import MAX_WAITING, Chats
from llama_adapter.page.chatting import BUSY, EMPTY, IDLE, UNCHANGED, ChatHandlers
from llama_adapter.page.checks import MAX_CHARACTERS
from llama_adapter.page.display import messages, pace, shown
from llama_adapter.page.suggestions import PICTURE_EXAMPLES
from llama_adapter.page.uploads import picture_file
from tests.drawn import SVG, huge_png, png
from tests.page_parts import HOSTILE, KNOBS, SEEING, SETTINGS, has, pictures, texts, typed_in
from tests.scripted import build_scripted_model

pytestmark = pytest.mark.usefixtures("uploads")

LONG = ("one", "", 0, 1, 0, 1, 1000, None)


@pytest.fixture
def handlers() -> ChatHandlers:
    return ChatHandlers(Engine(build_scripted_model(seeing=("eyes",))))


def finish(handlers: ChatHandlers, view: tuple[Any, ...]) -> Chats:
    """Let the answers to the questions that were asked come to their end. Returns the person's chats."""
    chats: Chats = view[0]
    for _ in handlers.answer(chats):
        pass
    return chats


def look(chats: Chats) -> list[dict[str, Any]]:
    return messages(chats.open.conversation)


def questions(chats: Chats) -> list[str]:
    return [exchange.question.text for exchange in chats.open.conversation.exchanges]


def note(chats: Chats, number: int = -1) -> str:
    """The note below an answer."""
    text: str = look(chats)[1::2][number]["content"][-1]["text"]
    return text


def test_a_question_is_taken_at_once_and_its_answer_grows(
    handlers: ChatHandlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats, _, box, asked, _, waiting = handlers.ask(typed_in("Hello?"), None, *SETTINGS)
    assert has(box, {**BUSY, "value": EMPTY})
    assert texts(asked) == ["Hello?"]
    assert waiting == ""
    assert handlers.model.made == 0  # type: ignore[attr-defined]

    monkeypatch.setattr("llama_adapter.page.chatting.pace", lambda pieces: pace(pieces, seconds=0))
    steps = list(handlers.answer(chats))[1:]
    lengths = [len(texts(step)[1]) for _, step, _ in steps]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 5
    # Only the end changes the box: an event that arrives late, after a stop, must not make it busy again.
    assert all(box == gr.skip() for box, *_ in steps[:-1])
    assert has(steps[-1][0], IDLE)
    assert chats.open.conversation.exchanges[0].answer.tokens == 12


# --- one after the other ------------------------------------------------------------------------------------


def test_a_question_that_comes_while_an_answer_is_made_waits_its_turn(handlers: ChatHandlers) -> None:
    chats, *_ = handlers.ask(typed_in("First"), None, *SETTINGS)
    answering = handlers.answer(chats)
    assert len(texts(next(answering)[1])) == 2, "nothing comes before the first word"
    _, _, box, asked, _, waiting = handlers.ask(typed_in("Second"), chats, *SETTINGS)
    assert has(box, {**BUSY, "value": EMPTY})
    assert texts(asked)[::2] == ["First"]
    assert waiting == "Next: “Second”"
    # The second event finds that an answer is already being made.
    *_, (box, *_) = handlers.answer(chats)
    assert has(box, BUSY)
    steps = list(answering)
    turn = next(look for _, look, waiting in steps if waiting == "")
    assert texts(turn)[::2] == ["First", "Second"] and len(turn) == 3, "shown before its first word"
    box, asked, waiting = steps[-1]
    assert has(box, IDLE) and waiting == ""
    assert texts(asked)[::2] == ["First", "Second"]
    assert [exchange.answer.tokens for exchange in chats.open.conversation.exchanges] == [12, 12]
    assert "stopped" not in note(chats, 0)


def test_an_event_that_comes_first_leaves_nothing_behind(handlers: ChatHandlers) -> None:
    """Two questions were asked before any answer was started."""
    chats, *_ = handlers.ask(typed_in("First"), None, *SETTINGS)
    handlers.ask(typed_in("Second"), chats, *SETTINGS)
    finish(handlers, (chats,))
    assert questions(chats) == ["First", "Second"]
    assert not chats.open.busy
    assert len(list(handlers.answer(chats))) == 1  # the second event has nothing to do


def test_stop_lets_the_question_that_waits_have_its_turn(handlers: ChatHandlers) -> None:
    chats, *_ = handlers.ask(typed_in("First"), None, *LONG)
    answering = handlers.answer(chats)
    next(answering)
    handlers.ask(typed_in("Second"), chats, *SETTINGS)
    _, _, box, *_ = handlers.stop(chats)
    assert has(box, BUSY)
    list(answering)
    assert "stopped" in note(chats, 0)
    assert chats.open.conversation.exchanges[1].answer.tokens == 12


def test_a_bad_question_does_not_wait_and_not_too_many_do(
    handlers: ChatHandlers, upload: Callable[..., Path]
) -> None:
    chats, *_ = handlers.ask(typed_in("First"), None, *SETTINGS)
    with pytest.warns(UserWarning, match="the question is empty"):
        assert handlers.ask(typed_in(" "), chats, *SETTINGS) == UNCHANGED
    with pytest.warns(UserWarning, match="see pictures"):
        assert handlers.ask(typed_in("x", upload("red.png", png("red"))), chats, *SETTINGS) == UNCHANGED
    handlers.model.config.max_position_embeddings = 50
    with pytest.warns(UserWarning, match="the base reads 50"):
        assert handlers.ask(typed_in("many words " * 30), chats, *SETTINGS) == UNCHANGED
    handlers.model.config.max_position_embeddings = 20_000
    for number in range(MAX_WAITING):
        handlers.ask(typed_in(f"{number}"), chats, *SETTINGS)
    with pytest.warns(UserWarning, match="wait already"):
        assert handlers.ask(typed_in("one more"), chats, *SETTINGS) == UNCHANGED


def test_what_is_wrong_when_a_turn_comes_is_told_and_the_next_one_is_answered(
    handlers: ChatHandlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats, *_ = handlers.ask(typed_in("First"), None, *SETTINGS)
    for text in ("Second", "Third"):
        handlers.ask(typed_in(text), chats, *SETTINGS)
    ask = chats.open.conversation.ask

    def refuse(text: str, *args: Any) -> Any:
        if text == "Second":
            raise UsageError("not any more")
        return ask(text, *args)

    monkeypatch.setattr(chats.open.conversation, "ask", refuse)
    with pytest.warns(UserWarning, match="not any more"):
        finish(handlers, (chats,))
    assert questions(chats) == ["First", "Third"]


# --- what an answer was made with, and why it ended ---------------------------------------------------------


def test_the_note_says_who_answered_and_why_the_answer_ended(handlers: ChatHandlers) -> None:
    chats = finish(handlers, handlers.ask(typed_in("First"), None, *SETTINGS))
    facts = r"\u206312 tokens · [\d.]+ tokens/s · one · cut off at the length limit"
    assert re.fullmatch(facts, note(chats))
    finish(handlers, handlers.ask(typed_in("Second"), chats, NO_ADAPTER, *KNOBS))
    chats.open.conversation.exchanges[-1].answer.finish_reason = "stop"  # as if it were complete
    assert note(chats).endswith(" tokens/s · bare base")
    handlers.ask(typed_in("Third"), chats, *LONG)
    handlers.stop(chats)
    assert note(chats).endswith(" · one · stopped")
    assert re.fullmatch(facts, note(chats, 0)), "it stays there"


def test_made_without_the_picture_is_said_of_each_answer_that_was(
    handlers: ChatHandlers, upload: Callable[..., Path]
) -> None:
    chats = finish(handlers, handlers.ask(typed_in("First", upload("red.png", png("red"))), None, *SEEING))
    chats = finish(handlers, handlers.ask(typed_in("Second"), chats, *SETTINGS))
    chats = finish(handlers, handlers.ask(typed_in("Third"), chats, *SEEING))
    without = ["made without the picture" in note(chats, number) for number in range(3)]
    assert without == [False, True, False]


def test_the_note_tells_what_no_longer_fits(handlers: ChatHandlers) -> None:
    handlers.model.config.max_position_embeddings = 160
    view = handlers.ask(typed_in("First " * 12), None, *SETTINGS)
    chats = finish(handlers, view)
    for _ in range(3):
        finish(handlers, handlers.ask(typed_in("Next " * 12), chats, *SETTINGS))
    dropped = chats.open.conversation.dropped
    assert dropped and f"first {2 * dropped} messages no longer fit" in note(chats)
    assert "no longer fit" not in note(chats, 0)


# --- retry, edit, undo, stop --------------------------------------------------------------------------------


def test_retry_edit_and_undo(handlers: ChatHandlers) -> None:
    chats = finish(handlers, handlers.ask(typed_in("First"), None, *SETTINGS))
    chats = finish(handlers, handlers.ask(typed_in("Second"), chats, *SETTINGS))
    chats = finish(handlers, handlers.retry(chats, "two", *KNOBS))
    assert texts(look(chats))[::2] == ["First", "Second"]
    assert [exchange.adapter for exchange in chats.open.conversation.exchanges] == ["one", "two"]

    edited = "<b>First</b>\ndef f(x):\n    return x"
    event = gr.EditData(None, {"index": 0, "value": shown(edited), "previous_value": "First"})
    chats = finish(handlers, handlers.edit(event, chats, *SETTINGS))
    assert questions(chats) == [edited]

    _, _, box, asked, *_ = handlers.undo(chats)
    assert has(box, {"value": typed_in(edited)}) and asked == []
    assert handlers.undo(chats) == handlers.undo(None) == UNCHANGED


def test_an_example_is_asked(handlers: ChatHandlers) -> None:
    event = gr.SelectData(None, {"index": 0, "value": {"text": "Why?"}})
    assert texts(handlers.ask_example(event, None, *SETTINGS)[3]) == ["Why?"]


def test_stop_keeps_what_was_said_and_ends_the_work(handlers: ChatHandlers) -> None:
    chats, *_ = handlers.ask(typed_in("Hello?"), None, *LONG)
    answering = handlers.answer(chats)
    next(answering)
    _, _, box, asked, *_ = handlers.stop(chats)
    assert has(box, IDLE)
    said = texts(asked)[1]
    rest = list(answering)
    assert len(rest) <= 2
    assert texts(rest[-1][1])[1].startswith(said)
    assert handlers.model.made < 10  # type: ignore[attr-defined]
    assert has(handlers.stop(None)[2], IDLE)


@pytest.mark.parametrize("bad", ["", "  ", "x" * (MAX_CHARACTERS + 1), "half \ud800"])
def test_a_bad_question_is_told_and_changes_nothing(bad: str, handlers: ChatHandlers) -> None:
    chats = finish(handlers, handlers.ask(typed_in("First"), None, *SETTINGS))
    with pytest.warns(UserWarning):
        assert handlers.ask(typed_in(bad), chats, *SETTINGS) == UNCHANGED
    assert len(list(handlers.answer(None))) == 1
    assert questions(chats) == ["First"]


def test_a_warning_holds_no_html(handlers: ChatHandlers) -> None:
    with pytest.warns(UserWarning, match="&lt;img"):
        handlers.ask(typed_in("Hello?"), None, "one", "", 0, 1, 0, 1, 12, "<img src=x>")


def test_hostile_text_is_defused_in_question_and_answer(handlers: ChatHandlers) -> None:
    chats = finish(handlers, handlers.ask(typed_in(HOSTILE), None, *LONG))
    assert HOSTILE in chats.open.conversation.exchanges[0].answer.text
    for message in look(chats):
        for part in message["content"]:
            assert not re.search(r"<[^\u2060]|&[^\u2060]|!\[", part["text"])


def test_an_answer_without_a_word_still_has_its_place(handlers: ChatHandlers) -> None:
    chats, *_ = handlers.ask(typed_in("First"), None, *SETTINGS)
    handlers.stop(chats)
    assert texts(look(chats)) == ["First", "(no answer)"]
    assert texts(handlers.ask(typed_in("Second"), chats, *SETTINGS)[3]) == ["First", "(no answer)", "Second"]


# --- pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("text.png", b"some text", "text.png: not a picture"),
        ("drawn.svg", SVG, "drawn.svg: SVG is not supported"),
        ("huge.png", huge_png(), f"huge.png: more than the {MAX_PIXELS:,} pixels"),
        ("cut.png", png("red", (64, 64))[:80], "cut.png: the picture is damaged"),
        ("<img src=x onerror=alert(1)>.png", b"", "&lt;img src=x onerror=alert(1)&gt;.png: empty"),
    ],
    ids=["text", "svg", "huge", "cut", "html name"],
)
def test_a_bad_picture_is_told_by_its_name_and_changes_nothing(
    name: str, content: bytes, told: str, handlers: ChatHandlers, upload: Callable[..., Path]
) -> None:
    chats = finish(handlers, handlers.ask(typed_in("First"), None, *SEEING))
    with pytest.warns(UserWarning, match=re.escape(told)):
        asked = handlers.ask(typed_in("What is it?", upload(name, content)), chats, *SEEING)
    assert asked == UNCHANGED
    assert questions(chats) == ["First"]


def test_a_picture_is_shown_above_its_question_and_known_afterwards(
    handlers: ChatHandlers, upload: Callable[..., Path], uploads: Path
) -> None:
    red, blue = upload("red.png", png("red")), upload("blue.png", png("blue"))
    view = handlers.ask(typed_in("What is it?", red, blue), None, *SEEING)
    assert has(view[2], {"value": EMPTY})
    assert [image.getpixel((0, 0)) for image in pictures(view[3])[0]] == [(255, 0, 0), (0, 0, 255)]
    assert all(Path(part["path"]).is_relative_to(uploads) for part in view[3][0]["content"][:2])
    chats = finish(handlers, view)
    finish(handlers, handlers.ask(typed_in("And its colour?"), chats, *SEEING))
    for text in texts(look(chats))[1::2]:
        assert "saw: #ff0000 #0000ff" in text
    assert [len(several) for several in pictures(look(chats))] == [2, 0, 0, 0]


def test_a_picture_is_decoded_once_and_a_question_tokenised_once(
    handlers: ChatHandlers, upload: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    tokenised: list[Any] = []
    identify, encode = opening.identify, handlers.model.encode_question
    monkeypatch.setattr(opening, "identify", lambda content: decoded.append(content) or identify(content))
    to_rgb = opening.to_rgb
    monkeypatch.setattr(opening, "to_rgb", lambda *given: decoded.append(given) or to_rgb(*given))
    monkeypatch.setattr(
        handlers.model, "encode_question", lambda *a, **b: tokenised.append(a) or encode(*a, **b)
    )
    chats = finish(handlers, handlers.ask(typed_in("First", upload("red.png", png("red"))), None, *SEEING))
    assert len(decoded) == 2  # identified once, and converted to RGB once
    assert len(tokenised) == 1
    finish(handlers, handlers.ask(typed_in("Second"), chats, *SEEING))
    assert len(decoded) == 2
    assert len(tokenised) == 2
    assert "saw: #ff0000" in texts(look(chats))[-1]


def test_retry_edit_and_undo_keep_the_picture(handlers: ChatHandlers, upload: Callable[..., Path]) -> None:
    chats = finish(handlers, handlers.ask(typed_in("First", upload("red.png", png("red"))), None, *SEEING))
    finish(handlers, handlers.retry(chats, *SEEING))
    event = gr.EditData(None, {"index": 0, "value": "Second", "previous_value": "First"})
    finish(handlers, handlers.edit(event, chats, *SEEING))
    assert texts(look(chats))[1].startswith("eyes heard: Second\n\nsaw: #ff0000")
    _, _, box, asked, *_ = handlers.undo(chats)
    assert asked == []
    assert box["value"]["text"] == "Second"
    finish(handlers, handlers.ask(box["value"], chats, *SEEING))
    assert "saw: #ff0000" in texts(look(chats))[1]


def test_an_adapter_for_text_warns_and_leaves_everything_in_the_box(
    handlers: ChatHandlers, upload: Callable[..., Path]
) -> None:
    box = typed_in("What is it?", upload("red.png", png("red")))
    for adapter in ("one", NO_ADAPTER):
        with pytest.warns(UserWarning, match="see pictures") as told:
            assert handlers.ask(box, None, adapter, *KNOBS) == UNCHANGED
        assert len(told) == 1


def test_a_picture_that_was_cleared_away_is_written_again(
    handlers: ChatHandlers, upload: Callable[..., Path]
) -> None:
    chats, *_ = handlers.ask(typed_in("First", upload("red.png", png("red"))), None, *SEEING)
    file = Path(look(chats)[0]["content"][0]["path"])
    content = file.read_bytes()
    file.unlink()
    assert look(chats)[0]["content"][0]["path"] == str(file)
    assert file.read_bytes() == content


def test_an_example_is_asked_with_our_picture_whatever_file_the_click_names(handlers: ChatHandlers) -> None:
    example = PICTURE_EXAMPLES[0]
    event = gr.SelectData(
        None, {"index": 0, "value": {"text": example.text, "files": [{"path": "/etc/passwd"}]}}
    )
    chats, _, _, asked, *_ = handlers.ask_example(event, None, *SEEING)
    assert example.picture is not None
    assert pictures(asked)[0][0].tobytes() == example.picture.tobytes()
    image = chats.open.conversation.exchanges[0].images[0]
    assert picture_file(image) == asked[0]["content"][0]["path"]


def test_a_photo_that_was_taken_joins_what_is_in_the_box(handlers: ChatHandlers) -> None:
    box = typed_in("What is it?", Path("a.png"))
    assert handlers.attach("b.png", box) == (typed_in("What is it?", Path("a.png"), Path("b.png")), None)
    assert handlers.attach(None, box) == (gr.skip(), gr.skip())

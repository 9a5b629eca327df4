"""A person's chats: new, open, deleted; stored in the browser and saved as files."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from llama_adapter.answering.engine import Engine
from llama_adapter.common.errors import UsageError
from llama_adapter.page import chats as limits
from llama_adapter.page import kept as keeping
from llama_adapter.page.chats import Chats
from llama_adapter.page.chatting import BUSY, IDLE, UNCHANGED, ChatHandlers
from llama_adapter.page.display import messages
from llama_adapter.page.kept import pack, unpack
from llama_adapter.page.uploads import MAX_EXACT_URL
from tests.drawn import png
from tests.page_parts import KNOBS, SEEING, SETTINGS, has, texts, typed_in
from tests.scripted import build_scripted_model

pytestmark = pytest.mark.usefixtures("uploads")


@pytest.fixture(scope="module")
def handlers() -> ChatHandlers:
    return ChatHandlers(Engine(build_scripted_model(seeing=("eyes",))))


@pytest.fixture
def chats(handlers: ChatHandlers, upload: Callable[..., Path]) -> Chats:
    """Two chats: one with a picture, a stopped answer and an answer made without the picture; one of text."""
    view = handlers.ask(typed_in("What is it?", upload("red.png", png("red"))), None, *SEEING)
    finish(handlers, view[0])
    handlers.ask(typed_in("Go on"), view[0], *SETTINGS)
    handlers.stop(view[0])
    handlers.start(view[0])
    finish(handlers, handlers.ask(typed_in("<b>Hi</b>"), view[0], "two", "Be brief.", *KNOBS[1:])[0])
    handlers.choose_expert("two", view[0])
    chats: Chats = view[0]
    return chats


def finish(handlers: ChatHandlers, chats: Chats) -> None:
    for _ in handlers.answer(chats):
        pass


def reopened(handlers: ChatHandlers, kept: Any) -> tuple[Any, ...]:
    """What the page gets when it is opened in a browser that stored this."""
    return handlers.load(json.loads(json.dumps(kept)), None)


# --- several chats ------------------------------------------------------------------------------------------


def test_a_new_chat_is_empty_and_the_others_can_be_opened_again(handlers: ChatHandlers, chats: Chats) -> None:
    _, kept, box, look, picker, _ = handlers.start(chats)
    assert look == [] and has(box, IDLE) and chats.open.empty
    assert [title for title, _ in picker["choices"]] == ["Untitled chat", "<b>Hi</b>", "What is it?"]
    assert picker["value"] == kept["open"] == chats.open.key
    handlers.start(chats)
    assert len(chats.all) == 3, "an empty one is new enough"
    _, _, _, look, picker, _ = handlers.choose(picker["choices"][2][1], chats)
    assert texts(look)[::2] == ["What is it?", "Go on"]
    _, kept, *_ = handlers.delete(chats)
    assert [chat.title for chat in chats.all] == ["Untitled chat", "<b>Hi</b>"]
    assert len(kept["chats"]) == 2
    for _ in range(3):
        handlers.delete(chats)
    assert len(chats.all) == 1 and chats.open.empty


def test_an_answer_goes_on_while_another_chat_is_looked_at(handlers: ChatHandlers, chats: Chats) -> None:
    running = chats.open
    handlers.ask(typed_in("Count"), chats, *SETTINGS)
    answering = handlers.answer(chats)
    next(answering)
    _, _, box, *_ = handlers.start(chats)
    assert has(box, IDLE)
    assert all(step == UNCHANGED[:3] for step in answering)
    assert running.conversation.exchanges[-1].answer.tokens == 12
    _, _, box, look, *_ = handlers.choose(running.key, chats)
    assert has(box, IDLE) and len(look) == 4


def test_an_open_chat_that_is_being_answered_is_busy(handlers: ChatHandlers, chats: Chats) -> None:
    handlers.ask(typed_in("Count"), chats, *SETTINGS)
    key = chats.open.key
    handlers.start(chats)
    assert has(handlers.choose(key, chats)[2], BUSY)
    answer = chats.open.conversation.exchanges[-1].answer
    handlers.delete(chats)
    assert answer.finish_reason == "closed"


def test_there_are_not_too_many(
    handlers: ChatHandlers, chats: Chats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_CHATS", 2)
    with pytest.warns(UserWarning, match="there are 2 chats"):
        assert handlers.start(chats) == UNCHANGED


# --- the browser's storage ----------------------------------------------------------------------------------


def test_chats_and_expert_survive_a_reload(handlers: ChatHandlers, chats: Chats) -> None:
    kept = pack(chats)
    expert, again, _, box, look, picker, _ = reopened(handlers, kept)
    assert expert == "two"
    assert look == messages(chats.open.conversation)
    assert has(box, IDLE)
    assert picker["choices"] == [(chat.title, chat.key) for chat in chats.all]
    for before, after in zip(chats.all, again.all, strict=True):
        here, there = messages(before.conversation), messages(after.conversation)
        assert texts(there) == texts(here)
        assert [message["content"][-1] for message in there] == [message["content"][-1] for message in here]
    assert "stopped" in str(there) and "made without the picture" in str(there)
    image, copied = (each.all[1].conversation.exchanges[0].images[0] for each in (chats, again))
    assert copied.tobytes() == image.tobytes()
    assert pack(again) == kept


def test_a_chat_goes_on_after_a_reload_with_its_picture(handlers: ChatHandlers, chats: Chats) -> None:
    _, again, *_ = reopened(handlers, pack(chats))
    again.choose(again.all[1].key)
    handlers.ask(typed_in("And its colour?"), again, *SEEING)
    finish(handlers, again)
    latest = again.open.conversation.exchanges[-1]
    assert "saw: #ff0000" in latest.answer.text
    assert [turn.text for turn in latest.read][::2] == ["What is it?", "And its colour?"]


def test_what_is_looked_into_after_a_reload_is_what_was_read(handlers: ChatHandlers, chats: Chats) -> None:
    chats.choose(chats.all[1].key)
    handlers.undo(chats)
    before = chats.open.conversation
    after = reopened(handlers, pack(chats))[1].open.conversation
    assert after.exchanges[-1].read == before.exchanges[-1].read
    features = before.latest_features()
    assert features is not None and after.latest_features().equal(features)


def test_what_was_begun_before_the_page_had_loaded_is_left_alone(
    handlers: ChatHandlers, chats: Chats
) -> None:
    """An expert may have been chosen, too, of which the server learns later."""
    assert reopened(handlers, None) == (gr.skip(), *UNCHANGED)
    assert handlers.load(pack(chats), chats) == (gr.skip(), *UNCHANGED)


def test_an_expert_that_is_gone_is_not_chosen(handlers: ChatHandlers, chats: Chats) -> None:
    assert reopened(handlers, {**pack(chats), "adapter": "gone"})[0] == gr.skip()


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept.clear(),
        lambda kept: kept.update(version=99),
        lambda kept: kept.update(chats="text"),
        lambda kept: kept["chats"].append(5),
        lambda kept: kept["chats"][0].update(messages=[{"role": "user", "content": "Hi"}]),
        lambda kept: kept["chats"][0]["messages"][0].update(content=5),
        lambda kept: kept["chats"][0]["messages"][0].update(content="x" * 200_000),
        lambda kept: kept["chats"][0]["messages"][0].update(images=["/etc/passwd"]),
        lambda kept: kept["chats"][0]["messages"][1].update(content="\ud800"),
        lambda kept: kept["chats"][0]["messages"][1].update(finish_reason="<b>"),
        lambda kept: kept["chats"][0]["messages"][1].update(tokens="many"),
    ],
)
def test_what_is_no_chat_is_told_and_nothing_of_it_shown(
    change: Callable[[dict[str, Any]], Any], handlers: ChatHandlers, chats: Chats
) -> None:
    kept = copy.deepcopy(pack(chats))
    change(kept)
    with pytest.raises(UsageError):
        unpack(kept, handlers.new_conversation)
    with pytest.warns(UserWarning):
        assert handlers.load(kept, None) == (gr.skip(), *UNCHANGED)


def test_the_oldest_chats_are_left_out_where_the_browser_has_no_room_and_that_is_told(
    handlers: ChatHandlers, chats: Chats, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("gradio.Info", lambda message, **_: told.append(message))
    monkeypatch.setattr(keeping, "MAX_KEPT", 700)
    kept = handlers.save(chats)
    assert [chat["messages"][0]["content"] for chat in kept["chats"]] == ["<b>Hi</b>"]
    assert len(told) == 1 and "no room for all chats" in told[0]
    handlers.save(chats)
    assert len(told) == 1, "once is enough"


def test_a_large_picture_is_kept_small(handlers: ChatHandlers, upload: Callable[..., Path]) -> None:
    noise = Image.effect_noise((600, 600), 80).convert("RGB")
    content = io.BytesIO()
    noise.save(content, "PNG")
    _, kept, *_ = handlers.ask(typed_in("x", upload("n.png", content.getvalue())), None, *SEEING)
    (url,) = kept["chats"][0]["messages"][0]["images"]
    assert url.startswith("data:image/jpeg;base64,") and len(content.getvalue()) > MAX_EXACT_URL
    again = reopened(handlers, kept)[1]
    assert again.open.conversation.exchanges[0].images[0].size == (600, 600)


# --- files --------------------------------------------------------------------------------------------------


def test_a_chat_is_saved_as_json(handlers: ChatHandlers, chats: Chats) -> None:
    chats.choose(chats.all[1].key)
    file = handlers.save_json(chats)
    assert file["name"] == "what-is-it.json"
    saved = json.loads(file["text"])
    roles = [(message["role"], message["content"][:11]) for message in saved["messages"]]
    assert roles == [
        ("user", "What is it?"),
        ("assistant", "eyes heard:"),
        ("user", "Go on"),
        ("assistant", ""),
    ]
    assert saved["messages"][0]["images"][0].startswith("data:image/png;base64,")
    assert saved["messages"][3]["finish_reason"] == "closed" and saved["messages"][3]["unseen"]


def test_a_chat_is_saved_as_markdown(handlers: ChatHandlers, chats: Chats) -> None:
    file = handlers.save_markdown(chats)
    assert file["name"] == "b-hi-b.md"
    paragraphs = file["text"].split("\n\n")
    assert paragraphs[:5] == [
        "# <b>Hi</b>",
        "*System text:* Be brief.",
        "## Question",
        "<b>Hi</b>",
        "## Answer of two",
    ]
    assert file["text"].endswith(" *(cut off at the length limit)*\n")
    chats.choose(chats.all[1].key)
    text = handlers.save_markdown(chats)["text"]
    assert "![picture 1](data:image/png;base64," in text
    assert " *(stopped)*" in text and "*(made without the picture)*" in text


def test_nothing_cannot_be_saved(handlers: ChatHandlers) -> None:
    with pytest.raises(Exception, match="nothing to save"):
        handlers.save_json(None)

"""Side by side: two experts, one question."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.answering.engine import Engine
from llama_adapter.decoding.question import Question, Request
from llama_adapter.model import NO_ADAPTER
from llama_adapter.page.chatting import BUSY, EMPTY, IDLE
from llama_adapter.page.comparing import UNCHANGED, ComparisonHandlers
from tests.drawn import png
from tests.page_parts import HOSTILE, KNOBS, has, texts, typed_in
from tests.scripted import ScriptedModel, build_scripted_model

pytestmark = pytest.mark.usefixtures("uploads")

BASE_AND_ONE = (NO_ADAPTER, "one", *KNOBS)
LONGER = (*KNOBS[:-2], 60, None)


@pytest.fixture
def model() -> ScriptedModel:
    return build_scripted_model(seeing=("eyes",))


@pytest.fixture
def handlers(model: ScriptedModel) -> ComparisonHandlers:
    return ComparisonHandlers(Engine(model))


def _finish(handlers: ComparisonHandlers, view: tuple[Any, ...]) -> list[Any]:
    """What the page shows at the end: the box, the question, the two answers, and what waits."""
    *_, last = handlers.answer(view[0])
    return list(last)


def test_both_answer_by_turns_under_their_question(handlers: ComparisonHandlers) -> None:
    comparison, box, question, *look, _ = handlers.ask(typed_in("Hello?"), None, *BASE_AND_ONE)
    assert has(box, {**BUSY, "value": EMPTY})
    assert "<p>Hello?</p>" in question
    assert look == [[{"role": "assistant", "content": "…"}]] * 2
    step = next(iter(handlers.answer(comparison)))
    assert [side[0]["content"][1]["text"][:8] for side in step[2:4]] == ["\u20631 token"] * 2
    box, question, left, right, _ = _finish(handlers, handlers.ask(typed_in("Hi"), None, *BASE_AND_ONE))
    assert has(box, IDLE) and "<p>Hi</p>" in question
    assert [text.split()[0] for side in (left, right) for text in texts(side)] == ["none", "one"]
    assert all("cut off at the length limit" in side[0]["content"][1]["text"] for side in (left, right))


@pytest.mark.parametrize("pair", [("one", "two"), ("two", "one"), ("one", NO_ADAPTER), ("eyes", "two")])
def test_any_two_experts_can_be_compared(pair: tuple[str, str], handlers: ComparisonHandlers) -> None:
    _, _, *sides, _ = _finish(handlers, handlers.ask(typed_in("Who?"), None, *pair, *KNOBS))
    assert [texts(side)[0].split()[0] for side in sides] == list(pair)
    names = ["bare base" if name == NO_ADAPTER else name for name in pair]
    assert all(
        f" · {name} · " in side[0]["content"][1]["text"] for name, side in zip(names, sides, strict=True)
    )


def test_one_on_both_sides_is_refused(handlers: ComparisonHandlers) -> None:
    for name in ("one", NO_ADAPTER):
        with pytest.warns(UserWarning, match="on both sides"):
            assert handlers.ask(typed_in("Hello?"), None, name, name, *KNOBS) == UNCHANGED


@pytest.mark.parametrize("bad", ["", "half \ud800"])
def test_a_bad_question_is_told_and_changes_nothing(bad: str, handlers: ComparisonHandlers) -> None:
    with pytest.warns(UserWarning):
        assert handlers.ask(typed_in(bad), None, *BASE_AND_ONE) == UNCHANGED
    assert len(list(handlers.answer(None))) == 1


def test_they_can_be_stopped(handlers: ComparisonHandlers) -> None:
    comparison, *_ = handlers.ask(typed_in("Hello?"), None, *BASE_AND_ONE)
    answering = handlers.answer(comparison)
    next(answering)
    _, box, _, left, right, _ = handlers.stop(comparison)
    assert has(box, IDLE)
    assert all(" · stopped" in side[0]["content"][1]["text"] for side in (left, right))
    assert len(list(answering)) <= 2
    assert has(handlers.stop(None)[1], IDLE)


def test_a_question_that_comes_meanwhile_waits_its_turn(handlers: ComparisonHandlers) -> None:
    comparison, *_ = handlers.ask(typed_in("First"), None, *BASE_AND_ONE)
    answering = handlers.answer(comparison)
    next(answering)
    _, box, question, *_, waiting = handlers.ask(typed_in("Second"), comparison, "two", "one", *KNOBS)
    assert has(box, BUSY) and "First" in question and waiting == "Next: “Second”"
    with pytest.warns(UserWarning, match="both sides"):
        handlers.ask(typed_in("Third"), comparison, "two", "two", *KNOBS)
    seen = [step[1:] for step in answering]
    ends = [left[0]["content"][1]["text"] for question, left, _, _ in seen if "First" in question]
    assert "12 tokens" in ends[-1] and "stopped" not in ends[-1]
    question, left, _, waiting = seen[-1]
    assert "Second" in question and texts(left)[0].startswith("two heard: S") and waiting == ""


# --- pictures -----------------------------------------------------------------------------------------------


def test_who_cannot_see_is_not_asked_about_a_picture(
    handlers: ComparisonHandlers, model: ScriptedModel, upload: Callable[..., Path]
) -> None:
    asked: list[str | None] = []
    prepare = model.prepare_request

    def watched(question: Question) -> Request:
        asked.append(question.adapter)
        return prepare(question)

    model.prepare_request = watched  # type: ignore[method-assign]
    red = upload("red.png", png("red"))
    view = handlers.ask(typed_in("What is it?", red), None, NO_ADAPTER, "eyes", *LONGER)
    _, question, left, right, _ = _finish(handlers, view)
    assert asked == ["eyes"]
    assert left[0]["content"][0]["text"] == "\u2063The bare base cannot see pictures, so it was not asked."
    assert "saw: #ff0000" in texts(right)[0]
    assert question.count('<img src="data:image/png;base64,') == 1
    view = handlers.ask(typed_in("What is it?", red, red), view[0], "eyes", "two", *LONGER)
    _, question, left, right, _ = _finish(handlers, view)
    assert "two cannot see pictures" in right[0]["content"][0]["text"]
    assert question.count("<img") == 2
    with pytest.warns(UserWarning, match="neither of the two sees pictures"):
        assert handlers.ask(typed_in("x", red), view[0], NO_ADAPTER, "two", *KNOBS) == UNCHANGED


def test_a_bad_picture_is_told_by_its_name(handlers: ComparisonHandlers, upload: Callable[..., Path]) -> None:
    with pytest.warns(UserWarning, match=re.escape("text.png: not a picture")):
        box = typed_in("What is it?", upload("text.png", b"some text"))
        assert handlers.ask(box, None, NO_ADAPTER, "eyes", *KNOBS) == UNCHANGED


def test_hostile_text_is_defused_in_the_question(handlers: ComparisonHandlers) -> None:
    question = handlers.ask(typed_in(HOSTILE), None, *BASE_AND_ONE)[2]
    assert not re.search(r"<(script|img|b)\b", question)

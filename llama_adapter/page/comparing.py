"""One question to two experts, answered side by side."""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import zip_longest
from typing import Any

import gradio as gr

from llama_adapter.answering.conversation import Conversation
from llama_adapter.answering.engine import Engine
from llama_adapter.common.errors import UsageError
from llama_adapter.decoding.answer import Answer
from llama_adapter.model import NO_ADAPTER
from llama_adapter.page.chats import Entry, Turns
from llama_adapter.page.chatting import BUSY, EMPTY, IDLE, read_question, read_settings, show_waiting
from llama_adapter.page.checks import warn
from llama_adapter.page.display import Message, answer_messages, named, note_message, pace
from llama_adapter.page.uploads import thumbnail_url

# A handler returns: the comparison, the box, the question, the two answers, and the waiting questions.
View = tuple[Any, Any, Any, Any, Any, Any]
UNCHANGED: View = (gr.skip(),) * 6


class Comparison(Turns):
    """Asks two experts one question at a time. Earlier questions are not remembered.

    Attributes:
        question: the latest one.
        sides: each expert's conversation about it. None for an expert that can't see the question's pictures:
            it is not asked, since it could only make something up.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine
        self.question: Entry | None = None
        self.sides: list[Conversation | None] = []

    @property
    def answers(self) -> list[Answer]:
        """The answers of those who were asked the latest question."""
        return [side.exchanges[-1].answer for side in self.sides if side is not None]

    @property
    def busy(self) -> bool:
        return any(answer.finish_reason is None for answer in self.answers)

    def check(self, question: Entry) -> None:
        for side in self._sides(question):
            if side is not None:
                side.check(question.text, question.pictures)

    def begin(self, question: Entry) -> None:
        sides = self._sides(question)
        for side in sides:
            if side is not None:
                side.ask(question.text, question.pictures)
        self.question, self.sides = question, sides

    def _sides(self, question: Entry) -> list[Conversation | None]:
        model, settings = self._engine.model, question.settings
        left, right = settings.adapters
        if left == right:
            raise UsageError(f"{named(left)} is chosen on both sides; choose another expert on one of them")
        blind = [bool(question.pictures) and not model.sees(adapter) for adapter in settings.adapters]
        if all(blind):
            raise UsageError("neither of the two sees pictures; choose an expert that does")
        return [
            None
            if cannot
            else Conversation(
                model,
                adapter=adapter,
                system=settings.system,
                sampling=settings.sampling,
                stream_chat=self._engine.stream_chat,
            )
            for adapter, cannot in zip(settings.adapters, blind, strict=True)
        ]


class ComparisonHandlers:
    """The handlers of the tab. ``settings`` are the names of the two experts, and then those of the chat."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def ask(self, box: dict[str, Any], comparison: Comparison | None, *settings: Any) -> View:
        """Ask both the same."""
        comparison = Comparison(self.engine) if comparison is None else comparison
        try:
            comparison.take(read_question(box, read_settings(settings, experts=2)))
        except UsageError as error:
            warn(error)
            return UNCHANGED
        return _view(comparison, value=EMPTY)

    def answer(self, comparison: Comparison | None) -> Iterator[tuple[Any, ...]]:
        """Let both answer in turn, a piece each, and then answer the questions that came meanwhile. Yields
        again and again the box, the question, the two answers and the waiting questions."""
        if comparison is None:
            yield UNCHANGED[1:]
            return
        for _ in comparison.rounds(warn):
            with ExitStack() as stack:
                answers = [stack.enter_context(closing(answer)) for answer in comparison.answers]
                for _ in pace(zip_longest(*answers)):
                    yield (gr.skip(), *_view(comparison)[2:])
            yield (gr.skip(), *_view(comparison)[2:])
        yield _view(comparison)[1:]

    def stop(self, comparison: Comparison | None) -> View:
        """Stop both answers. If a question is waiting, it is answered next."""
        if comparison is None:
            return (gr.skip(), gr.update(**IDLE), *UNCHANGED[:4])
        for answer in comparison.answers:
            answer.close()
        return _view(comparison)


def _view(comparison: Comparison, **box: Any) -> View:
    state = BUSY if comparison.busy or comparison.waiting else IDLE
    left, right = _answers(comparison)
    waiting = show_waiting(comparison)
    return comparison, gr.update(**state, **box), show_question(comparison.question), left, right, waiting


def _answers(comparison: Comparison) -> list[list[Message]]:
    if comparison.question is None:
        return [[], []]
    sides = zip(comparison.question.settings.adapters, comparison.sides, strict=True)
    return [_answer(adapter, side) for adapter, side in sides]


def _answer(adapter: str, side: Conversation | None) -> list[Message]:
    if side is None:
        name = "The bare base" if adapter == NO_ADAPTER else adapter
        return note_message(f"{name} cannot see pictures, so it was not asked.")
    latest = side.exchanges[-1]
    waiting = latest.answer.finish_reason is None
    # Gradio shows its moving dots only below a question.
    return answer_messages(latest, waiting=waiting) or [{"role": "assistant", "content": "…"}]


def show_question(question: Entry | None) -> str:
    """HTML of a question with small versions of its pictures."""
    if question is None:
        return ""
    pictures = "".join(
        f'<img src="{thumbnail_url(image)}" alt="picture {number}">'
        for number, image in enumerate(question.pictures, start=1)
    )
    return f'<div class="pictures">{pictures}</div><p>{html.escape(question.text)}</p>'

"""What happens when a person does something on the page."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import zip_longest
from typing import Any

import gradio as gr
from PIL import Image

from llama_adapter.answering.conversation import Conversation
from llama_adapter.answering.engine import Engine
from llama_adapter.common.errors import UsageError
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.decoding.streams import Answer
from llama_adapter.model import NO_ADAPTER
from llama_adapter.page.checks import check_length, read_sampling
from llama_adapter.page.display import answer_messages, messages, pace, typed
from llama_adapter.page.inside import show_answer, show_gates
from llama_adapter.page.science import EXAMPLES, labelled, score
from llama_adapter.page.uploads import PICTURE_EXAMPLES, open_given, picture_file

# The box that a question is typed in, while nobody answers and while somebody does.
IDLE: dict[str, Any] = {"submit_btn": "Send", "stop_btn": False}
BUSY: dict[str, Any] = {"submit_btn": False, "stop_btn": "Stop"}

EMPTY: dict[str, Any] = {"text": "", "files": []}


class Handlers:
    """What the page's events call. All that is kept of a person is a conversation in Gradio's session state.

    A question is taken at once, its pictures encoded; its answer waits for the model.
    ``settings`` are the name of the adapter, the system text and what `read_sampling` takes.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.model = engine.model

    # --- the chat: the box, what the chat looks like, the conversation ---

    def ask(self, box: dict[str, Any], chat: Conversation | None, *settings: Any) -> tuple[Any, ...]:
        """Take what was typed out of the box, with the pictures there."""
        return self._take(lambda chat: chat.ask(*_read_box(box)), chat, settings, value=EMPTY)

    def ask_example(self, event: gr.SelectData, chat: Conversation | None, *settings: Any) -> tuple[Any, ...]:
        """Take the example that was clicked; its picture is ours, whatever file the click names."""
        text = event.value["text"]
        pictures = [PICTURE_EXAMPLES[text]] if text in PICTURE_EXAMPLES else []
        return self._take(lambda chat: chat.ask(check_length(text), pictures), chat, settings)

    def retry(self, chat: Conversation | None, *settings: Any) -> tuple[Any, ...]:
        """Take the last question again."""
        return self._take(Conversation.retry, chat, settings)

    def edit(self, event: gr.EditData, chat: Conversation | None, *settings: Any) -> tuple[Any, ...]:
        """Take an earlier question in its new words."""
        index = event.index if isinstance(event.index, int) else event.index[0]
        return self._take(
            lambda chat: chat.edit(index // 2, check_length(typed(event.value))), chat, settings
        )

    def _take(
        self,
        ask: Callable[[Conversation], Answer],
        chat: Conversation | None,
        settings: tuple[Any, ...],
        **box: Any,
    ) -> tuple[Any, ...]:
        chat = self._converse() if chat is None else chat
        try:
            chat.adapter, chat.system, chat.sampling = _read(settings)
            ask(chat)
        except UsageError as error:
            _warn(error)
            return gr.skip(), gr.skip(), gr.skip()
        return gr.update(**BUSY, **box), messages(chat, waiting=True), chat

    def _converse(self, **settings: Any) -> Conversation:
        return Conversation(self.model, stream_chat=self.engine.stream_chat, **settings)

    def answer(self, chat: Conversation | None) -> Iterator[tuple[Any, ...]]:
        """Give the answer to the question that was taken: the box and the chat, again and again."""
        if chat is None or not chat.exchanges:
            yield gr.skip(), gr.skip()
            return
        latest = chat.exchanges[-1]
        with closing(latest.answer) as answer:  # also where the person closed the page
            for _ in pace(answer):
                yield gr.skip(), messages(chat, waiting=True)
        if chat.exchanges and chat.exchanges[-1] is latest:  # else the box is busy with the next question
            yield gr.update(**IDLE), messages(chat)

    def stop(self, chat: Conversation | None) -> tuple[Any, Any]:
        """End the answer where it is."""
        if chat is None or not chat.exchanges:
            return gr.update(**IDLE), gr.skip()
        chat.exchanges[-1].answer.close()
        return gr.update(**IDLE), messages(chat)

    def undo(self, chat: Conversation | None) -> tuple[Any, Any]:
        """Forget the last exchange; its question is back in the box, with its pictures."""
        if chat is None or not chat.exchanges:
            return gr.skip(), gr.skip()
        files = [picture_file(image) for image in chat.exchanges[-1].images]
        return {"text": chat.undo(), "files": files}, messages(chat)

    def clear(self, chat: Conversation | None) -> tuple[Any, Any]:
        """Forget everything."""
        if chat is not None:
            chat.clear()
        return gr.update(**IDLE), []

    def attach(self, photo: str | None, box: dict[str, Any]) -> tuple[Any, Any]:
        """Put the photo that was just taken into the box, and have the camera ready for another."""
        if photo is None:
            return gr.skip(), gr.skip()
        return {**box, "files": [*box["files"], photo]}, None

    # --- side by side: the box, the two answers, their conversations ---

    def ask_both(self, box: dict[str, Any], *settings: Any) -> tuple[Any, ...]:
        """Ask the bare base and the adapter the same; pictures go to the adapter alone."""
        try:
            adapter, system, sampling = _read(settings)
            if adapter == NO_ADAPTER:
                raise UsageError("the bare base would answer on both sides; choose an adapter above")
            question, pictures = _read_box(box)
            pair = [
                self._converse(adapter=name, system=system, sampling=sampling)
                for name in (NO_ADAPTER, adapter)
            ]
            for side, seen in zip(pair, ([], pictures), strict=True):
                side.ask(question, seen)
        except UsageError as error:
            _warn(error)
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        return gr.update(**BUSY), *_answers(pair, waiting=True), pair

    def answer_both(self, pair: list[Conversation] | None) -> Iterator[tuple[Any, ...]]:
        """Let the two answer by turns, a piece each."""
        if not pair:
            yield gr.skip(), gr.skip(), gr.skip()
            return
        left, right = (side.exchanges[-1].answer for side in pair)
        with closing(left), closing(right):
            for _ in pace(zip_longest(left, right)):
                yield gr.skip(), *_answers(pair, waiting=True)
        yield gr.update(**IDLE), *_answers(pair)

    def stop_both(self, pair: list[Conversation] | None) -> tuple[Any, ...]:
        """End the two answers where they are."""
        for side in pair or ():
            side.exchanges[-1].answer.close()
        return gr.update(**IDLE), *(_answers(pair) if pair else (gr.skip(), gr.skip()))

    # --- ScienceQA ---

    def score(self, box: dict[str, Any], options: str, context: str, adapter: str) -> Any:
        """The options with their probabilities."""
        try:
            choices = [line.strip() for line in check_length(options).splitlines() if line.strip()]
            shares = score(self.model, box["text"], choices, context, box["files"], adapter)
        except UsageError as error:
            _warn(error)
            return gr.skip()
        return labelled(choices, shares)

    def fill(self, number: int | None) -> tuple[Any, ...]:
        """Put an example into the form."""
        if number is None:
            return (gr.skip(),) * 4
        question, options, context, picture = EXAMPLES[number]
        files = [] if picture is None else [picture_file(PICTURE_EXAMPLES[picture])]
        return {"text": question, "files": files}, options, context, None

    # --- look inside ---

    def show_gates(self, adapter: str) -> str:
        """The heat map of an adapter's gates."""
        return show_gates(self.model, adapter)

    def show_answer(self, chat: Conversation | None) -> str:
        """The heat map of the chat's latest answer."""
        return show_answer(self.model, chat)


def _read(settings: tuple[Any, ...]) -> tuple[str, str, Sampling]:
    adapter, system, *knobs = settings
    return adapter, check_length(system), read_sampling(*knobs)


def _read_box(box: dict[str, Any]) -> tuple[str, list[Image.Image]]:
    return check_length(box["text"]), open_given(box["files"])


def _warn(error: UsageError) -> None:
    gr.Warning(html.escape(str(error)), title="")  # it may quote the person, and Gradio takes it for HTML


def _answers(pair: list[Conversation], *, waiting: bool = False) -> list[Any]:
    left, right = (side.exchanges[-1] for side in pair)
    look = [
        answer_messages(left, waiting=waiting, unseen=bool(right.images)),
        answer_messages(right, waiting=waiting),
    ]
    # Gradio's moving dots come only under a question.
    return [answer or [{"role": "assistant", "content": "…"}] for answer in look]

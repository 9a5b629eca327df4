"""The handlers of the chat: what happens when a person does something there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import gradio as gr

from llama_adapter.answering.conversation import Conversation
from llama_adapter.answering.engine import Engine
from llama_adapter.common.errors import UsageError
from llama_adapter.page.chats import Chat, Chats, Entry, Settings, Turns
from llama_adapter.page.checks import check_length, read_sampling, warn
from llama_adapter.page.display import messages, pace, shown, typed
from llama_adapter.page.inside import show_answer
from llama_adapter.page.kept import Kept, as_json, as_markdown, pack, unpack
from llama_adapter.page.suggestions import PICTURE_EXAMPLES
from llama_adapter.page.uploads import open_given, picture_file

# The box for a question, while no answer is being made and while one is.
IDLE: dict[str, Any] = {"submit_btn": "Send", "stop_btn": False}
BUSY: dict[str, Any] = {"submit_btn": False, "stop_btn": "Stop"}

EMPTY: dict[str, Any] = {"text": "", "files": []}

# A handler of the chat returns: the person's chats, what the browser keeps of them, the box, the chat's
# messages, the list of chats, and the waiting questions.
View = tuple[Any, Any, Any, Any, Any, Any]
UNCHANGED: View = (gr.skip(),) * 6


class ChatHandlers:
    """The handlers of the chat's events. The only state of a person is their `Chats`, in Gradio's session.

    A question is accepted at once and its pictures are encoded; the answer waits for the model. ``settings``
    are the name of the adapter, the system text and the arguments of `read_sampling`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.model = engine.model

    # --- questions ---

    def ask(self, box: dict[str, Any], chats: Chats | None, *settings: Any) -> View:
        """Ask what was typed in the box, with its pictures."""
        return self._take(
            lambda chats: chats.open.take(read_question(box, read_settings(settings))), chats, value=EMPTY
        )

    def ask_example(self, event: gr.SelectData, chats: Chats | None, *settings: Any) -> View:
        """Ask the example that was clicked. Its picture is ours, whatever file the click names."""
        text = event.value["text"]
        drawn = [own.picture for own in PICTURE_EXAMPLES if own.text == text and own.picture is not None]
        pictures = tuple(drawn)

        def take(chats: Chats) -> None:
            chats.open.take(Entry(check_length(text), pictures, read_settings(settings)))

        return self._take(take, chats)

    def retry(self, chats: Chats | None, *settings: Any) -> View:
        """Ask the last question again."""

        def again(chats: Chats) -> None:
            chats.open.set(read_settings(settings))
            chats.open.conversation.retry()

        return self._take(again, chats)

    def edit(self, event: gr.EditData, chats: Chats | None, *settings: Any) -> View:
        """Ask an earlier question again in its new words."""
        index = event.index if isinstance(event.index, int) else event.index[0]

        def anew(chats: Chats) -> None:
            chats.open.set(read_settings(settings))
            chats.open.conversation.edit(index // 2, check_length(typed(event.value)))

        return self._take(anew, chats)

    def _take(self, act: Callable[[Chats], None], chats: Chats | None, **box: Any) -> View:
        chats = Chats(self.new_conversation) if chats is None else chats
        try:
            act(chats)
        except UsageError as error:
            warn(error)
            return UNCHANGED
        return self._view(chats, **box)

    def new_conversation(self) -> Conversation:
        """An empty conversation, answered by the engine."""
        return Conversation(self.model, stream_chat=self.engine.stream_chat)

    # --- answers ---

    def answer(self, chats: Chats | None) -> Iterator[tuple[Any, Any, Any]]:
        """Make the answer to the question, and to those that come meanwhile. Yields again and again the box,
        the chat's messages, and the waiting questions. Gradio's dots move until the first yield, so that one
        comes with the first word."""
        if chats is None:
            yield UNCHANGED[:3]
            return
        chat = chats.open

        def view(**box: Any) -> tuple[Any, Any, Any]:
            if chats.open is not chat:  # the person is looking at another chat
                return UNCHANGED[:3]
            look = messages(chat.conversation, waiting=chat.busy)
            return gr.update(**box) if box else gr.skip(), look, show_waiting(chat)

        for number, _ in enumerate(chat.rounds(warn)):
            if number:
                yield view()  # the whole previous answer, and the question whose turn has come
            with closing(chat.conversation.exchanges[-1].answer) as answer:  # also if the page is closed
                for _ in pace(answer):
                    yield view()
        yield view(**(BUSY if chat.busy else IDLE))

    def save(self, chats: Chats | None) -> Any:
        """What the browser should keep."""
        return gr.skip() if chats is None else self._pack(chats)

    def stop(self, chats: Chats | None) -> View:
        """Stop the answer. If a question is waiting, it is answered next."""
        if chats is None or chats.open.empty:
            return (*UNCHANGED[:2], gr.update(**IDLE), *UNCHANGED[:3])
        chats.open.conversation.exchanges[-1].answer.close()
        return self._view(chats)

    # --- chats ---

    def load(self, kept: Any, chats: Chats | None) -> tuple[Any, ...]:
        """The chats and the expert that the person's browser kept, for when the page is opened."""
        if kept is None or chats is not None:  # nothing kept, or they asked something before it arrived
            return (gr.skip(), *UNCHANGED)
        try:
            chats = unpack(kept, self.new_conversation)
        except UsageError as error:
            warn(error)
            return (gr.skip(), *UNCHANGED)
        look = self._view(chats)
        return (chats.adapter if self._offers(chats.adapter) else gr.skip(), look[0], gr.skip(), *look[2:])

    def choose_expert(self, adapter: str, chats: Chats | None) -> tuple[Any, Any]:
        """Remember which expert was chosen."""
        chats = Chats(self.new_conversation) if chats is None else chats
        chats.adapter = adapter
        return chats, pack(chats)

    def start(self, chats: Chats | None) -> View:
        """Open a new chat."""
        return self._take(Chats.start, chats)

    def choose(self, key: str, chats: Chats | None) -> View:
        """Open another chat. If an answer is being made in the previous one, it continues."""
        return self._take(lambda chats: chats.choose(key), chats)

    def delete(self, chats: Chats | None) -> View:
        """Delete the open chat."""
        return self._take(Chats.delete, chats)

    def undo(self, chats: Chats | None) -> View:
        """Remove the last exchange. Its question goes back into the box, with its pictures."""
        if chats is None or chats.open.empty:
            return UNCHANGED
        conversation = chats.open.conversation
        files = [picture_file(image) for image in conversation.exchanges[-1].images]
        return self._view(chats, value={"text": conversation.undo(), "files": files})

    def save_json(self, chats: Chats | None) -> Any:
        """The open chat as a JSON file."""
        return self._save(chats, as_json)

    def save_markdown(self, chats: Chats | None) -> Any:
        """The open chat as a Markdown file."""
        return self._save(chats, as_markdown)

    def _save(self, chats: Chats | None, write: Callable[[Chat], dict[str, str]]) -> Any:
        if chats is None or chats.open.empty:
            raise gr.Error("there is nothing to save yet", print_exception=False, title="")
        return write(chats.open)

    def _offers(self, adapter: str | None) -> bool:
        try:
            self.model.template(adapter)
        except UsageError:  # the adapter was there when the browser was told of it
            return False
        return adapter is not None

    # --- others ---

    def attach(self, photo: str | None, box: dict[str, Any]) -> tuple[Any, Any]:
        """Put the photo that was just taken into the box, and reset the camera."""
        if photo is None:
            return gr.skip(), gr.skip()
        return {**box, "files": [*box["files"], photo]}, None

    def show_answer(self, chats: Chats | None) -> str:
        """The heat map of the open chat's latest answer."""
        return show_answer(self.model, None if chats is None else chats.open.conversation)

    def _view(self, chats: Chats, **box: Any) -> View:
        """Everything on the page that a change in the chats may affect."""
        chat = chats.open
        return (
            chats,
            self._pack(chats),
            gr.update(**(BUSY if chat.busy or chat.waiting else IDLE), **box),
            messages(chat.conversation, waiting=chat.busy),
            gr.update(choices=[(each.title, each.key) for each in chats.all], value=chat.key),
            show_waiting(chat),
        )

    def _pack(self, chats: Chats) -> Kept:
        before = chats.left_out
        kept = pack(chats)
        if chats.left_out > before:
            gr.Info(
                "This browser has no room for all chats. The oldest will be gone when the page is opened "
                "again; save it as a file, or delete some.",
                title="",
            )
        return kept


def show_waiting(turns: Turns) -> str:
    """The waiting questions, as Markdown."""
    lines = []
    for question in turns.waiting:
        number = len(question.pictures)
        pictures = f" (with {number} picture{'' if number == 1 else 's'})" if number else ""
        text = " ".join(question.text.split())
        lines.append(f"“{text if len(text) <= 60 else f'{text[:59]}…'}”{pictures}")
    return shown(f"Next: {', '.join(lines)}") if lines else ""


def read_settings(settings: tuple[Any, ...], *, experts: int = 1) -> Settings:
    """The settings in the page's fields: the names of the experts, the system text and the arguments of
    `read_sampling`. Raises UsageError for a wrong one."""
    system, *knobs = settings[experts:]
    return Settings(settings[:experts], check_length(system), read_sampling(*knobs))


def read_question(box: dict[str, Any], settings: Settings) -> Entry:
    """The question in the box. Raises UsageError for something that is not text or not a picture."""
    return Entry(check_length(box["text"]), tuple(open_given(box["files"])), settings)

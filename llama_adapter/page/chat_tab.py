"""The tab "Chat": its components, and the handlers that they call."""

from __future__ import annotations

from typing import Any

import gradio as gr

from llama_adapter.model import LlamaAdapter
from llama_adapter.page.chatting import ChatHandlers
from llama_adapter.page.parts import chat_window, question_box
from llama_adapter.page.script import SAVE_FILE, STORAGE_KEY
from llama_adapter.page.suggestions import PICTURE_EXAMPLES, TEXT_EXAMPLES, fitting
from llama_adapter.page.uploads import data_url
from llama_adapter.page.wiring import ANSWERING, AT_ONCE, PRIVATE, TAKING


def offered(model: LlamaAdapter, adapter: str) -> list[dict[str, Any]]:
    """The questions that an empty chat suggests; equally many for every adapter."""
    pictured = fitting(PICTURE_EXAMPLES, model.base) if model.sees(adapter) else []
    plain = fitting(TEXT_EXAMPLES, model.base)
    examples = [*pictured, *plain[: len(plain) - len(pictured)]]
    return [
        {"text": example.text}
        if example.picture is None
        # Without a path, since there is no file.
        else {
            "text": example.text,
            "files": [{"path": "", "url": data_url(example.picture), "mime_type": "image/png"}],
        }
        for example in examples
    ]


def chat_tab(
    handlers: ChatHandlers,
    page: gr.Blocks,
    expert: gr.Dropdown,
    settings: list[gr.components.Component],
    limits: gr.Markdown,
) -> gr.State:
    """Build the tab.

    Under the box it states the model's limits. Returns the state with the person's chats.
    """
    chats = gr.State()
    # This "secret" hides nothing. It only keeps a browser's chats readable when the page is served again.
    kept = gr.BrowserState(storage_key=STORAGE_KEY, secret="llama-adapter")
    with gr.Row(elem_id="chats"):
        picker = gr.Dropdown(
            [("Untitled chat", "")],
            value="",
            label="Your chats",
            show_label=False,
            container=False,
            filterable=False,
            min_width=120,
            scale=5,
        )
        start = gr.Button("New chat", size="sm", min_width=90, scale=0)
    bot = chat_window(
        "Conversation",
        elem_id="chat",
        editable="user",
        buttons=["copy", "copy_all"],
        placeholder="Ask something, or begin with one of these.",
        examples=offered(handlers.model, handlers.model.active_adapter),
    )
    expert.change(lambda name: gr.update(examples=offered(handlers.model, name)), expert, bot, **AT_ONCE)
    waiting = gr.Markdown(elem_classes=["line", "waiting"])
    box = question_box("Ask something", elem_id="box")
    limits.render()
    view = [chats, kept, box, bot, picker, waiting]

    takes = [
        box.submit(handlers.ask, [box, chats, *settings], view, **TAKING),
        bot.example_select(handlers.ask_example, [chats, *settings], view, **TAKING),
        bot.retry(handlers.retry, [chats, *settings], view, **TAKING),
        bot.edit(handlers.edit, [chats, *settings], view, **TAKING),
    ]
    for take in takes:
        answer = take.success(handlers.answer, chats, [box, bot, waiting], show_progress_on=bot, **ANSWERING)
        answer.then(handlers.save, chats, kept, **AT_ONCE)
    box.stop(handlers.stop, chats, view, **AT_ONCE)
    bot.undo(handlers.undo, chats, view, **AT_ONCE)
    bot.clear(handlers.delete, chats, view, **AT_ONCE)
    start.click(handlers.start, chats, view, **TAKING)
    picker.input(handlers.choose, [picker, chats], view, **AT_ONCE)
    page.load(handlers.load, [kept, chats], [expert, *view], **AT_ONCE)
    expert.input(handlers.choose_expert, [expert, chats], [chats, kept], **AT_ONCE)
    _more(handlers, chats, box, view)
    return chats


def _more(
    handlers: ChatHandlers, chats: gr.State, box: gr.MultimodalTextbox, view: list[gr.components.Component]
) -> None:
    """Things that are needed less often, folded away."""
    with gr.Accordion("Take a photo", open=False):
        camera = gr.Image(sources=["webcam"], type="filepath", show_label=False, label="Camera", height=320)
    camera.input(handlers.attach, [camera, box], [box, camera], **AT_ONCE)
    with gr.Accordion("Save or delete this chat", open=False):
        gr.Markdown(
            "Your chats are kept in this browser alone; they are still there when you open the page again.",
            elem_classes="line",
        )
        with gr.Row():
            markdown = gr.Button("Save as Markdown", size="sm", min_width=120)
            json = gr.Button("Save as JSON", size="sm", min_width=120)
            delete = gr.Button("Delete this chat", variant="stop", size="sm", min_width=120)
        file = gr.JSON(visible="hidden")
    for button, write in ((markdown, handlers.save_markdown), (json, handlers.save_json)):
        button.click(write, chats, file, **TAKING).success(None, file, None, js=SAVE_FILE, **PRIVATE)
    delete.click(handlers.delete, chats, view, **AT_ONCE)

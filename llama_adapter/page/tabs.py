"""The tabs "Side by side", "ScienceQA" and "Look inside": their components and handlers."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.page import science
from llama_adapter.page.chatting import ChatHandlers
from llama_adapter.page.checks import MAX_CHARACTERS
from llama_adapter.page.comparing import ComparisonHandlers
from llama_adapter.page.inside import ANSWER, GATES, show_gates
from llama_adapter.page.parts import chat_window, expert_menu, question_box
from llama_adapter.page.suggestions import SCIENCE_EXAMPLES, TEXT_EXAMPLES, fitting
from llama_adapter.page.wiring import ANSWERING, AT_ONCE, BY_MODEL, PRIVATE, TAKING


def comparison_tab(
    handlers: ComparisonHandlers,
    experts: dict[str, str],
    expert: gr.Dropdown,
    settings: list[gr.components.Component],
) -> None:
    """One question to two experts. The right one is the expert of the chat, until another is chosen."""
    comparison = gr.State()
    box = question_box("Ask both the same")
    waiting = gr.Markdown(elem_classes=["line", "waiting"])
    examples = gr.Examples(
        [[{"text": example.text}] for example in fitting(TEXT_EXAMPLES, handlers.engine.model.base)],
        box,
        label="For example",
        api_visibility="private",
    )
    question = gr.HTML(elem_id="question", padding=False)
    look: dict[str, Any] = {"height": "40vh", "min_height": 200, "buttons": ["copy"]}
    active = handlers.engine.model.active_adapter
    right_one = next(name for name in (active, *experts) if name != NO_ADAPTER or len(experts) == 1)
    with gr.Row():
        with gr.Column(min_width=260):
            left = expert_menu(experts, NO_ADAPTER, "Left", elem_classes="side")
            left_bot = chat_window(
                "Answer on the left", elem_classes="answer", placeholder="Its answer comes here.", **look
            )
        with gr.Column(min_width=260):
            right = expert_menu(experts, right_one, "Right", elem_classes="side")
            right_bot = chat_window(
                "Answer on the right", elem_classes="answer", placeholder="Its answer comes here.", **look
            )
    view = [comparison, box, question, left_bot, right_bot, waiting]
    for trigger in (box.submit, examples.load_input_event.success):
        take = trigger(handlers.ask, [box, comparison, left, right, *settings], view, **TAKING)
        take.success(
            handlers.answer, comparison, view[1:], show_progress_on=[left_bot, right_bot], **ANSWERING
        )
    box.stop(handlers.stop, comparison, view, **AT_ONCE)
    expert.change(lambda name, other: gr.skip() if name == other else name, [expert, left], right, **AT_ONCE)


def science_tab(model: LlamaAdapter, expert: gr.Dropdown) -> None:
    """A question with options, and how likely each is."""
    with gr.Row():
        with gr.Column(scale=3, min_width=260):
            example = gr.Dropdown(
                [(own.text, SCIENCE_EXAMPLES.index(own)) for own in fitting(SCIENCE_EXAMPLES, model.base)],
                value=None,
                label="An example",
                info="Fills in the fields below, which can be changed.",
                filterable=False,
            )
            box = question_box(
                "Attach a picture if it is about one", label="Question", show_label=True, submit_btn=False
            )
            options = gr.Textbox(
                label="Options",
                info="The possible answers, one a line, 2 to 5.",
                lines=4,
                max_lines=8,
                max_length=MAX_CHARACTERS,
            )
            context = gr.Textbox(
                label="Context",
                info="What one has to know to answer; may be empty.",
                max_lines=4,
                max_length=MAX_CHARACTERS,
            )
            button = gr.Button("Answer", variant="primary")
        with gr.Column(scale=2, min_width=260):
            found = gr.Label(label="Answer", num_top_classes=5)
            note = gr.Markdown(elem_id="science-note", elem_classes="line")
            trained = "".join(
                f" **{name}** was trained on such questions: auto asks it."
                for name in science.trained_for_it(model)
            )
            gr.Markdown(
                "How likely the adapter finds each option as the answer: by its letter or by its text, in "
                "the given order or as the mean over rotations of the options, whichever it is better at. "
                f"The question is put to it as in the paper's ScienceQA experiments.{trained}"
            )
    example.input(science.fill, example, [box, options, context, found, note], **AT_ONCE)
    answer = partial(science.answer, model)
    for trigger in (box.submit, button.click):
        trigger(
            answer,
            [box, options, context, expert],
            [found, note],
            **PRIVATE,
            **BY_MODEL,
            show_progress_on=found,
        )


def inside_tab(handlers: ChatHandlers, expert: gr.Dropdown, chats: gr.State, tab: gr.Tab) -> None:
    """Heat maps of an adapter's gates, and of its effect on the chat's latest answer."""
    model = handlers.model
    gr.Markdown(f"### The gates\n\n{GATES}")
    gates = gr.HTML(show_gates(model, model.active_adapter), elem_id="gates", padding=False)
    expert.change(partial(show_gates, model), expert, gates, **AT_ONCE)
    gr.Markdown(f"### The chat's latest answer\n\n{ANSWER}")
    answer = gr.HTML(elem_id="influence", padding=False)
    tab.select(handlers.show_answer, chats, answer, **PRIVATE, **BY_MODEL, show_progress_on=answer)

"""Components that several tabs use: the box for a question, the chat, the settings of an answer."""

from __future__ import annotations

from typing import Any

import gradio as gr

from llama_adapter.decoding.sampling import Sampling
from llama_adapter.model import NO_ADAPTER
from llama_adapter.page.chatting import EMPTY, IDLE
from llama_adapter.page.checks import MAX_CHARACTERS, MAX_NEW_TOKENS


def question_box(placeholder: str, **options: Any) -> gr.MultimodalTextbox:
    """The box for typing a question and adding pictures."""
    look: dict[str, Any] = {"label": "Your question", "show_label": False, **IDLE, **options}
    return gr.MultimodalTextbox(
        EMPTY,
        placeholder=placeholder,
        file_types=["image"],
        file_count="multiple",
        lines=1,
        max_lines=8,
        max_plain_text_length=10**9,  # Gradio would turn a longer pasted text into a file
        **look,
    )


def chat_window(label: str, **options: Any) -> gr.Chatbot:
    """The window that shows questions and answers."""
    return gr.Chatbot(
        label=label,
        show_label=False,
        latex_delimiters=[],  # so that prices are not read as formulas
        feedback_options=None,
        allow_tags=False,
        allow_file_downloads=False,  # the person already has the picture
        group_consecutive_messages=False,  # a question grouped with its picture can't be edited
        **options,
    )


def expert_menu(experts: dict[str, str], chosen: str, label: str, **options: Any) -> gr.Dropdown:
    """A menu of the adapters and the bare base."""
    return gr.Dropdown(
        [("none: the bare base" if name == NO_ADAPTER else name, name) for name in experts],
        value=chosen,
        label=label,
        filterable=False,
        **options,
    )


def answer_settings() -> list[gr.components.Component]:
    """The system text, and the arguments of `read_sampling` in order."""
    defaults = Sampling()

    def slider(low: float, high: float, value: float, *, step: float, label: str, info: str) -> gr.Slider:
        return gr.Slider(low, high, value, step=step, label=label, info=info, min_width=340)

    with gr.Row():
        temperature = slider(
            0,
            2,
            defaults.temperature,
            step=0.05,
            label="Temperature",
            info="How much chance decides. 0: always the likeliest word; above 1: often an unlikely one.",
        )
        top_p = slider(
            0.05,
            1,
            defaults.top_p,
            step=0.05,
            label="Top-p",
            info="Only the likeliest words that together have this probability. 1: all words.",
        )
        top_k = slider(
            0,
            200,
            defaults.top_k,
            step=1,
            label="Top-k",
            info="Only this many of the likeliest words. 0: all words.",
        )
        penalty = slider(
            1,
            2,
            defaults.repetition_penalty,
            step=0.05,
            label="Repetition penalty",
            info="Makes words that were used already less likely. 1: off; 1.1 to 1.3 ends most loops.",
        )
        length = slider(
            16,
            MAX_NEW_TOKENS,
            defaults.max_new_tokens,
            step=16,
            label="Longest answer",
            info="In tokens, about ¾ of a word each. A longer answer is cut off there, and says so.",
        )
        seed = gr.Textbox(
            "",
            label="Seed",
            info="A number here gives the same answer to the same question again. Empty: it may differ.",
            max_length=20,
            min_width=340,
        )
    system = gr.Textbox(
        "",
        label="System text",
        info="Read before the conversation: how the model is to behave, such as “Answer in one sentence.”",
        max_lines=4,
        max_length=MAX_CHARACTERS,
    )
    return [system, temperature, top_p, top_k, penalty, length, seed]

"""The page: what is on it, and which of the handlers each thing calls."""

from __future__ import annotations

from typing import Any

import gradio as gr

from llama_adapter.answering.engine import Engine
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.page.checks import MAX_CHARACTERS, MAX_NEW_TOKENS
from llama_adapter.page.display import shown
from llama_adapter.page.endpoints import Endpoints
from llama_adapter.page.handlers import IDLE, Handlers
from llama_adapter.page.inside import ANSWER, GATES, show_gates
from llama_adapter.page.science import EXAMPLES as SCIENCE_EXAMPLES
from llama_adapter.page.science import trained_for_it
from llama_adapter.page.uploads import PICTURE_EXAMPLES, data_url

EXAMPLES = (
    "Give three tips for staying healthy.",
    "Explain to a child why the sky is blue.",
    "Write a short poem about the sea.",
    "What is the capital of France?",
)

# On no list of endpoints.
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
# Not in the queue either.
AT_ONCE: dict[str, Any] = {**PRIVATE, "queue": False, "show_progress": "hidden"}
# In the queue, or there would be no warnings, but next to whatever else is there.
TAKING: dict[str, Any] = {**PRIVATE, "concurrency_limit": None, "show_progress": "hidden"}
# As many as are answered at once; the others see their place in the queue.
PEOPLE = 8
BY_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": PEOPLE}
# A new question ends the answer before it, so it must not be dropped while that one still runs.
ANSWERING: dict[str, Any] = {**PRIVATE, **BY_MODEL, "trigger_mode": "multiple", "show_progress": "minimal"}


def build_page(model: LlamaAdapter, experts: dict[str, str], *, max_queue: int = 20) -> gr.Blocks:
    """The page for a model whose adapters are loaded.

    Args:
        experts: a line about each adapter by name, and about `NO_ADAPTER`.
        max_queue: how many may wait for the model.
    """
    engine = Engine(model, rows=2 * PEOPLE)  # side by side, everybody takes two
    handlers = Handlers(engine)
    endpoints = Endpoints(engine)
    # What was uploaded is kept for a day, or until the page is closed.
    cleared = (3600, 24 * 3600)
    with gr.Blocks(title="LLaMA-Adapter", analytics_enabled=False, delete_cache=cleared) as page:
        gr.api(endpoints.answer, api_name="answer", **BY_MODEL)
        gr.api(endpoints.chat, api_name="chat", **BY_MODEL)
        gr.api(endpoints.score, api_name="score", **BY_MODEL)

        with gr.Row(elem_id="header"):
            with gr.Column(scale=3, min_width=260):
                gr.Markdown("# LLaMA-Adapter")
                line = gr.Markdown(shown(experts[model.active_adapter]), elem_id="line", latex_delimiters=[])
            expert = gr.Dropdown(
                [("none: the bare base" if name == NO_ADAPTER else name, name) for name in experts],
                value=model.active_adapter,
                label="Adapter",
                filterable=False,
                scale=2,
                min_width=260,
            )
        expert.change(lambda name: shown(experts[name]), expert, line, **AT_ONCE)

        with gr.Accordion("How the answer is made", open=False, render=False) as settings:
            inputs = [expert, *_settings()]
        with gr.Tab("Chat"):
            chat = _chat(handlers, expert, inputs)
        with gr.Tab("Side by side"):
            _side_by_side(handlers, inputs)
        with gr.Tab("ScienceQA"):
            _science(handlers, expert)
        with gr.Tab("Look inside") as inside:
            _look_inside(handlers, expert, chat, inside)
        settings.render()
    page.queue(max_size=max_queue)
    return page


def _settings() -> list[gr.components.Component]:
    """The system text, and what `read_sampling` takes, in its order."""
    defaults = Sampling()

    def slider(low: float, high: float, value: float, *, step: float, label: str, info: str) -> gr.Slider:
        return gr.Slider(low, high, value, step=step, label=label, info=info, min_width=220)

    with gr.Row():
        temperature = slider(
            0, 2, defaults.temperature, step=0.05, label="Temperature", info="more varies more"
        )
        top_p = slider(0.05, 1, defaults.top_p, step=0.05, label="Top-p", info="of the likeliest; 1 is all")
        top_k = slider(0, 200, defaults.top_k, step=1, label="Top-k", info="of the likeliest; 0 is all")
    with gr.Row():
        penalty = slider(
            1, 2, defaults.repetition_penalty, step=0.05, label="Repetition penalty", info="1 is none"
        )
        length = slider(
            16, MAX_NEW_TOKENS, defaults.max_new_tokens, step=16, label="Longest answer", info="in tokens"
        )
        seed = gr.Textbox(
            "", label="Seed", info="empty: another answer every time", max_length=20, min_width=220
        )
    system = gr.Textbox(
        "", label="System text", info="how the model shall behave", max_lines=4, max_length=MAX_CHARACTERS
    )
    return [system, temperature, top_p, top_k, penalty, length, seed]


def _box(placeholder: str, **options: Any) -> gr.MultimodalTextbox:
    look: dict[str, Any] = {"label": "Your question", "show_label": False, **IDLE, **options}
    return gr.MultimodalTextbox(
        placeholder=placeholder,
        file_types=["image"],
        file_count="multiple",
        lines=1,
        max_lines=8,
        max_plain_text_length=10**9,  # of a pasted text: a longer one would become a file
        **look,
    )


def _bot(label: str, **options: Any) -> gr.Chatbot:
    return gr.Chatbot(
        label=label,
        show_label=False,
        latex_delimiters=[],  # prices are no formulas
        feedback_options=None,
        allow_tags=False,
        allow_file_downloads=False,  # the person has the picture
        group_consecutive_messages=False,  # a question in one bubble with its picture can't be edited
        **options,
    )


def offered(model: LlamaAdapter, adapter: str) -> list[dict[str, Any]]:
    """What the empty chat offers to ask, as many for every adapter."""
    if not model.sees(adapter):
        return [{"text": text} for text in EXAMPLES]
    drawn = [  # no path: there is no file
        {"text": text, "files": [{"path": "", "url": data_url(image), "mime_type": "image/png"}]}
        for text, image in PICTURE_EXAMPLES.items()
    ]
    return [*drawn, *({"text": text} for text in EXAMPLES[: len(EXAMPLES) - len(drawn)])]


def _chat(handlers: Handlers, expert: gr.Dropdown, settings: list[gr.components.Component]) -> gr.State:
    """The tab's parts; returns where its conversation is."""
    chat = gr.State()
    bot = _bot(
        "Conversation",
        height="58vh",
        min_height=340,
        editable="user",
        buttons=["copy", "copy_all"],
        placeholder="Ask something, or begin with one of these.",
        examples=offered(handlers.model, handlers.model.active_adapter),
    )
    expert.change(lambda name: gr.update(examples=offered(handlers.model, name)), expert, bot, **AT_ONCE)
    box = _box("Ask something")
    with gr.Accordion("Take a photo", open=False):
        camera = gr.Image(sources=["webcam"], type="filepath", show_label=False, label="Camera", height=320)
    camera.input(handlers.attach, [camera, box], [box, camera], **AT_ONCE)
    takes = [
        box.submit(handlers.ask, [box, chat, *settings], [box, bot, chat], **TAKING),
        bot.example_select(handlers.ask_example, [chat, *settings], [box, bot, chat], **TAKING),
        bot.retry(handlers.retry, [chat, *settings], [box, bot, chat], **TAKING),
        bot.edit(handlers.edit, [chat, *settings], [box, bot, chat], **TAKING),
    ]
    answers = [
        take.success(handlers.answer, chat, [box, bot], show_progress_on=bot, **ANSWERING) for take in takes
    ]
    box.stop(handlers.stop, chat, [box, bot], cancels=answers, **AT_ONCE)
    bot.clear(handlers.clear, chat, [box, bot], cancels=answers, **AT_ONCE)
    bot.undo(handlers.undo, chat, [box, bot], **AT_ONCE)
    return chat


def _side_by_side(handlers: Handlers, settings: list[gr.components.Component]) -> None:
    pair = gr.State()
    box = _box("Ask both the same")
    examples = gr.Examples(
        [[{"text": text}] for text in EXAMPLES], box, label="For example", api_visibility="private"
    )
    look: dict[str, Any] = {
        "elem_classes": "answer",
        "height": "45vh",
        "min_height": 240,
        "buttons": ["copy"],
    }
    with gr.Row():
        with gr.Column(min_width=260):
            gr.Markdown("### Bare base")
            left = _bot("Answer of the bare base", **look)
        with gr.Column(min_width=260):
            gr.Markdown("### With the adapter")
            right = _bot("Answer with the adapter", **look)
    takes = [
        trigger(handlers.ask_both, [box, *settings], [box, left, right, pair], **TAKING)
        for trigger in (box.submit, examples.load_input_event.success)
    ]
    answers = [
        take.success(
            handlers.answer_both, pair, [box, left, right], show_progress_on=[left, right], **ANSWERING
        )
        for take in takes
    ]
    box.stop(handlers.stop_both, pair, [box, left, right], cancels=answers, **AT_ONCE)


def _science(handlers: Handlers, expert: gr.Dropdown) -> None:
    with gr.Row():
        with gr.Column(scale=3, min_width=260):
            example = gr.Dropdown(
                [(question, number) for number, (question, *_) in enumerate(SCIENCE_EXAMPLES)],
                value=None,
                label="An example",
                info="fills in the fields below, which can be changed",
                filterable=False,
            )
            box = _box(
                "Attach a picture if it is about one", label="Question", show_label=True, submit_btn=False
            )
            options = gr.Textbox(
                label="Options", info="one a line, 2 to 5", lines=4, max_lines=8, max_length=MAX_CHARACTERS
            )
            context = gr.Textbox(
                label="Context",
                info="what one has to know to answer; may be empty",
                max_lines=4,
                max_length=MAX_CHARACTERS,
            )
            button = gr.Button("Answer", variant="primary")
        with gr.Column(scale=2, min_width=260):
            found = gr.Label(label="Answer", num_top_classes=5)
            gr.Markdown(
                "How likely the adapter finds each option as the answer, by its letter or by its text, "
                "whichever it is better at. The question is put to it as in the paper's ScienceQA "
                "experiments."
                + "".join(
                    f" **{name}** was trained on such questions: choose it above."
                    for name in trained_for_it(handlers.model)
                )
            )
    example.input(handlers.fill, example, [box, options, context, found], **AT_ONCE)
    for trigger in (box.submit, button.click):
        trigger(
            handlers.score,
            [box, options, context, expert],
            found,
            **PRIVATE,
            **BY_MODEL,
            show_progress_on=found,
        )


def _look_inside(handlers: Handlers, expert: gr.Dropdown, chat: gr.State, tab: gr.Tab) -> None:
    gr.Markdown(f"### The gates\n\n{GATES}")
    gates = gr.HTML(show_gates(handlers.model, handlers.model.active_adapter), elem_id="gates", padding=False)
    expert.change(handlers.show_gates, expert, gates, **AT_ONCE)
    gr.Markdown(f"### The chat's latest answer\n\n{ANSWER}")
    answer = gr.HTML(elem_id="influence", padding=False)
    tab.select(handlers.show_answer, chat, answer, **PRIVATE, **BY_MODEL, show_progress_on=answer)

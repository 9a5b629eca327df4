"""The page: its header, its tabs, and the endpoints for programs."""

from __future__ import annotations

import gradio as gr

from llama_adapter.answering.engine import Engine
from llama_adapter.model import LlamaAdapter
from llama_adapter.page.about import describe_limits
from llama_adapter.page.chat_tab import chat_tab
from llama_adapter.page.chatting import ChatHandlers
from llama_adapter.page.compare_tab import Compared, compare_tab
from llama_adapter.page.comparing import ComparisonHandlers
from llama_adapter.page.display import shown
from llama_adapter.page.endpoints import Endpoints
from llama_adapter.page.parts import answer_settings, expert_menu
from llama_adapter.page.tabs import comparison_tab, inside_tab, science_tab
from llama_adapter.page.wiring import AT_ONCE, BY_MODEL, PEOPLE

CHAT = "chat"  # the tab's id


def build_page(
    model: LlamaAdapter,
    experts: dict[str, str],
    *,
    comparison: Compared | None = None,
    max_queue: int = 20,
) -> gr.Blocks:
    """Build the page for a model whose adapters are loaded.

    Args:
        experts: a line about each adapter by name, and about `NO_ADAPTER`.
        comparison: what the tab "Compare" shows; None leaves the tab out.
        max_queue: how many people may wait for the model.
    """
    engine = Engine(model, rows=2 * PEOPLE)  # the tab "Side by side" takes two rows for each person
    handlers = ChatHandlers(engine)
    endpoints = Endpoints(engine)
    active = model.active_adapter
    # Uploads are kept for a day, or until the page is closed.
    cleared = (3600, 24 * 3600)
    with gr.Blocks(title="LLaMA-Adapter", analytics_enabled=False, delete_cache=cleared) as page:
        gr.api(endpoints.answer, api_name="answer", **BY_MODEL)
        gr.api(endpoints.chat, api_name="chat", **BY_MODEL)
        gr.api(endpoints.ask, api_name="ask", **BY_MODEL)
        gr.api(endpoints.score, api_name="score", **BY_MODEL)

        with gr.Row(elem_id="header"):
            gr.Markdown("# LLaMA-Adapter", elem_id="title")
            expert = expert_menu(
                experts, active, "Adapter", elem_id="expert", container=False, show_label=False, min_width=150
            )
        line = gr.Markdown(shown(experts[active]), elem_id="line", elem_classes="line", latex_delimiters=[])
        with gr.Accordion("How the answer is made", open=False, render=False) as settings:
            knobs = answer_settings()
        limits = gr.Markdown(shown(describe_limits(model, active)), elem_classes="line", render=False)
        with gr.Tabs() as tabs:
            with gr.Tab("Chat", id=CHAT):
                chats = chat_tab(handlers, page, expert, [expert, *knobs], limits)
            with gr.Tab("Side by side"):
                comparison_tab(ComparisonHandlers(engine), experts, expert, knobs)
            with gr.Tab("ScienceQA"):
                science_tab(model, expert)
            with gr.Tab("Look inside") as inside:
                inside_tab(handlers, expert, chats, inside)
            if comparison is not None:
                with gr.Tab("Compare"):
                    compare_tab(comparison, tabs, CHAT, expert)
        settings.render()
        expert.change(
            lambda name: (shown(experts[name]), shown(describe_limits(model, name))),
            expert,
            [line, limits],
            **AT_ONCE,
        )
    page.queue(max_size=max_queue)
    return page

"""The heat maps, and their descriptions in plain words."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_adapter.answering.conversation import Conversation
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.model import NO_ADAPTER
from llama_adapter.page.heatmap import draw_heatmap
from llama_adapter.page.inside import explain_gates, explain_influence, show_answer, show_gates
from tests.page_parts import HOSTILE
from tests.scripted import ScriptedModel, build_scripted_model
from tests.tiny_models import build_tiny_model


@pytest.fixture(scope="module")
def model() -> ScriptedModel:
    return build_scripted_model()


def test_the_gates_are_drawn_and_explained(model: ScriptedModel) -> None:
    picture = show_gates(model, "one")
    gates = model.get_adapter("one").prompts.gates.detach().tanh()
    assert picture.count("<rect") == gates.numel()
    assert f"<title>layer 2, head 1: {float(gates[2, 1]):.3g}</title>" in picture
    assert 'aria-label="Heat map of tanh(gate) of 3 layers with 4 heads' in picture
    assert f"In plain words: {explain_gates(gates, 0)}" in picture
    assert "no prompts" in show_gates(model, NO_ADAPTER)


def test_an_adapter_without_prompts_has_no_gates_to_draw() -> None:
    model = build_tiny_model()
    model.new_adapter("other", method="lora")
    assert "Adapter &#x27;other&#x27; has no prompts, so no gates to look at" in show_gates(model, "other")


def test_what_prompts_did_to_the_latest_answer_is_drawn_and_explained(model: ScriptedModel) -> None:
    assert "Ask something" in show_answer(model, None)
    chat = Conversation(model, adapter="one", sampling=Sampling(max_new_tokens=400))
    list(chat.ask(HOSTILE))
    picture = show_answer(model, chat)
    assert 0 < picture.count("<rect") <= 3 * 96
    assert "first 96 tokens" in picture
    assert "In plain words: what the adapter added" in picture
    assert not re.search(r"<(script|img|b)\b", picture)
    chat.adapter = NO_ADAPTER
    list(chat.ask("Who?"))
    assert "bare base has no prompts" in show_answer(model, chat)


def test_the_gates_in_plain_words_follow_from_them() -> None:
    gates = torch.zeros(4, 5)
    assert explain_gates(gates, 10) == "every gate is shut, so the adapter changes nothing yet."
    gates[3, :2] = torch.tensor([0.5, -0.3])
    gates[0, 0] = 0.2
    gates[1, 1] = 0.01
    said = explain_gates(gates, 10)
    assert said.startswith("3 of the 20 places")
    assert "layer 13 (79% of its whole voice)" in said and "mostly late" in said
    assert "mostly early" in explain_gates(gates.flip(0), 10)
    assert "all along" in explain_gates(torch.ones(4, 5), 10)


def test_the_influence_in_plain_words_follows_from_it() -> None:
    shares = torch.tensor([[0.1, 0.4, 0.1, 0.1, 0.02, 0.06], [0.3, 0.6, 0.1, 0.1, 0.02, 0.04]])
    tokens = ["A", " hen", "\n", " lays", " eggs", "."]
    said = explain_influence(shares, tokens)
    assert said == (
        "what the adapter added was on average 16% as strong as what was read; it steered most where the "
        "model wrote “hen” (50%) and least at “eggs” (2%). The beginning of the answer was steered more "
        "than its end."
    )
    assert explain_influence(shares.flip(1), tokens).endswith(
        "end of the answer was steered more than its beginning."
    )
    assert explain_influence(torch.ones(2, 6), tokens).endswith("steered about as much.")
    assert explain_influence(shares[:, :1], tokens[:1]) == (
        "what the adapter added was on average 20% as strong as what was read."
    )


@given(st.lists(st.lists(st.floats(-1, 1), min_size=2, max_size=2), min_size=1, max_size=3), st.text())
def test_a_heat_map_is_well_formed_whatever_it_is_labelled(values: list[list[float]], label: str) -> None:
    label = "".join(c for c in label if c.isprintable())
    names = [label] * len(values)
    picture = draw_heatmap(values, rows=names, columns=[label, "b"], names=("r", "c"), summary=label)
    svg = ElementTree.fromstring(picture)[0]
    assert svg.get("aria-label") == label
    cells = [element for element in svg if element.tag == "rect"]
    assert [cell[0].text for cell in cells[:1]] == [f"r {label}, c {label}: {values[0][0]:.3g}"]
    assert len(cells) == 2 * len(values)
    assert all(0 <= float(cell.get("fill-opacity", "")) <= 1 for cell in cells)

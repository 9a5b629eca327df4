"""The shipped weights: they are small, their cards say how they were made, and they do what they are for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from llama_adapter.decoding.sampling import Sampling
from llama_adapter.methods.checkpoint import load_adapter
from llama_adapter.methods.prompts import Prompts
from llama_adapter.model import LlamaAdapter
from llama_adapter.scienceqa.examining import Examination
from llama_adapter.scienceqa.problems import Problem
from llama_adapter.vision.contrastive import Pair, load_clip, zero_shot
from llama_adapter.vision.tower import load_tower
from tests.conftest import CHECKOUT

WEIGHTS = CHECKOUT / "weights"
ADAPTERS = sorted(path.parent for path in WEIGHTS.glob("*/llama_adapter_config.json"))
SHAPES = CHECKOUT / "examples" / "shapes" / "images"


def test_there_are_adapters_to_look_at() -> None:
    larger = {"qwen-0.5b-alpaca", "qwen-0.5b-scienceqa", "qwen-0.5b-vision"}
    smaller = {"smollm2-135m-alpaca", "smollm2-135m-scienceqa", "smollm2-135m-vision"}
    shipped = larger | smaller
    assert shipped == {folder.name for folder in ADAPTERS}


@pytest.mark.parametrize("folder", [*ADAPTERS, WEIGHTS / "clip-mini"], ids=lambda folder: folder.name)
def test_it_is_small_and_its_card_says_how_it_was_made(folder: Path) -> None:
    assert all(path.stat().st_size < 25e6 for path in folder.iterdir())
    card = (folder / "README.md").read_text()
    assert "python -m train." in card and "python -m eval." in card and "## Limits" in card
    assert "licen" in card or "commercial" in card


@pytest.mark.parametrize("folder", [*ADAPTERS, WEIGHTS / "clip-mini"], ids=lambda folder: folder.name)
def test_its_card_is_one_that_the_hub_reads(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.license and card.data.library_name and card.data.pipeline_tag
    if folder in ADAPTERS:
        bases = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct", "qwen": "Qwen/Qwen2.5-Coder-0.5B-Instruct"}
        assert card.data.base_model == bases[folder.name.partition("-")[0]]
        assert card.data.eval_results and all(result.metric_value > 0 for result in card.data.eval_results)
    headings = [line[3:] for line in card.text.splitlines() if line.startswith("## ")]
    assert headings[:4] == ["How to use it", "Results", "Limits", "How it was made"]


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.name)
def test_an_adapter_loads_and_gates_are_open(folder: Path) -> None:
    adapter = load_adapter(folder)
    assert adapter.config.training["validation_loss"] > 0
    if (prompts := adapter.find(Prompts)) is not None:
        assert 1e-3 < float(torch.tanh(prompts.gates.detach()).abs().mean()) < 0.5
    assert all(math.isfinite(float(parameter.detach().sum())) for parameter in adapter.parameters())


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.name)
def test_the_tower_is_the_one_that_it_was_trained_with(folder: Path) -> None:
    vision = load_adapter(folder).config.vision
    if vision is None:
        pytest.skip("it is for text alone")
    tower = load_tower(vision.tower, depths=vision.depths)
    assert (tower.fingerprint, tower.feature_width) == (vision.tower_fingerprint, vision.feature_width)


def test_the_small_clip_tells_shapes_by_name() -> None:
    clip = load_clip(WEIGHTS / "clip-mini")
    pairs = [
        Pair(SHAPES / f"{colour}-{shape}-1.png", (f"a {colour} {shape}",))
        for colour in ("red", "blue")
        for shape in ("circle", "triangle")
    ]
    assert zero_shot(clip, pairs) >= 0.75


def test_the_adapter_that_sees_names_what_is_in_the_picture(base_folder: Path) -> None:
    model = LlamaAdapter.from_pretrained("smollm2-135m-vision", device="cpu", dtype="float32")
    greedy = Sampling(max_new_tokens=6, temperature=0)
    for picture, question, expected in (
        ("red-circle-1.png", "what shape is in the image?", "circle"),
        ("blue-triangle-1.png", "what shape is in the image?", "triangle"),
        ("green-square-1.png", "what color is the shape?", "green"),
        ("blue-triangle-1.png", "what color is the shape?", "blue"),
    ):
        assert expected in model.chat(question, image=SHAPES / picture, sampling=greedy).lower()


def test_the_adapter_for_scienceqa_chooses_by_what_it_learnt(base_folder: Path) -> None:
    model = LlamaAdapter.from_pretrained("smollm2-135m-scienceqa", device="cpu", dtype="float32")
    best = Examination.best_for(model)
    assert best.way == "option"
    problems = [
        Problem("1", "What is the capital city of Texas?", ("Dallas", "Austin", "Boston", "Denver"), 1),
        Problem("2", "What is the capital city of Ohio?", ("Salem", "Denver", "Columbus", "Boston"), 2),
    ]
    assert {pid: choice for pid, (choice, _) in best.answer(model, problems).items()} == {"1": 1, "2": 2}

"""Trainings and scorings of ``train.vqa``, on a tiny base, a tiny tower and pictures of one colour."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import train.vqa
from llama_adapter.common.errors import UsageError
from llama_adapter.weights.catalogue import DEFAULT_TOWER
from tests.conftest import CHECKOUT
from tests.tiny_models import build_tiny_base, build_tiny_tower_folder, draw_picture

TEXT = CHECKOUT / "examples" / "instructions.jsonl"
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "grey": (128, 128, 128)}


def build_place(folder: Path) -> Path:
    """Fill a folder with weights, and pictures of a single colour with questions and with captions."""
    build_tiny_base(folder / "weights" / "tiny-base")
    build_tiny_tower_folder(folder / "weights" / DEFAULT_TOWER)
    questions, captions = [], []
    for (name, colour), number in itertools.product(COLOURS.items(), range(6)):
        file = f"{name}-{number}.png"
        shade = tuple(max(0, value - 8 * number) for value in colour)
        for data in ("questions", "captions"):
            draw_picture(folder / data / "images" / file, shade)
        split = {"split": "test" if number == 5 else "train"}
        questions.append({"image": file, "question": "What colour?", "answer": name, **split})
        questions.append(
            {"image": file, "question": "Is it red?", "answer": "yes" if name == "red" else "no", **split}
        )
        captions.append({"image": file, "captions": [f"It is {name} .", f"A {name} square ."]})
    (folder / "questions" / "qa.json").write_text(json.dumps(questions))
    (folder / "captions" / "captions.json").write_text(json.dumps(captions))
    return folder


def options(place: Path, output: Path, *more: str) -> list[str]:
    given: dict[str, Any] = {"--data": place / "questions", "--output": output, "--base": "tiny-base"}
    given |= {"--weights": place / "weights", "--cache": place / "cache", "--template": "brief"}
    given |= {"--epochs": 2, "--warmup-epochs": 0.5, "--batch-size": 6, "--learning-rate": 0.1}
    given |= {"--validation-rows": 4, "--validate-every": 100, "--prompt-length": 3}
    if "--no-images" not in more:
        given["--bottleneck"] = 8
    return [str(part) for pair in given.items() for part in pair] + list(more)


def options_to_go_on(place: Path, output: Path, start: Path, *more: str) -> list[str]:
    """Options that start from an adapter, without those that it settles."""
    words = options(place, output, "--start-from", str(start))
    pairs = zip(words[::2], words[1::2], strict=True)
    settled = {"--template", "--bottleneck", "--prompt-length"}
    return [word for pair in pairs if pair[0] not in settled for word in pair] + list(more)


def score(place: Path, adapter: Path, *more: str) -> list[str]:
    given = {"--adapter": adapter, "--weights": place / "weights", "--cache": place / "cache"}
    return [str(part) for pair in given.items() for part in pair] + list(more)


def run(module: Any, arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *arguments])
        module.main()


def refusal(module: Any, arguments: list[str]) -> str:
    """The line with which a command refuses something."""
    with pytest.raises(UsageError) as error:
        run(module, arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def train_all_kinds(place: Path) -> Path:
    """An adapter trained on questions, captions and text."""
    output = place / "trained"
    sources = ("--data", str(place / "captions"), "--data", f"{TEXT}=0.5")
    rates = ("--rate", "gates=0.2", "--rate", "projection=0.02")
    run(train.vqa, options(place, output, *sources, "--epochs", "4", *rates))
    return output

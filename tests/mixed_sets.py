"""Made-up data sets in the layouts of those that the shipped adapters learn from, with a few rows each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama_adapter.data.mixtures import ALPACA_KEPT_BACK
from tests.science import build_problems, write_official
from tests.tiny_models import draw_picture

OPTIONS = ("acids", "Lipids.", "sugars and salts", "proteins")


def choice_row(question: str, right: int, options: tuple[str, ...] = OPTIONS) -> dict[str, str]:
    """A question with options, as in text/mcq. The right option counts from 1."""
    listed = " ".join(f"Answer{number}: {text}" for number, text in enumerate(options, start=1))
    return {
        "instruction": f"Please choose the correct answer to the question: {question}\n\n{listed}\n\n"
        f"Answer format: {'/'.join(f'answer{number}' for number in range(1, len(options) + 1))}",
        "input": "",
        "output": f"the correct answer is answer{right}",
        "answer": f"answer{right}",
    }


def instruct_rows(name: str, count: int, longest: int = 10) -> list[dict[str, str]]:
    """Rows in Alpaca's format; answers have from 1 to ``longest`` characters."""
    return [
        {"instruction": f"{name} {n}?", "input": "", "output": "x" * (1 + n % longest)} for n in range(count)
    ]


def write_rows(data: Path, file: str, rows: Any) -> None:
    """Write a JSON file in the folder of all data."""
    (data / file).parent.mkdir(parents=True, exist_ok=True)
    (data / file).write_text(json.dumps(rows))


def write_sets(data: Path) -> Path:
    """Write all sets. Returns the folder of all data."""
    write_rows(data, "alpaca/alpaca_data.json", instruct_rows("Alpaca", ALPACA_KEPT_BACK + 12))
    for name, longest in (("dolly_no_context", 800), ("lima", 3000), ("gsm8k", 440)):
        write_rows(data, f"text/instruct/{name}.json", instruct_rows(name, 10 * longest // 100, longest))
    for name in ("arc-easy", "arc-challenge", "openbookqa"):
        rows = [choice_row(f"What does {name} number {n} code for?", 1 + n % 4) for n in range(20)]
        rows += [choice_row(f"Which of the following is {name}?", 2), choice_row(f"{name} codes for", 3)]
        write_rows(data, f"text/mcq/{name}.json", rows)

    colours = ("red", "green", "blue", "yellow")
    for name in ("coco", "daquar"):
        rows = []
        for number, colour in enumerate(colours):
            draw_picture(data / name / "images" / f"{name}{number}.png", colour, 16 + number)
            rows.append({"image": f"{name}{number}.png", "question": "which colour is it?", "answer": colour})
        write_rows(data, f"{name}/qa.json", rows)
    write_rows(
        data,
        "coco/captions.json",
        [{"image": f"coco{n}.png", "captions": [f"a {colour} dog."]} for n, colour in enumerate(colours)],
    )
    rows = []
    for number, split in enumerate(("train", "val", "train", "train")):
        draw_picture(data / "flickr8k" / "images" / f"flickr{number}.png", (9, number, 9))
        captions = [f"Dog {number} runs {where} ." for where in ("home", "away", "up", "down", "here")]
        rows.append({"image": f"flickr{number}.png", "split": split, "captions": captions})
    rows[2]["captions"] = ["one dog alone", " . "]
    write_rows(data, "flickr8k/captions.json", rows)
    names = {f"n{n}.png": name for n, name in enumerate(("goldfish", "owl", "African grey"))}
    for number, file in enumerate(names):
        draw_picture(data / "imagenet_names" / "images" / file, (5, 5, number))
    write_rows(data, "imagenet_names/names.json", names)
    write_official(data / "scienceqa", build_problems(data))
    return data

"""The rows that the shipped adapters learn from: public sets, reworded so that answers are short and plain.

Each function returns rows in Alpaca's format, or rows of {"image", "question", "answer"} with file names that
start from the folder of all data. The same data give the same rows.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llama_adapter.data.drawing_questions import sentence, with_article
from llama_adapter.data.fact_questions import yes_no_facts

Row = dict[str, Any]

CAPTIONS_EACH = 2  # of Flickr8k's five for each photo
ALPACA_KEPT_BACK = 500  # the last rows of Alpaca's file, which no training sees

_DESCRIBE = (
    "Describe the picture.",
    "Describe this image in one sentence.",
    "Write a caption for this photo.",
    "What is in this picture?",
    "What does this image show?",
    "What can you see in the picture?",
    "What is happening here?",
)
_NAME = ("What is the main thing in this photo?", "What is this?", "Name the object in the picture.")
_OPEN = re.compile(r"(What|Which|Who|Where|When|How)\b.*\?$", re.DOTALL)
_CHOICE = re.compile(r"\s*Answer(\d): ")


def read_rows_of(data: Path, file: str) -> list[Row]:
    """The rows of a JSON file in the folder of all data."""
    rows: list[Row] = json.loads((data / file).read_text(encoding="utf-8"))
    return rows


# --- text ---------------------------------------------------------------------------------------------------


def alpaca_rows(data: Path, most: int) -> list[Row]:
    """Rows of Alpaca, not those kept back."""
    rows = [row for row in read_rows_of(data, "alpaca/alpaca_data.json")[:-ALPACA_KEPT_BACK] if row["output"]]
    return random.Random(6).sample(rows, min(len(rows), most))


def short_rows(data: Path, file: str, most: int) -> list[Row]:
    """Rows of a file whose answers have at most ``most`` characters."""
    return [row for row in read_rows_of(data, file) if len(row["output"]) <= most]


def choice_rows(data: Path) -> list[Row]:
    """ARC and OpenBookQA: with their options in a list, or as open questions where that is possible."""
    draws = random.Random(2)
    rows = []
    for file in ("arc-easy", "arc-challenge", "openbookqa"):
        for row in read_rows_of(data, f"text/mcq/{file}.json"):
            question, *parts = _CHOICE.split(_question_in(row))
            options = dict(zip(parts[::2], (part.strip().rstrip(".") for part in parts[1::2]), strict=True))
            answer = options[row["answer"].removeprefix("answer")]
            alone = _OPEN.match(question) and not re.search(r"following|these|which of", question, re.I)
            if not alone or draws.random() < 0.5:
                question += f"\nOptions: {'; '.join(options.values())}"
            rows.append({"instruction": question, "input": "", "output": answer[:1].upper() + answer[1:]})
    return rows


def _question_in(row: Row) -> str:
    """The question of a row of multiple choice, without the instructions around it."""
    instruction: str = row["instruction"]
    return instruction.split("question: ", 1)[1].split("\n\nAnswer format", 1)[0]


def sum_rows(count: int) -> list[Row]:
    """Sums in words and signs. The answer is the result, sometimes in a sentence."""
    draws = random.Random(3)
    rows: list[Row] = []
    while len(rows) < count:
        question, result = draws.choice(_SUMS)(draws)
        if result.isdecimal() and draws.random() < 0.4:
            question = f"{question} {draws.choice(('Give only the number.', 'Answer with a number.'))}"
        elif result.isdecimal() and draws.random() < 0.3:
            result = f"The answer is {result}."
        rows.append({"instruction": question, "input": "", "output": result})
    return rows


def _add(draws: random.Random) -> tuple[str, str]:
    one, other = draws.randint(2, 199), draws.randint(2, 199)
    asked = draws.choice(("What is {} + {}?", "What is {} plus {}?", "Add {} and {}.", "Calculate {} + {}."))
    return asked.format(one, other), str(one + other)


def _subtract(draws: random.Random) -> tuple[str, str]:
    less, more = sorted((draws.randint(1, 150), draws.randint(1, 200)))
    asked = draws.choice(("What is {} - {}?", "What is {} minus {}?", "Calculate {} - {}."))
    return asked.format(more, less), str(more - less)


def _multiply(draws: random.Random) -> tuple[str, str]:
    one, other = draws.randint(2, 12), draws.randint(2, draws.choice((12, 12, 40)))
    asked = draws.choice(("What is {} times {}?", "What is {} * {}?", "Multiply {} by {}.", "{} x {} = ?"))
    return asked.format(one, other), str(one * other)


def _divide(draws: random.Random) -> tuple[str, str]:
    result, by = draws.randint(2, 20), draws.randint(2, 12)
    asked = draws.choice(("What is {} divided by {}?", "What is {} / {}?", "Divide {} by {}."))
    return asked.format(result * by, by), str(result)


def _share(draws: random.Random) -> tuple[str, str]:
    percent, of = draws.choice((5, 10, 20, 25, 30, 40, 50, 75)), draws.randint(1, 20) * 20
    return f"What is {percent}% of {of}?", str(percent * of // 100)


def _compare(draws: random.Random) -> tuple[str, str]:
    one, other = draws.sample(range(1, 200), 2)
    more = draws.random() < 0.5
    asked = f"Is {one} {'greater' if more else 'smaller'} than {other}?"
    return asked, "Yes" if (one > other) is more else "No"


def _order(draws: random.Random) -> tuple[str, str]:
    numbers = draws.sample(range(1, 100), draws.randint(3, 5))
    listed = ", ".join(map(str, numbers))
    most = draws.random() < 0.5
    return (
        f"Which of these numbers is the {'largest' if most else 'smallest'}: {listed}?",
        str(max(numbers) if most else min(numbers)),
    )


def _shop(draws: random.Random) -> tuple[str, str]:
    thing, price, many = (
        draws.choice(("pen", "book", "ticket", "cake")),
        draws.randint(2, 15),
        draws.randint(2, 12),
    )
    return f"One {thing} costs {price} dollars. How much do {many} {thing}s cost?", f"{price * many} dollars"


_SUMS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    _add, _subtract, _multiply, _divide, _share, _compare, _order, _shop,
)  # fmt: skip


def text_sources(data: Path) -> dict[str, list[Row]]:
    """All text rows by the name of their file; "some_text" is a sample, to be mixed with pictures."""
    draws = random.Random(5)
    sources = {
        "alpaca": alpaca_rows(data, 27_000),
        "dolly": short_rows(data, "text/instruct/dolly_no_context.json", 400),
        "lima": short_rows(data, "text/instruct/lima.json", 1500),
        "gsm8k": short_rows(data, "text/instruct/gsm8k.json", 220),
        "yes_no": yes_no_facts(4000),
        "choices": choice_rows(data),
        "sums": sum_rows(4000),
    }
    some = [row for rows in sources.values() for row in draws.sample(rows, min(len(rows), 700))]
    return {**sources, "some_text": some + draws.sample(sources["alpaca"], min(len(sources["alpaca"]), 4000))}


# --- pictures -----------------------------------------------------------------------------------------------


def picture_sources(data: Path) -> dict[str, list[Row]]:
    """All rows with photos by the name of their file: questions, captions and names."""
    draws = random.Random(4)
    flickr = [row for row in read_rows_of(data, "flickr8k/captions.json") if row["split"] == "train"]
    names = json.loads((data / "imagenet_names/names.json").read_text(encoding="utf-8"))
    return {
        "coco": list(_asked(read_rows_of(data, "coco/qa.json"), "coco")),
        "daquar": list(_asked(read_rows_of(data, "daquar/qa.json"), "daquar")),
        "cococaps": list(_captioned(read_rows_of(data, "coco/captions.json"), "coco", draws)),
        "flickr": list(_captioned(flickr, "flickr8k", draws)),
        "names": [
            {
                "image": f"imagenet_names/images/{file}",
                "question": draws.choice(_NAME),
                "answer": sentence(with_article(name)),
            }
            for file, name in names.items()
        ],
    }


def _asked(rows: list[Row], folder: str) -> Iterator[Row]:
    for row in rows:
        image = f"{folder}/images/{row['image']}"
        if row.get("split", "train") == "train":
            yield {"image": image, "question": row["question"], "answer": row["answer"]}


def _captioned(rows: list[Row], folder: str, draws: random.Random) -> Iterator[Row]:
    for row in rows:
        for text in draws.sample(row["captions"], min(len(row["captions"]), CAPTIONS_EACH)):
            answer = text.strip().removesuffix(".").strip()
            if answer:
                yield {
                    "image": f"{folder}/images/{row['image']}",
                    "question": draws.choice(_DESCRIBE),
                    "answer": sentence(answer),
                }


# --- ScienceQA ----------------------------------------------------------------------------------------------


def share_scienceqa(folder: Path, kept: int) -> None:
    """Move the problems of the split val into train, in place, but for every one of ``kept``."""
    path, splits = folder / "problems.json", folder / "pid_splits.json"
    problems, listed = json.loads(path.read_text()), json.loads(splits.read_text())
    moved = [number for place, number in enumerate(listed["val"]) if place % kept]
    for number in moved:
        problems[number]["split"] = "train"
        if (pictures := folder / "images" / "val" / number).is_dir():
            (folder / "images" / "train").mkdir(exist_ok=True)
            pictures.rename(folder / "images" / "train" / number)
    listed["val"] = [number for place, number in enumerate(listed["val"]) if place % kept == 0]
    listed["train"] += moved
    path.write_text(json.dumps(problems))
    splits.write_text(json.dumps(listed))

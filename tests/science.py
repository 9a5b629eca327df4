"""Made-up problems in ScienceQA's layouts."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue", "yellow", "black")
SUBJECTS = ("natural science", "social science", "language science", None)


def build_problems(folder: Path, *, rows: int = 20, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Rows by split and pid. Their colours can be told from a picture, from the hint, or not at all."""
    draw = random.Random(seed)
    pictures = {}
    for colour in COLOURS:
        for size in (16, 17):
            content = io.BytesIO()
            Image.new("RGB", (size, size), colour).save(content, "PNG")
            pictures[colour, size] = content.getvalue()
    splits: dict[str, list[dict[str, Any]]] = {}
    pid = 0
    for split, count in (("train", rows), ("val", 6), ("test", 12)):
        for _ in range(count):
            pid += 1
            choices = draw.sample(COLOURS, draw.randint(2, 5))
            answer = draw.randrange(len(choices))
            kind = pid % 3
            splits.setdefault(split, []).append(
                {
                    "pid": str(pid),
                    "question": f"Which colour is it, number {pid % 7}?",
                    "choices": choices,
                    "answer": answer,
                    "hint": [f"It is {choices[answer]}.", "", None][kind] if pid % 4 else f"Hint {pid}.",
                    "image": pictures[choices[answer], draw.choice((16, 17))] if kind == 1 else None,
                    "subject": SUBJECTS[pid % 4],
                    "grade": f"grade{1 + pid % 12}" if pid % 5 else None,
                    "lecture": "Colours are\nlight." if pid % 2 else None,
                    "solution": f"It looks {choices[answer]}.",
                    "caption": f"Something {choices[answer]}.",
                }
            )
    return splits


def write_official(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> Path:
    """Write the files of the official release. Returns the folder."""
    problems, captions = {}, {}
    for split, rows in splits.items():
        for row in rows:
            picture = row["image"]
            kept = {name: value for name, value in row.items() if name not in ("pid", "caption")}
            problems[row["pid"]] = {**kept, "image": "image.png" if picture else None, "split": split}
            if picture:
                place = folder / "images" / split / row["pid"]
                place.mkdir(parents=True)
                (place / "image.png").write_bytes(picture)
                captions[row["pid"]] = row["caption"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    pids = {split: [row["pid"] for row in rows] for split, rows in splits.items()}
    (folder / "pid_splits.json").write_text(json.dumps(pids))
    (folder / "captions.json").write_text(json.dumps({"captions": captions}))
    return folder


def write_hub(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> Path:
    """Save a copy of the hub's data set. Returns the folder."""
    import datasets

    names = {"train": "train", "val": "validation", "test": "test"}
    made = {}
    for split, rows in splits.items():
        kept = [{name: v for name, v in row.items() if name not in ("pid", "caption")} for row in rows]
        for row in kept:
            row["image"] = {"bytes": row["image"], "path": None} if row["image"] else None
        table = datasets.Dataset.from_list(kept)
        made[names[split]] = table.cast_column("image", datasets.Image())
    datasets.DatasetDict(made).save_to_disk(str(folder))
    return folder

"""The source objects:SOURCE: yes if something is named, no if it is unlikely, both equally often."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import read_records
from llama_adapter.data.sources import read_rows, source_name

CAPTIONS = {
    "zebra": "Two zebras are grazing .",
    "dog": "A puppy runs with a child .",
    "toilet": "A toilet beside a sink .",
    "hot-dog": "A hot dog on a plate beside a banana .",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of captions and questions about ten photos of each kind."""
    (tmp_path / "images").mkdir()
    captions, questions = [], []
    for number in range(10):
        for name, caption in CAPTIONS.items():
            captions.append({"image": f"{name}-{number}.jpg", "captions": [caption]})
        questions.append({"image": f"dog-{number}.jpg", "question": "what runs?", "answer": "dog"})
        questions.append({"image": f"zebra-{number}.jpg", "question": "is there a bus?", "answer": "no"})
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "qa.json").write_text(json.dumps(questions))
    return tmp_path


def asked(photos: Path) -> list[tuple[str, str, str]]:
    """(kind of photo, object, answer) of each row."""
    rows = [row for _, row in read_rows(f"objects:{photos}").rows]
    objects = [re.search(r"\ban? ((?:fire )?\w+)", row["question"]) for row in rows]
    return [
        (row["image"].rpartition("-")[0], match[1] if match else "", row["answer"])
        for row, match in zip(rows, objects, strict=True)
    ]


def test_what_is_named_is_there_and_what_is_not_seen_with_it_is_not(photos: Path) -> None:
    there = {
        "zebra": {"zebra"},
        "dog": {"dog", "person"},
        "toilet": {"toilet", "sink"},
        "hot-dog": {"banana"},
    }
    found = asked(photos)
    assert {name for _, name, _ in found} == {"zebra", "dog", "person", "toilet", "sink", "banana"}
    for kind, name, answer in found:
        assert answer == ("yes" if name in there[kind] else "no"), (kind, name)


def test_each_object_is_asked_for_with_yes_as_often_as_with_no(photos: Path) -> None:
    counted = Counter((name, answer) for _, name, answer in asked(photos))
    assert {count for count in counted.values()} == {10} and len(counted) == 12


def test_what_is_often_seen_together_is_not_taken_for_absent(tmp_path: Path) -> None:
    rows = [{"image": f"{n}.jpg", "captions": ["A cat on a bed ." if n % 2 else "A cat ."]} for n in range(8)]
    rows += [{"image": f"bus-{n}.jpg", "captions": ["A bus ."]} for n in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = [row for _, row in read_rows(f"objects:{tmp_path / 'rows.json'}").rows]
    beds = {row["image"] for row in found if "bed" in row["question"] and row["answer"] == "no"}
    assert beds and all(image.startswith("bus") for image in beds)


def test_they_are_always_the_same_and_read_as_records(photos: Path) -> None:
    assert asked(photos) == asked(photos)
    assert source_name(f"objects:{photos}") == f"objects:{photos.name}" and source_name(photos) == photos.name
    records, summary = read_records(f"objects:{photos}", split="train")
    assert len(records) == summary.rows == 120
    assert records[0].images[0].parent == photos / "images"
    elsewhere, _ = read_records(f"objects:{photos}", image_root="/photos")
    assert elsewhere[0].images[0].parent == Path("/photos")


def test_a_split_is_asked_about_by_itself(photos: Path) -> None:
    rows = json.loads((photos / "captions.json").read_text())
    marked = [{**row, "split": "val" if row["image"].startswith("zebra") else "train"} for row in rows]
    (photos / "captions.json").write_text(json.dumps(marked))
    (photos / "qa.json").unlink()
    records, _ = read_records(f"objects:{photos}", split="train")
    assert not any("zebra" in record.turns[0].text for record in records)


def test_rows_that_name_nothing_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"image": "1.jpg", "captions": ["Blue ."]}]))
    with pytest.raises(UsageError, match=r"rows\.json: its rows name too few objects"):
        read_records(f"objects:{file}")
    with pytest.raises(UsageError, match="no such file"):
        read_records(f"objects:{tmp_path / 'none.json'}")

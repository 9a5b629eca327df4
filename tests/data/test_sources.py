"""Where rows with pictures come from; tests/data/test_records.py reads the other sources."""

from __future__ import annotations

import builtins
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import read_records
from llama_adapter.data.sources import EASY_VQA, read_rows

CAPTIONS = [{"image": "1.jpg", "captions": ["A dog ."], "split": "val"}]
QUESTIONS = [{"image": "2.jpg", "question": "What is it?", "answer": "a dog"}]


def make(folder: Path, name: str, rows: Any) -> Path:
    """A folder of pictures with a file beside them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize(("name", "rows"), [("captions.json", CAPTIONS), ("qa.json", QUESTIONS)])
def test_a_folder_of_pictures_is_its_file_and_its_images(tmp_path: Path, name: str, rows: Any) -> None:
    folder = make(tmp_path / "data", name, rows)
    found = read_rows(folder)
    assert found.rows == [(1, rows[0])] and found.root == folder / "images"
    assert found.fingerprint == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    [record], summary = read_records(folder)
    assert record.images == (folder / "images" / rows[0]["image"],) and summary.source == str(folder)
    [elsewhere], _ = read_records(folder, image_root="/photos")
    assert elsewhere.images == (Path("/photos") / rows[0]["image"],)
    assert read_rows(folder / name).root == folder, "a file itself says nothing of images/"


def test_a_folder_with_captions_and_questions_does_not_say_which(tmp_path: Path) -> None:
    make(tmp_path, "qa.json", QUESTIONS)
    make(tmp_path, "captions.json", CAPTIONS)
    with pytest.raises(UsageError, match=r"holds captions.json and qa.json; name one .* --image-root"):
        read_rows(tmp_path)
    [record], _ = read_records(tmp_path / "qa.json", image_root=tmp_path / "images")
    assert record.images == (tmp_path / "images" / "2.jpg",)


def test_a_damaged_file_in_the_folder_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path, "qa.json", QUESTIONS)
    (folder / "qa.json").write_text('[{"image": ')
    with pytest.raises(UsageError, match=r"qa\.json: not valid JSON: it breaks off"):
        read_rows(folder)


def test_the_rows_of_the_package_easy_vqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    easy_vqa = pytest.importorskip("easy_vqa")
    found = read_rows(EASY_VQA)
    assert [number for number, _ in found.rows] == list(range(1, len(found.rows) + 1))
    rows = [row for _, row in found.rows]
    assert {row["split"] for row in rows} == {"train", "test"}
    assert {len(set(row)) for row in rows} == {4}
    with monkeypatch.context() as patch:
        patch.setattr(easy_vqa.easy_vqa, "BASE_PATH", tmp_path / "elsewhere")
        (tmp_path / "elsewhere").symlink_to(Path(easy_vqa.__file__).parent)
        moved = read_rows(EASY_VQA)
    assert moved.fingerprint == found.fingerprint and moved.rows != found.rows
    sizes = {}
    for split in ("train", "test"):
        records, _ = read_records(EASY_VQA, split=split)
        assert all(record.images[0].is_file() for record in records[::500])
        sizes[split] = (len(records), len({record.images for record in records}))
    assert sizes == {"train": (38_575, 4_000), "test": (9_673, 1_000)}
    with pytest.raises(UsageError, match="easy-vqa has no split 'val'; its splits are test, train"):
        read_records(EASY_VQA, split="val")


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "easy_vqa":
            raise ImportError(name)
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match="pip install easy-vqa"):
        read_rows(EASY_VQA)


# --- tables and the hub's folders of pictures ---------------------------------------------------------------


@pytest.mark.parametrize(("name", "mark"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_a_table_has_a_row_a_line(tmp_path: Path, name: str, mark: str) -> None:
    table = [
        ["question", "answer", "id"],
        ["What is it?", '"A ""cat"",\nno dog"', "1"],
        ["And this?", "A dog", ""],
    ]
    (tmp_path / name).write_text("\n".join(mark.join(line) for line in table))
    assert read_rows(tmp_path / name).rows == [
        (1, {"question": "What is it?", "answer": 'A "cat",\nno dog', "id": "1"}),
        (2, {"question": "And this?", "answer": "A dog", "id": None}),
    ]


@pytest.mark.parametrize("line", ["What?", "What?,A cat,1"])
def test_a_line_of_a_table_with_other_cells_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "rows.csv").write_text(f"question,answer\n?,!\n{line}\n")
    with pytest.raises(UsageError, match=r"rows\.csv: row 2: expected 2 cells, one for each name"):
        read_rows(tmp_path / "rows.csv")


def test_the_hubs_folder_of_pictures(tmp_path: Path) -> None:
    rows = [
        {"file_name": "1.jpg", "text": "A dog ."},
        {"file_name": "in/2.jpg", "question": "What is it?", "answer": "A cat", "caption": "A cat."},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records, summary = read_records(tmp_path, split="test")
    assert [record.images for record in records] == [(tmp_path / "1.jpg",)] + [(tmp_path / "in/2.jpg",)] * 2
    assert [record.turns[1].text for record in records] == ["A dog.", "A cat", "A cat."]
    assert summary.unread == () and summary.rows == 2
    (tmp_path / "metadata.csv").write_text("file_name,caption\n1.jpg,A dog\n")
    with pytest.raises(UsageError, match=r"holds metadata.jsonl and metadata.csv; keep one of them"):
        read_rows(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    [record], _ = read_records(tmp_path)
    assert record.turns[1].text == "A dog"


def test_the_hubs_folders_of_splits(tmp_path: Path) -> None:
    for split, name in (("train", "1.png"), ("validation", "2.png")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "metadata.csv").write_text(f"file_name,caption\n{name},A dog\n")
    [record], summary = read_records(tmp_path, split="val")
    assert record.images == (tmp_path / "validation" / "2.png",)
    assert summary.other_splits == {"train": 1}
    assert str(summary) == f"{tmp_path}: 1 rows, 1 rows of split train left out"
    with pytest.raises(UsageError, match="has no split 'test'; its splits are train, val"):
        read_records(tmp_path, split="test")


# --- splits -------------------------------------------------------------------------------------------------


def test_of_a_data_set_in_splits_the_one_that_is_asked_for_is_read(tmp_path: Path) -> None:
    parts = {
        name: Dataset.from_list([{"question": name, "answer": "!"}])
        for name in ("train", "validation", "test")
    }
    DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for name, part in parts.items():
        part.to_parquet(tmp_path / "folder" / f"{name}.parquet")
    for place in (tmp_path / "saved", tmp_path / "folder"):
        for split, expected in ((None, "train"), ("train", "train"), ("val", "validation"), ("test", "test")):
            [record], _ = read_records(place, split=split)
            assert record.turns[0].text == expected
        with pytest.raises(UsageError, match=r"expected one named other \(choose by --split\)"):
            read_records(place, split="other")


def test_splits_have_several_names(tmp_path: Path) -> None:
    names = ("train", "Training", "validation", "valid", "dev", "val", "test", "minival")
    rows = [{"question": name, "answer": "!", "split": name} for name in names]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for split, expected in (("train", 2), ("val", 4), ("validation", 4), ("test", 1), ("minival", 1)):
        assert read_records(tmp_path / "rows.json", split=split)[1].rows == expected

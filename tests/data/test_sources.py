"""Where rows with pictures come from; tests/data/test_records.py reads the other sources."""

from __future__ import annotations

import builtins
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

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

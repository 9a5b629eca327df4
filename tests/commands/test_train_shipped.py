"""What `train.shipped` carries over: pieces that are joined exactly, and features in place of pictures."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest
import torch

from llama_adapter.commands.train_shipped import (
    BASE,
    COMMON,
    CONTENTS,
    SETS,
    STAGES,
    Stage,
    pack,
    read_pieces,
    replace_pictures,
    restore_features,
    write_pieces,
)
from llama_adapter.common.errors import UsageError
from llama_adapter.vision.features import FeatureCache
from llama_adapter.vision.tower import load_tower
from tests.tiny_models import build_tiny_tower_folder, draw_picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    for name, size in (("wheels/one.whl", 5000), ("data/rows.json", 300), ("data/empty.json", 0)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(random.Random(name).randbytes(size))
    return folder


@pytest.fixture
def pieces(folder: Path, tmp_path: Path) -> Path:
    write_pieces(folder, tmp_path / "pieces", 1000)
    return tmp_path / "pieces"


def test_pieces_are_small_and_are_joined_exactly(folder: Path, pieces: Path, tmp_path: Path) -> None:
    sizes = [path.stat().st_size for path in sorted(pieces.glob("piece-*"))]
    assert len(sizes) > 5 and set(sizes[:-1]) == {1000} and 0 < sizes[-1] <= 1000
    read_pieces(pieces, tmp_path / "again")
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    again = tmp_path / "again"
    assert {path.relative_to(again) for path in again.rglob("*") if path.is_file()} == set(files)
    assert all((again / name).read_bytes() == path.read_bytes() for name, path in files.items())


def test_a_piece_that_is_missing_or_damaged_is_named(pieces: Path, tmp_path: Path) -> None:
    content = (pieces / "piece-002").read_bytes()
    (pieces / "piece-002").write_bytes(content[:-1] + b"?")
    with pytest.raises(UsageError, match="piece-002 is damaged; carry it over again"):
        read_pieces(pieces, tmp_path / "again")
    (pieces / "piece-002").unlink()
    with pytest.raises(UsageError, match=r"1 of \d+ pieces are missing, first piece-002"):
        read_pieces(pieces, tmp_path / "again")
    (pieces / CONTENTS).unlink()
    with pytest.raises(UsageError, match=f"has no {CONTENTS}"):
        read_pieces(pieces, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_features_stand_in_for_pictures(tmp_path: Path) -> None:
    tower = load_tower(str(build_tiny_tower_folder(tmp_path / "tower")))
    data = tmp_path / "data"
    pictures = [draw_picture(data / f"{colour}.png", colour) for colour in ("red", "green", "blue")]
    wanted = FeatureCache(tower, tmp_path / "here").encode(pictures)
    replace_pictures(data, FeatureCache(tower, tmp_path / "here"))
    assert all(path.stat().st_size < 100 for path in pictures)
    there = FeatureCache(tower, restore_features(data, tower))
    torch.testing.assert_close(there.encode(pictures), wanted, rtol=1e-3, atol=1e-3)
    assert not torch.equal(wanted[0], wanted[1])


def test_data_that_lack_a_set_are_refused(tmp_path: Path) -> None:
    for name in SETS[:-1]:
        (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=f"has no folder '{SETS[-1]}'"):
        pack(tmp_path, tmp_path / "parcel", 1000, drawings=1)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_stage_has_options_that_its_script_takes(stage: Stage, tmp_path: Path) -> None:
    script = importlib.import_module(f"llama_adapter.commands.{stage.script.replace('.', '_')}")
    words = [*stage.options.format(data=tmp_path / "nothing").split(), *COMMON.split()]
    with pytest.raises(UsageError, match=str(tmp_path / "nothing")):
        script.main([*words, "--base", BASE, "--output", str(tmp_path / "run")])


def test_the_stages_use_the_sets_that_are_packed() -> None:
    used = {part for stage in STAGES for part in stage.options.split() if part.startswith("{data}/")}
    assert {part.split("/")[1] for part in used} <= {*SETS, "drawings.json", "colours.json"}

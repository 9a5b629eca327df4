"""The cache of features: never out of date, never mixed up, complete after a kill, and fast to read."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_adapter.common.errors import UsageError
from llama_adapter.data.pictures import open_picture
from llama_adapter.vision import features
from llama_adapter.vision.features import FEATURES_FILE, INDEX_FILE, FeatureCache, default_cache_folder
from llama_adapter.vision.tower import VisionTower, load_tower
from tests.conftest import CHECKOUT
from tests.tiny_models import build_tiny_tower_folder, draw_picture


class CountingTower(VisionTower):
    """Counts the pictures that it encodes."""

    encoded = 0

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        self.encoded += len(pixels)
        return super().encode(pixels)


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tower_folder(tmp_path_factory.mktemp("towers") / "tiny")


@pytest.fixture
def tower(tower_folder: Path) -> CountingTower:
    loaded = load_tower(str(tower_folder))
    counting = CountingTower(loaded.visual, name="tiny")
    counting.key = loaded.key  # other processes load it from its folder
    return counting


def draw(folder: Path, count: int, first: int = 0) -> list[Path]:
    """As many pictures as asked for, each in another colour."""
    colours = [(number % 256, number // 256, 255) for number in range(first, first + count)]
    return [draw_picture(folder / f"{colour[0]}-{colour[1]}.png", colour) for colour in colours]


def expected(tower: VisionTower, pictures: list[Path]) -> torch.Tensor:
    return torch.cat([VisionTower.encode(tower, tower.prepare([open_picture(path)])) for path in pictures])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# --- what it gives ------------------------------------------------------------------------------------------


def test_features_are_the_tower_s_and_computed_once(
    tower: CountingTower, cache: Path, tmp_path: Path
) -> None:
    pictures = draw(tmp_path, 20)
    wanted = expected(tower, pictures)
    done: list[int] = []
    first = FeatureCache(tower, cache)
    torch.testing.assert_close(first.encode(pictures, progress=done.append), wanted)
    assert tower.encoded == 20 and done == sorted(done) and done[-1] == 20
    again = FeatureCache(tower, cache)
    for opened in (first, again):  # the same result in any order, and however often they are asked for
        assert torch.equal(opened.encode(pictures), FeatureCache(tower, cache).encode(pictures))
    some = again.encode([pictures[7], pictures[3], pictures[7]])
    torch.testing.assert_close(some, wanted[[7, 3, 7]])
    assert tower.encoded == 20
    assert again.encode([]).shape == (0, tower.feature_width)


def test_a_changed_picture_gets_new_features(tower: CountingTower, cache: Path, tmp_path: Path) -> None:
    picture = draw_picture(tmp_path / "it.png", "red")
    red = FeatureCache(tower, cache).encode([picture])
    draw_picture(picture, "blue")
    os.utime(picture, (0, 0))  # whatever its date says
    blue = FeatureCache(tower, cache).encode([picture])
    torch.testing.assert_close(blue, expected(tower, [picture]))
    assert not torch.allclose(red, blue)


def test_a_picture_that_changes_meanwhile_is_not_kept(
    tower: CountingTower, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = draw_picture(tmp_path / "it.png", "red")

    def open_changed(path: Path) -> object:
        draw_picture(path, "blue")
        return open_picture(path)

    monkeypatch.setattr(features, "open_picture", open_changed)
    with pytest.raises(UsageError, match=r"it\.png: changed while"):
        FeatureCache(tower, cache).encode([picture])
    monkeypatch.undo()
    draw_picture(picture, "red")
    torch.testing.assert_close(FeatureCache(tower, cache).encode([picture]), expected(tower, [picture]))


def test_the_same_content_is_one_row(tower: CountingTower, cache: Path, tmp_path: Path) -> None:
    picture = draw_picture(tmp_path / "it.png", "red")
    twin = draw_picture(tmp_path / "twin.png", "red")
    rows = FeatureCache(tower, cache).encode([picture, picture.read_bytes(), twin])
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    assert tower.encoded == 1
    [folder] = cache.iterdir()
    assert len((folder / INDEX_FILE).read_text().splitlines()) == 1


def test_another_tower_or_other_depths_have_another_folder(
    tower: CountingTower, tower_folder: Path, cache: Path, tmp_path: Path
) -> None:
    [picture] = draw(tmp_path, 1)
    others = [
        load_tower(str(tower_folder), depths=(2,)),
        load_tower(str(build_tiny_tower_folder(tmp_path / "other", seed=1))),
    ]
    for each in (tower, *others):
        torch.testing.assert_close(FeatureCache(each, cache).encode([picture]), expected(each, [picture]))
    assert {path.name for path in cache.iterdir()} == {each.key for each in (tower, *others)}


def test_the_folder_is_the_user_s_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "llama-adapter" / "features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "llama-adapter" / "features"


# --- what is refused ----------------------------------------------------------------------------------------


def test_what_is_no_picture_is_named(tower: CountingTower, cache: Path, tmp_path: Path) -> None:
    [good] = draw(tmp_path, 1)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    for path in (bad, tmp_path / "missing.png", tmp_path):
        with pytest.raises(UsageError) as error:
            FeatureCache(tower, cache).encode([good, path])
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_to_is_told(tower: CountingTower, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't store the features: "):
        FeatureCache(tower, tmp_path / "file")
    opened = FeatureCache(tower, tmp_path / "cache")
    (opened.folder / FEATURES_FILE).mkdir()
    with pytest.raises(UsageError, match=r"the features can't be stored: "):
        opened.encode(draw(tmp_path, 1))


# --- cut off and at once ------------------------------------------------------------------------------------


def cut(path: Path, size: int) -> None:
    """Cut a file to a size, or, if it is negative, by that many bytes."""
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\x01" * 50)


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda folder: cut(folder / FEATURES_FILE, -1), 9),
        (lambda folder: cut(folder / FEATURES_FILE, 0), 0),
        (lambda folder: (folder / FEATURES_FILE).unlink(), 0),
        (lambda folder: lengthen(folder / FEATURES_FILE), 10),
        (lambda folder: cut(folder / INDEX_FILE, -1), 9),
        (lambda folder: cut(folder / INDEX_FILE, -65 - 30), 8),
        (lambda folder: cut(folder / INDEX_FILE, 0), 0),
        (lambda folder: (folder / INDEX_FILE).unlink(), 0),
    ],
    ids=["half features", "no features", "lost features", "more features", "no line end", "half a line",
         "no lines", "lost index"],
)  # fmt: skip
def test_what_a_killed_run_leaves_is_repaired(
    tower: CountingTower, cache: Path, tmp_path: Path, damage: Callable[[Path], None], kept: int
) -> None:
    pictures = draw(tmp_path, 15)
    FeatureCache(tower, cache).encode(pictures[:10])
    damage(cache / tower.key)
    tower.encoded = 0
    for subset in (pictures[12:], pictures, pictures[::-1]):
        torch.testing.assert_close(FeatureCache(tower, cache).encode(subset), expected(tower, subset))
    assert tower.encoded == 15 - kept
    assert (cache / tower.key / FEATURES_FILE).stat().st_size == 15 * 4 * tower.feature_width
    assert (cache / tower.key / INDEX_FILE).stat().st_size == 15 * 65


ADDING = """
import sys
from pathlib import Path
from llama_adapter.vision.features import FeatureCache
from llama_adapter.vision.tower import load_tower
tower, cache, *pictures = sys.argv[1:]
opened = FeatureCache(load_tower(tower), cache)
print("ready", flush=True)
sys.stdin.readline()
for picture in pictures:
    opened.encode([Path(picture)])
"""


def test_several_at_once_lose_and_mix_nothing(
    tower: CountingTower, tower_folder: Path, cache: Path, tmp_path: Path
) -> None:
    pictures = draw(tmp_path, 60)
    command = [sys.executable, "-c", ADDING, str(tower_folder), str(cache), *map(str, pictures[:40])]
    other = subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdin is not None
    assert other.stdout.readline() == "ready\n"
    shared = FeatureCache(tower, cache)
    found: list[torch.Tensor] = []

    def add(opened: FeatureCache) -> None:
        found.extend(opened.encode([picture])[0] for picture in pictures[:19:-1])

    several = (shared, shared, FeatureCache(tower, cache))
    threads = [threading.Thread(target=add, args=[opened]) for opened in several]
    other.stdin.write("go\n")
    other.stdin.close()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert other.wait(timeout=60) == 0
    assert len(found) == 120
    index = (cache / tower.key / INDEX_FILE).read_text().splitlines()
    assert len(index) == len(set(index)) == 60
    tower.encoded = 0
    torch.testing.assert_close(FeatureCache(tower, cache).encode(pictures), expected(tower, pictures))
    assert tower.encoded == 0


def test_a_second_run_only_looks_pictures_up(
    tower: CountingTower, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = draw(tmp_path, 30)
    first = FeatureCache(tower, cache).encode(pictures)
    tower.encoded = 0
    read: list[Path | bytes] = []
    read_picture = features.read_picture

    def noted(picture: Path | bytes) -> bytes:
        read.append(picture)
        return read_picture(picture)

    monkeypatch.setattr(features, "read_picture", noted)
    monkeypatch.setattr(features, "open_picture", None)  # nothing is decoded
    assert torch.equal(FeatureCache(tower, cache).encode(pictures), first)
    assert tower.encoded == 0 and read == pictures, "each file is read once, for its name"

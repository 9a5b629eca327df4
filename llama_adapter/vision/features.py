"""Features of pictures: computed once and kept on disk.

A cache is one folder for one tower and its depths. It has two files that only grow: ``features.f32`` has F
numbers for each picture, and ``index.txt`` has a line for each picture, with the SHA-256 of its bytes. A
picture is found by its content alone. So a changed picture never gets its old features, and another tower has
another folder.

Shapes: N pictures, F features of one picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import alone_in
from llama_adapter.common.progress import RowProgress
from llama_adapter.data.pictures import open_picture, read_picture
from llama_adapter.data.row_pictures import PictureFile
from llama_adapter.vision.tower import VisionTower, prepare_batches
from llama_adapter.weights.locations import cache_folder

FEATURES_FILE = "features.f32"
INDEX_FILE = "index.txt"


def default_cache_folder() -> Path:
    """Where features are kept by default: a folder in the user's cache."""
    return cache_folder() / "features"


def _name(picture: Path | bytes) -> str:
    """The picture's name in the index."""
    return hashlib.sha256(read_picture(picture)).hexdigest()


class FeatureCache:
    """Looks features up, and has a tower compute those that are missing."""

    def __init__(self, tower: VisionTower, folder: str | Path | None = None) -> None:
        """Open the tower's cache below ``folder``, by default in the user's cache.

        Raises:
            UsageError: a folder that can't be written to.
        """
        self.tower = tower
        self.folder = Path(folder or default_cache_folder()) / tower.key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.folder}: can't store the features: {error.strerror}") from None
        self._rows = self._read_index()

    def _read_index(self) -> dict[str, int]:
        """Picture to its place in the features file. A killed run may have left an incomplete last entry."""
        index, features = self.folder / INDEX_FILE, self.folder / FEATURES_FILE
        if not index.exists() or not features.exists():
            return {}
        names = index.read_text(encoding="ascii").split("\n")[:-1]  # without a last line that was cut off
        whole = features.stat().st_size // self._row_bytes
        return {name: row for row, name in enumerate(names[:whole])}

    @property
    def _row_bytes(self) -> int:
        return 4 * self.tower.feature_width

    def encode(
        self, pictures: Sequence[Path | bytes], *, progress: Callable[[int], None] = lambda done: None
    ) -> Tensor:
        """The features of picture files (or of their contents): (N, F), float32.

        Args:
            progress: called with the number of pictures done.

        Raises:
            UsageError: a file that is no picture or changes meanwhile, or a full disk.
        """
        names = []
        missing: dict[str, Path | bytes] = {}
        for picture in pictures:
            name = _name(picture)
            names.append(name)
            if name not in self._rows:
                missing[name] = picture
        done = len(pictures) - len(missing)
        waiting = list(missing.items())
        for some, pixels in prepare_batches(waiting, self._pixels, self.tower.device):
            progress(done)
            self._append([name for name, _ in some], self.tower.encode(pixels).cpu())
            done += len(some)
        progress(len(pictures))
        if not pictures:
            return torch.zeros(0, self.tower.feature_width)
        shape = (len(self._rows), self.tower.feature_width)
        table = np.memmap(self.folder / FEATURES_FILE, dtype=np.float32, mode="r", shape=shape)
        return torch.from_numpy(table[[self._rows[name] for name in names]])

    def _pixels(self, entry: tuple[str, Path | bytes]) -> Tensor:
        name, picture = entry
        pixels = self.tower.prepare([open_picture(picture)])[0]
        if _name(picture) != name:  # or its features would be stored under its old content
            raise UsageError(f"{picture!s}: changed while pictures were encoded; start again")
        return pixels

    def store(self, pictures: Sequence[Path | bytes], features: Tensor) -> None:
        """Keep features that were computed elsewhere: (N, F), in the order of the pictures."""
        names = {_name(picture): place for place, picture in enumerate(pictures)}
        self._append(list(names), features[list(names.values())])

    def _append(self, names: Sequence[str], features: Tensor) -> None:
        """Add entries: the features first, then the index, so that all entries of the index are complete."""
        try:
            with alone_in(self.folder):
                self._rows = self._read_index()  # another process may have added entries
                new = [place for place, name in enumerate(names) if name not in self._rows]
                with open(self.folder / FEATURES_FILE, "ab") as file:
                    file.truncate(len(self._rows) * self._row_bytes)  # remove what a killed run left behind
                    file.write(features[new].numpy().tobytes())
                with open(self.folder / INDEX_FILE, "a", encoding="ascii") as file:
                    file.truncate(len(self._rows) * 65)  # 64 digits and the line break
                    file.write("".join(f"{names[place]}\n" for place in new))
                for place in new:
                    self._rows[names[place]] = len(self._rows)
        except OSError as error:
            raise UsageError(f"{self.folder}: the features can't be stored: {error.strerror}") from None


def picture_features(
    tower: VisionTower, cache: Path | None, images: Iterable[PictureFile]
) -> dict[PictureFile, Tensor]:
    """The features of each picture, (F,), read from the cache or computed, with a progress line."""
    images = list(dict.fromkeys(images))
    encoded = FeatureCache(tower, cache).encode(images, progress=RowProgress("pictures", len(images)))
    return dict(zip(images, encoded, strict=True))

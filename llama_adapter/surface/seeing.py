"""How the adapters of a model see: their vision towers, and the features of pictures.

Shapes: I pictures, F features of one.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor

from llama_adapter.common.errors import UsageError
from llama_adapter.data.pictures import Picture, opened_picture
from llama_adapter.methods.projection import VisionConfig
from llama_adapter.surface.named_adapters import NO_ADAPTER, NamedAdapters

if TYPE_CHECKING:  # slow to import, and not needed for text
    from llama_adapter.vision.tower import VisionTower

_LOADING_A_TOWER = threading.Lock()  # not part of the model, which can be copied and pickled


class Seeing(NamedAdapters):
    """The part of `LlamaAdapter` that handles pictures."""

    _towers: dict[Any, VisionTower]  # in a plain dict, since a tower is not part of the model's state

    def vision_config(self, name: str) -> VisionConfig:
        """How an adapter sees pictures. Raises UsageError for one that does not, and for the bare base."""
        if name == NO_ADAPTER:
            raise UsageError("the bare base can't see pictures; choose an adapter that can")
        vision = self.get_adapter(name).config.vision
        if vision is None:
            raise UsageError(f"adapter {name!r} can't see pictures; choose one that was trained on them")
        return vision

    def sees(self, adapter: str | None = None) -> bool:
        """Whether an adapter (by default the active one) was trained on pictures."""
        name = self.answering_adapter(adapter, pictured=True)
        return name != NO_ADAPTER and self.get_adapter(name).config.vision is not None

    def tower(self, adapter: str | None = None) -> VisionTower:
        """The vision tower of an adapter (by default the active one). It is loaded at the first call.

        Raises:
            UsageError: an adapter without a tower, or a tower that differs from the one of its training.
        """
        from llama_adapter.vision.tower import load_tower

        name = self.answering_adapter(adapter, pictured=True)
        vision = self.vision_config(name)
        key = (vision.tower_fingerprint, vision.depths)
        with _LOADING_A_TOWER:
            if key not in self._towers:
                tower = load_tower(
                    vision.tower, depths=vision.depths, weights=self.weights, device=self.device
                )
                if tower.fingerprint != vision.tower_fingerprint:
                    raise UsageError(
                        f"adapter {name!r} was trained with a tower {vision.tower!r} of fingerprint "
                        f"{vision.tower_fingerprint}; the one here has {tower.fingerprint}: get the right one"
                    )
                self._towers[key] = tower
            return self._towers[key]

    def encode_images(
        self, images: Picture | Sequence[Picture], *, adapter: str | None = None, allow_urls: bool = False
    ) -> Tensor:
        """The features of pictures for an adapter, (I, F). Pictures are files, contents of files or images.

        Raises:
            UsageError: a file that is no picture, or an adapter that was not trained on pictures.
        """
        single = isinstance(images, (str, Path, bytes, Image.Image))
        several = cast("Sequence[Picture]", [images] if single else images)
        tower = self.tower(adapter)
        if not several:
            return torch.zeros(0, tower.feature_width)
        opened = (opened_picture(image, allow_urls=allow_urls) for image in several)
        return tower.encode(tower.prepare(opened))

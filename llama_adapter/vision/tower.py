"""A frozen vision tower of open_clip: gives global features from several depths (paper, section 3.3, eq. 9).

Shapes: N pictures, S side of a prepared picture in pixels, F features of one picture.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import open_clip
import torch
from huggingface_hub.errors import GatedRepoError
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from llama_adapter.common.errors import UsageError
from llama_adapter.vision.colours import FIGURE_WIDTH, HISTOGRAMS_WIDTH, colour_histograms, figure
from llama_adapter.weights import locations
from llama_adapter.weights.hub import gated_error

MAX_DEPTHS = 4  # M: how many depths are used by default
MAX_ASPECT = 20  # of a picture. A thinner one loses its ends: resized by its short side it would be huge.

ENCODED_AT_ONCE, ENCODED_AT_ONCE_CUDA = 8, 128  # pictures; more at once is no faster on a CPU

FIGURE_DEPTH, COLOURS_DEPTH = -1, 0  # of the pixels alone

Entry = TypeVar("Entry")  # what stands for a picture

_EXTRACTION = 1  # raise it with each change to what `encode` computes, so that cached features are not reused


class VisionTower(nn.Module):
    """The picture side of a CLIP model, frozen: gives one feature vector from each of M depths.

    A depth is a block of a transformer or a stage of a convolutional tower, counted from 1. Its vector is the
    class token, or the mean over the patches if there is none or timm does not give access to it. If a
    convolutional tower has more layers after its last stage (EfficientNet), the input of its classifier is
    one more depth. Each vector is scaled to a root mean square of 1. Two more come from the pixels alone, of
    whose colours a tower's means show little: depth 0, the picture's colours (`colour_histograms`), scaled
    likewise, and depth -1, what stands out from the border (`figure`). All are concatenated.

    Attributes:
        name: the name it was requested by.
        depths: the depths that are used, lowest first.
        fingerprint: 16 hexadecimal digits that identify the weights, the architecture and the preprocessing.
        key: the fingerprint and the depths. Features belong to a key.
        feature_width: F.
    """

    _mean: Tensor  # of the preprocessing, a number for each channel
    _std: Tensor

    def __init__(
        self,
        visual: Any,
        *,
        name: str,
        depths: Sequence[int] | None = None,
        architecture: Mapping[str, Any] | None = None,
    ) -> None:
        """Freeze ``visual``, the picture side of an open_clip model.

        Args:
            depths: by default up to four, evenly spaced, the last one included.
            architecture: the config it was built from. The weights alone tell neither the number of heads nor
                the activation function.

        Raises:
            UsageError: a tower whose depths can't be read, or depths that it does not have.
        """
        super().__init__()
        self.visual = visual.float().eval().requires_grad_(False)
        self.name = name
        if not hasattr(visual, "forward_intermediates"):
            raise UsageError(f"tower {name!r}: open_clip can't read depths of a {type(visual).__name__}")
        preprocess = PreprocessCfg(**visual.preprocess_cfg)
        self.transform = image_transform_v2(preprocess, is_train=False)
        mean, std = (
            torch.tensor(of, device=self.device)[:, None, None] for of in (preprocess.mean, preprocess.std)
        )
        self.register_buffer("_mean", mean, persistent=False)
        self.register_buffer("_std", std, persistent=False)
        widths = dict(enumerate((vector.shape[1] for vector in self._vectors(self._probe(), None)), start=1))
        deepest = len(widths)
        widths |= {COLOURS_DEPTH: HISTOGRAMS_WIDTH, FIGURE_DEPTH: FIGURE_WIDTH}
        self.depths = _evenly_spaced(deepest) if depths is None else tuple(depths)
        if not self.depths or list(self.depths) != sorted(set(self.depths) & set(widths)):
            raise UsageError(
                f"tower {name!r} has the depths 1 to {deepest}, 0 (the picture's colours) and -1 (what "
                "stands out from its border), lowest first; "
                f"{', '.join(map(str, self.depths)) or 'none'} given (--depths)"
            )
        self.feature_width = sum(widths[depth] for depth in self.depths)
        self.fingerprint = _fingerprint(self.visual, architecture or {})
        self.key = f"{self.fingerprint}-{'-'.join(map(str, self.depths))}"

    def train(self, mode: bool = True) -> VisionTower:
        """Stays in evaluation mode: batch norms and dropouts are frozen too."""
        return super().train(False)

    def prepare(self, images: Iterable[Image.Image]) -> Tensor:
        """Preprocess upright RGB pictures one by one, as in the tower's training, to pixels (N, 3, S, S)."""
        return torch.stack([self.transform(_without_ends(image)) for image in images])

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, S, S) -> features (N, F), float32, on the tower's device."""
        pixels = pixels.to(self.device)
        features, vectors = [], []
        if self.depths[0] <= COLOURS_DEPTH:
            plain = pixels * self._std + self._mean
            features = [figure(plain)] if FIGURE_DEPTH in self.depths else []
            vectors = [colour_histograms(plain)] if COLOURS_DEPTH in self.depths else []
        if inner := [depth for depth in self.depths if depth > 0]:
            vectors += self._vectors(pixels, inner)
        features += [F.normalize(vector, dim=1) * vector.shape[1] ** 0.5 for vector in vectors]
        return torch.cat(features, dim=1)

    @property
    def device(self) -> torch.device:
        return next(self.visual.parameters()).device

    @torch.no_grad()
    def _vectors(self, pixels: Tensor, depths: Sequence[int] | None) -> list[Tensor]:
        """The vectors of the requested depths; None for all."""
        if isinstance(self.visual, TimmModel):
            return _timm_vectors(self.visual.trunk, pixels, depths)
        indices = None if depths is None else [depth - 1 for depth in depths]
        found = self.visual.forward_intermediates(
            pixels, indices=indices, intermediates_only=True, output_extra_tokens=True
        )
        if "image_intermediates_prefix" in found:
            return [tokens[:, 0] for tokens in found["image_intermediates_prefix"]]
        return [places.mean((2, 3)) for places in found["image_intermediates"]]

    def _probe(self) -> Tensor:
        return self.prepare([Image.new("RGB", (8, 8))]).to(self.device)


def prepare_batches(
    pictures: Sequence[Entry], prepare: Callable[[Entry], Tensor], device: torch.device
) -> Iterator[tuple[Sequence[Entry], Tensor]]:
    """Pictures in batches of a size that suits the device, each with its pixels, (N, 3, S, S).

    All cores prepare them: reading and decoding leave Python's lock to others.

    Args:
        prepare: gives the pixels of one picture, (3, S, S).
    """
    size = ENCODED_AT_ONCE_CUDA if device.type == "cuda" else ENCODED_AT_ONCE
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(pictures), size):
            some = pictures[start : start + size]
            yield some, torch.stack(list(pool.map(prepare, some)))


def _without_ends(image: Image.Image) -> Image.Image:
    """The middle of a picture that is very wide or very tall."""
    width, height = image.size
    most = MAX_ASPECT * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return image.crop((left, top, width - left, height - top))


def _timm_vectors(trunk: Any, pixels: Tensor, depths: Sequence[int] | None) -> list[Tensor]:
    shows_class = "return_prefix_tokens" in inspect.signature(trunk.forward_intermediates).parameters
    has_class = shows_class and getattr(trunk, "cls_token", None) is not None
    options = {"return_prefix_tokens": True} if has_class else {}
    # Always all stages: a stage's index is then its depth, and the last stage is computed anyway.
    last, found = trunk.forward_intermediates(pixels, **options)
    vectors = [level[1][:, 0] if has_class else level.mean((2, 3)) for level in found]
    if hasattr(trunk, "conv_head"):
        head = trunk.forward_head(last, pre_logits=True)
        vectors.append(
            head if head.ndim == 2 else head.mean((2, 3))
        )  # where attention pools it, the vector is complete already
    return vectors if depths is None else [vectors[depth - 1] for depth in depths]


def _evenly_spaced(count: int) -> tuple[int, ...]:
    taken = min(MAX_DEPTHS, count)
    return tuple(math.ceil(count * (number + 1) / taken) for number in range(taken))


def _fingerprint(visual: Any, architecture: Mapping[str, Any]) -> str:
    facts = [_EXTRACTION, architecture, visual.preprocess_cfg]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(visual.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_tower(
    name: str,
    *,
    depths: Sequence[int] | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> VisionTower:
    """Load the picture side of an open_clip model.

    Args:
        name: a name in the weights folders (clip-mini), a folder or a hub id (owner/name), each with
            open_clip_config.json; or a model of open_clip with its pretrained tag (ViT-B-32:openai).
        depths: see `VisionTower`.

    Raises:
        UsageError: not found, gated, damaged, or a tower whose depths can't be read.
    """
    model, _, tag = name.removeprefix("local-dir:").partition(":")
    found: dict[str, Any]
    if tag and model in open_clip.list_models():
        found = {"model_name": model, "pretrained": tag}
        # The preprocessing of OpenAI's weights and some others. The model's own config does not have it.
        if (open_clip.get_pretrained_cfg(model, tag) or {}).get("quick_gelu"):
            found["force_quick_gelu"] = True
    else:
        try:
            place = locations.resolve(name.removeprefix("local-dir:"), kind="tower", weights=weights)
        except UsageError:
            if tags := open_clip.list_pretrained_tags_by_model(name):
                own = f"tower {name!r} is one of open_clip's own; say whose weights, such as {name}:{tags[0]}"
                raise UsageError(own) from None
            raise
        scheme = "local-dir:" if Path(place).is_dir() else "hf-hub:"
        found = {"model_name": scheme + place}
        name = locations.name_of(place, kind="tower", weights=weights)
    log = logging.getLogger()
    before = log.level
    log.setLevel(logging.ERROR)  # open_clip logs each step of loading to the root logger
    try:
        clip: Any = open_clip.create_model(
            **found, device=device, pretrained_text=False, require_pretrained=True
        )
        built = open_clip.get_model_config(found["model_name"])
    except GatedRepoError:
        raise gated_error("tower", name) from None
    except Exception as error:  # open_clip and timm raise all kinds of errors for a wrong config
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"tower {name!r} cannot be loaded: {reason}") from None
    finally:
        log.setLevel(before)
    quick = found.get("force_quick_gelu", built.get("quick_gelu", False))
    architecture = {"vision": built["vision_cfg"], "quick_gelu": bool(quick)}
    return VisionTower(clip.visual, name=name, depths=depths, architecture=architecture)

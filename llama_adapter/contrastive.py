"""A small CLIP of our own: pictures with texts -> an open_clip model whose picture side is a vision tower.

The picture side starts from a tower that already knows pictures (ImageNet's), the text side from nothing.
Both are trained to find each other within a batch by open_clip's own loss (Radford et al., arXiv 2103.00020).

Shapes: B pairs of a batch, S side of a picture in pixels, C tokens of a text, E width of the embeddings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from llama_adapter.data import PictureFile, read_records
from llama_adapter.errors import UsageError
from llama_adapter.files import write_atomically, write_json
from llama_adapter.pictures import open_picture
from llama_adapter.progress import clock
from llama_adapter.rows import EASY_VQA, read_rows
from llama_adapter.run_folder import RunFolder
from llama_adapter.template import CAPTION_QUESTIONS
from llama_adapter.training import stop_request

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
CROPS_FILE = "crops.f16"
_CROPS_AT_ONCE = 16  # through the frozen blocks


@dataclass(frozen=True)
class Pair:
    """A picture and the texts that describe it, one of which is drawn each time."""

    picture: PictureFile
    texts: tuple[str, ...]


# --- pairs --------------------------------------------------------------------------------------------------


def read_pairs(source: str, *, split: str = "train") -> list[Pair]:
    """The pairs of a source: rows of {"image", "captions"}, or easy-vqa.

    Rows that name another split are left out. Raises UsageError where a row has no captions, or none is left.
    """
    if source == EASY_VQA:
        return _shape_pairs([row for _, row in read_rows(source).rows if row["split"] == split])
    texts: dict[PictureFile, list[str]] = {}
    for record in read_records(source, split=split)[0]:
        if len(record.images) != 1 or record.turns[0].text not in CAPTION_QUESTIONS:
            raise UsageError(f"{source}: row {record.row}: expected 'image' and 'captions'")
        texts.setdefault(record.images[0], []).append(record.turns[-1].text)
    return [Pair(picture, tuple(several)) for picture, several in texts.items()]


def read_names(folder: str | Path) -> list[Pair]:
    """Pictures with one name each: names.json (file to name) beside images/; of a name the first picture.

    Raises UsageError for a file that is missing, damaged, or holds something else.
    """
    path = Path(folder) / "names.json"
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        first = {name: file for file, name in reversed(names.items())}
        return [
            Pair(Path(folder) / "images" / file, (f"a photo of a {name}.",))
            for file, name in names.items()
            if first[name] == file
        ]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"{path}: expected an object of files and their names: {error}") from None


def split_names(names: Sequence[Pair], kept: int) -> tuple[list[Pair], list[Pair]]:
    """So many names for zero-shot scoring, drawn alike every time, and the rest to train on."""
    drawn = list(names)
    random.Random(0).shuffle(drawn)
    return drawn[:kept], drawn[kept:]


def _shape_pairs(rows: Sequence[dict[str, str]]) -> list[Pair]:
    """easy-VQA's pictures in words: the answers to "what ..." tell a picture's shape and its colour."""
    known: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["question"].startswith("what"):
            what = "shape" if row["answer"] in ("circle", "rectangle", "triangle") else "colour"
            known.setdefault(row["image"], {})[what] = row["answer"]
    pairs = []
    for image, said in known.items():
        if len(said) == 2:
            colour, shape = said["colour"], said["shape"]
            texts = (
                f"a {colour} {shape}",
                f"a {shape} that is {colour}",
                f"a picture of a {colour} {shape}.",
            )
            pairs.append(Pair(Path(image), texts))
    return pairs


# --- the model ----------------------------------------------------------------------------------------------


def load_clip(folder: Path) -> open_clip.CLIP:
    """The whole model of an open_clip folder, for scoring. Raises UsageError where it cannot be loaded."""
    try:
        clip = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        clip.llama_adapter_config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except Exception as error:  # there is no end to what a config can make open_clip and timm raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{folder}: no open_clip folder: {reason}") from None
    return clip


def build_clip(
    start: Path, *, embed_dim: int = 256, text_width: int = 96, text_layers: int = 3
) -> open_clip.CLIP:
    """A CLIP whose picture side has the weights of the open_clip folder ``start``; the rest is random.

    Its text side reads 32 tokens and has heads of width 32.
    """
    known = load_clip(start)
    if not hasattr(getattr(known.visual, "trunk", None), "conv_stem"):
        raise UsageError(f"{start}: its picture side is no EfficientNet of timm, from which this starts")
    config = known.llama_adapter_config
    model_config = {
        **config["model_cfg"],
        "embed_dim": embed_dim,
        "text_cfg": {
            "context_length": 32,
            "vocab_size": 49408,
            "width": text_width,
            "heads": max(1, text_width // 32),
            "layers": text_layers,
        },
    }
    clip = open_clip.CLIP(**model_config)
    clip.visual.trunk.load_state_dict(known.visual.trunk.state_dict())
    clip.llama_adapter_config = {"model_cfg": model_config, "preprocess_cfg": config["preprocess_cfg"]}
    return clip


def save_clip(clip: open_clip.CLIP, folder: Path) -> None:
    """Write an open_clip folder, in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: t.detach().cpu().half() if t.is_floating_point() else t.cpu()
        for name, t in clip.state_dict().items()
    }
    with write_atomically(folder / WEIGHTS_FILE) as path:
        path.write_bytes(save({name: t.contiguous() for name, t in state.items()}, metadata={"format": "pt"}))
    write_json(folder / CONFIG_FILE, clip.llama_adapter_config)


# --- training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipSettings:
    """How a CLIP is trained.

    Attributes:
        learning_rate: the peak of what starts from nothing: the text side and the picture side's head.
        trunk_learning_rate: the peak of the pretrained rest of the picture side.
        frozen_blocks: the lowest blocks of the picture side that stay as they are, with all before them:
            they know edges and textures already. What they give is computed once for each crop and kept,
            since most of a step's work is theirs.
        crop: the smallest share of a picture that a random crop keeps.
        crops: how many crops of each picture there are, where blocks are frozen; without, each is a new one.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    trunk_learning_rate: float = 1e-4
    frozen_blocks: int = 0
    weight_decay: float = 0.1
    warmup_steps: int = 100
    crop: float = 0.6
    crops: int = 2
    max_steps: int | None = None
    checkpoint_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "crops", "checkpoint_every", "max_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name.replace('_', '-')} is {value}; expected 1 or more")
        for name in ("learning_rate", "trunk_learning_rate", "weight_decay"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UsageError(f"{name.replace('_', '-')} is {value}; expected a number, 0 or more")
        if not 0 < self.crop <= 1:
            raise UsageError(f"crop is {self.crop}; expected a share above 0, at most 1")
        if self.frozen_blocks < 0:
            raise UsageError(f"frozen-blocks is {self.frozen_blocks}; expected 0 or more")


def train_clip(
    clip: open_clip.CLIP,
    pairs: Sequence[Pair],
    settings: ClipSettings,
    output: Path,
    *,
    data: dict[str, Any],
    validate: Callable[[], dict[str, float]],
    resume: bool = False,
) -> None:
    """Train, and write the model to ``output`` at every checkpoint and at the end.

    Args:
        data: what tells these pairs from others; a resume must find it again.
        validate: figures that are kept with the metrics after each epoch.

    Raises:
        UsageError: a folder with another run, fewer pairs than a batch, a file that is no picture.
    """
    device = next(clip.parameters()).device
    if len(pairs) < settings.batch_size:
        raise UsageError(f"{len(pairs)} pairs are fewer than a batch of {settings.batch_size}")
    tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)
    frozen = _freeze(clip, settings.frozen_blocks)
    clip.visual.to(memory_format=torch.channels_last)  # which its convolutions are faster with
    trunk = [parameter for parameter in clip.visual.trunk.parameters() if parameter.requires_grad]
    known = {id(parameter) for parameter in clip.visual.trunk.parameters()}
    rest = [parameter for parameter in clip.parameters() if id(parameter) not in known]
    optimizer = torch.optim.AdamW(
        [
            {"params": rest, "peak": settings.learning_rate},
            {"params": trunk, "peak": settings.trunk_learning_rate},
        ],
        betas=(0.9, 0.98),
        eps=1e-6,
        weight_decay=settings.weight_decay,
    )
    loss_of = open_clip.ClipLoss()
    per_epoch = len(pairs) // settings.batch_size
    total = min(per_epoch * settings.epochs, settings.max_steps or math.inf)
    total = int(total)
    texts = hashlib.sha256(repr([pair.texts for pair in pairs]).encode()).hexdigest()
    description = {
        "settings": dataclasses.asdict(settings),
        "data": {**data, "pairs": len(pairs), "texts": texts},
        "model": clip.llama_adapter_config["model_cfg"],
    }
    folder = RunFolder(output, description, resume=resume)
    step = 0
    if resume and (state := folder.load_checkpoint()) is not None:
        clip.load_state_dict(state["clip"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        folder.line.say(f"going on from step {step}")
    first, started = step, time.monotonic()
    with folder.metrics(step), stop_request() as stop, _Crops(clip, pairs, settings, output) as crops:
        while step < total:
            batch = _draw(pairs, step, settings)
            pixels = crops.of_step([number for number, _ in batch], step).to(device)
            texts = tokenizer([text for _, text in batch]).to(device)
            rate = _schedule(step, total, settings.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            clip.train()
            for module in frozen:
                module.eval()  # its statistics stay too
            image_features = F.normalize(crops.encode(pixels), dim=-1)
            text_features = clip.encode_text(texts, normalize=True)
            loss = loss_of(image_features, text_features, clip.logit_scale.exp())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                clip.logit_scale.clamp_(0, math.log(100))
            step += 1
            folder.measured(step, loss=loss.item(), learning_rate=settings.learning_rate * rate)
            pace = (time.monotonic() - started) / (step - first)
            folder.line.show(
                f"step {step}/{total}  loss {loss.item():.3f}  {settings.batch_size / pace:.1f} pictures/s  "
                f"{clock(pace * (total - step))} left"
            )
            if step % per_epoch == 0 or step == total:
                figures = validate()
                folder.measured(step, **figures)
                folder.line.say(f"step {step}  " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items()))
            if step % settings.checkpoint_every == 0 or step == total or stop.is_set():
                state = {"clip": clip.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                folder.save_checkpoint(step, state)
                save_clip(clip, output)
            if stop.is_set() and step < total:
                folder.line.say(
                    f"stopped after step {step} of {total}; the same command with --resume goes on from there"
                )
                raise KeyboardInterrupt


def _freeze(clip: open_clip.CLIP, blocks: int) -> list[torch.nn.Module]:
    """Take the lowest blocks of the picture side, and what comes before them, out of the training."""
    trunk = clip.visual.trunk
    if blocks > len(trunk.blocks):
        raise UsageError(f"frozen-blocks is {blocks}; the picture side has {len(trunk.blocks)} blocks")
    frozen = [trunk.conv_stem, trunk.bn1, *trunk.blocks[:blocks]] if blocks else []
    for module in frozen:
        module.requires_grad_(False)
    return frozen


class _Crops:
    """What the trained part of the picture side reads: crops, or what the frozen blocks make of them.

    Those are kept in a file in the run's folder for as long as the training lasts.
    """

    def __init__(
        self, clip: open_clip.CLIP, pairs: Sequence[Pair], settings: ClipSettings, output: Path
    ) -> None:
        self.clip, self.pairs, self.settings, self.folder = clip, pairs, settings, output
        self.transform = image_transform_v2(
            PreprocessCfg(**clip.llama_adapter_config["preprocess_cfg"]),
            is_train=True,
            aug_cfg=AugmentationCfg(scale=(settings.crop, 1.0)),
        )
        self._seed = settings.seed * 1_000_003
        self._kept: np.memmap | None = None
        self._known: set[int] = set()

    def __enter__(self) -> _Crops:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept = None
        (self.folder / CROPS_FILE).unlink(missing_ok=True)

    def of_step(self, numbers: Sequence[int], step: int) -> Tensor:
        """A crop of each pair's picture, mirrored half of the time. A resumed run gets the same."""
        draw = random.Random(f"{self.settings.seed}/{step}/crops")
        crops = []
        for number in numbers:
            if self.settings.frozen_blocks:
                crop = self._states(number, draw.randrange(self.settings.crops))
            else:
                crop = self._cut(number, draw.getrandbits(32))
            crops.append(crop.flip(-1) if draw.random() < 0.5 else crop)
        return torch.stack(crops).contiguous(memory_format=torch.channels_last)

    def encode(self, crops: Tensor) -> Tensor:
        """Embeddings of what `of_step` gives, not normalised."""
        if not self.settings.frozen_blocks:
            return self.clip.encode_image(crops)
        trunk = self.clip.visual.trunk  # as in timm's EfficientNet.forward, from the first block that learns
        states = trunk.bn2(trunk.conv_head(trunk.blocks[self.settings.frozen_blocks :](crops)))
        return self.clip.visual.head(trunk.forward_head(states))

    def _cut(self, number: int, seed: int) -> Tensor:
        torch.manual_seed(seed)  # what torchvision draws from
        return self.transform(open_picture(self.pairs[number].picture))

    @torch.no_grad()
    def _states(self, number: int, crop: int) -> Tensor:
        """What the frozen blocks make of a crop: from the file, once that has it."""
        start = number - number % _CROPS_AT_ONCE
        # Always the same ones together, so that rounding does not depend on which came first.
        numbers = range(start, min(start + _CROPS_AT_ONCE, len(self.pairs)))
        places = [n * self.settings.crops + crop for n in numbers]
        if self._kept is None or places[0] not in self._known:
            trunk = self.clip.visual.trunk.eval()
            cut = [self._cut(n, self._seed + place) for n, place in zip(numbers, places, strict=True)]
            pixels = torch.stack(cut)
            pixels = pixels.to(next(trunk.parameters()).device, memory_format=torch.channels_last)
            states = trunk.blocks[: self.settings.frozen_blocks](trunk.bn1(trunk.conv_stem(pixels)))
            if self._kept is None:
                shape = (len(self.pairs) * self.settings.crops, *states.shape[1:])
                self._kept = np.memmap(self.folder / CROPS_FILE, np.float16, "w+", shape=shape)
            self._kept[places] = states.cpu().numpy()
            self._known.add(places[0])
        return torch.from_numpy(self._kept[number * self.settings.crops + crop].astype(np.float32))


def _draw(pairs: Sequence[Pair], step: int, settings: ClipSettings) -> list[tuple[int, str]]:
    """The numbers of a step's pairs, a text drawn for each; an epoch shows as many pictures as there are.

    No two of a batch have the same texts where that can be: each would have to be told from the other.
    """
    draw = random.Random(f"{settings.seed}/{step}")
    order = draw.sample(range(len(pairs)), len(pairs))
    new: list[int] = []
    again: list[int] = []
    seen: set[tuple[str, ...]] = set()
    for number in order:
        (again if pairs[number].texts in seen else new).append(number)
        seen.add(pairs[number].texts)
    chosen = (new + again)[: settings.batch_size]
    return [(number, draw.choice(pairs[number].texts)) for number in chosen]


def _schedule(step: int, total: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# --- scoring ------------------------------------------------------------------------------------------------


@torch.no_grad()
def retrieval(clip: open_clip.CLIP, pairs: Sequence[Pair]) -> dict[str, float]:
    """Share of texts with their picture among the first 1, 5, 10, and of pictures with a text of theirs."""
    clip.eval()
    images = _encode_images(clip, [pair.picture for pair in pairs])
    owners = torch.tensor([number for number, pair in enumerate(pairs) for _ in pair.texts])
    texts = _encode_texts(clip, [text for pair in pairs for text in pair.texts])
    scores = texts @ images.T  # a row for each text, a column for each picture
    figures = {}
    for name, found in (
        ("text_to_image", owners[:, None] == torch.arange(len(pairs))[scores.argsort(1, descending=True)]),
        ("image_to_text", owners[scores.T.argsort(1, descending=True)] == torch.arange(len(pairs))[:, None]),
    ):
        for k in (1, 5, 10):
            figures[f"{name}_r{k}"] = found[:, :k].any(1).float().mean().item()
    return figures


@torch.no_grad()
def zero_shot(clip: open_clip.CLIP, pairs: Sequence[Pair]) -> float:
    """How often a picture's own text is the nearest among the first texts of all pairs."""
    clip.eval()
    images = _encode_images(clip, [pair.picture for pair in pairs])
    texts = _encode_texts(clip, [pair.texts[0] for pair in pairs])
    return ((images @ texts.T).argmax(1) == torch.arange(len(pairs))).float().mean().item()


def _encode_images(clip: open_clip.CLIP, pictures: Sequence[PictureFile]) -> Tensor:
    device = next(clip.parameters()).device
    preprocess = image_transform_v2(
        PreprocessCfg(**clip.llama_adapter_config["preprocess_cfg"]), is_train=False
    )
    batches = (pictures[start : start + 8] for start in range(0, len(pictures), 8))
    encoded = [
        clip.encode_image(
            torch.stack([preprocess(open_picture(p)) for p in batch]).to(device), normalize=True
        )
        for batch in batches
    ]
    return torch.cat(encoded).cpu()


def _encode_texts(clip: open_clip.CLIP, texts: Sequence[str]) -> Tensor:
    tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)
    device = next(clip.parameters()).device
    batches = (tokenizer(list(texts[start : start + 64])) for start in range(0, len(texts), 64))
    return torch.cat([clip.encode_text(batch.to(device), normalize=True) for batch in batches]).cpu()

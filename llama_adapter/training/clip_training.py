"""Training a small CLIP on pictures with texts.

Shapes: B pairs of a batch, S side of a picture in pixels, E width of the embeddings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from llama_adapter.common.errors import UsageError
from llama_adapter.common.progress import clock
from llama_adapter.data.pictures import open_picture
from llama_adapter.training.run_folder import RunFolder
from llama_adapter.training.schedule import warmup_cosine
from llama_adapter.training.stopping import stop_request
from llama_adapter.vision.contrastive import Pair, save_clip

CROPS_FILE = "crops.f16"
_CROPS_AT_ONCE = 16  # that go through the frozen blocks together


@dataclass(frozen=True)
class ClipSettings:
    """How a CLIP is trained. train.clip makes its options from these fields and their "help".

    Attributes:
        learning_rate: the peak for everything with a random start: the text side and the picture side's head.
        trunk_learning_rate: the peak for the rest of the picture side, which is pretrained.
        frozen_blocks: how many of the lowest blocks of the picture side are not trained, with all layers
            before them. They already know edges and textures. They also take most of a step's time, so their
            output is computed once for each crop and kept.
        crop: the smallest share of a picture that a random crop keeps.
        crops: how many crops are made of each picture if blocks are frozen. Without frozen blocks every crop
            is a new one.
    """

    epochs: int = field(default=10, metadata={"help": "passes over the pictures"})
    batch_size: int = field(
        default=64,
        metadata={"help": "pairs in a step: each text has to be matched with one of this many pictures"},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "peak for the text side and the heads"})
    trunk_learning_rate: float = field(
        default=1e-4, metadata={"help": "peak for the pretrained part of the picture side"}
    )
    frozen_blocks: int = field(
        default=0, metadata={"help": "how many of the picture side's lowest blocks are not trained"}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW's"})
    warmup_steps: int = field(default=100, metadata={"help": "steps in which the rates rise"})
    crop: float = field(
        default=0.6, metadata={"help": "smallest share of a picture that a random crop keeps"}
    )
    crops: int = field(
        default=2,
        metadata={"help": "crops of each picture, if blocks are frozen; their output is computed once"},
    )
    max_steps: int | None = field(
        default=None, metadata={"help": "end the run, and its schedule, after N steps"}
    )
    checkpoint_every: int = field(default=100, metadata={"help": "steps between checkpoints"})
    seed: int = field(
        default=0,
        metadata={"help": "seed for the order of the pairs, the texts, the crops and the first weights"},
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "crops", "checkpoint_every", "max_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; expected 1 or more")
        for name in ("learning_rate", "trunk_learning_rate", "weight_decay"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; expected a number, 0 or more")
        if not 0 < self.crop <= 1:
            raise UsageError(f"--crop is {self.crop}; expected a share above 0, at most 1")
        if self.frozen_blocks < 0:
            raise UsageError(f"--frozen-blocks is {self.frozen_blocks}; expected 0 or more")
        if self.warmup_steps < 0:
            raise UsageError(f"--warmup-steps is {self.warmup_steps}; expected 0 or more")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed is {self.seed}; expected 0 to 2**32 - 1")


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
        data: identifies these pairs. A run can only be resumed with the same data.
        validate: computes figures after each epoch, which are kept with the metrics.

    Raises:
        UsageError: a folder with another run, fewer pairs than a batch, or a file that is no picture.
    """
    device = next(clip.parameters()).device
    if len(pairs) < settings.batch_size:
        raise UsageError(
            f"{len(pairs)} pairs are fewer than a batch of {settings.batch_size}; give more --data, or a "
            "smaller --batch-size"
        )
    tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)
    frozen = _freeze(clip, settings.frozen_blocks)
    clip.visual.to(memory_format=torch.channels_last)  # makes its convolutions faster
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
    with folder.metrics(step), stop_request() as stop, Crops(clip, pairs, settings, output) as crops:
        for cut, said in _loader(crops, range(step, total), device):
            pixels = cut.to(device, memory_format=torch.channels_last)
            texts = tokenizer(said).to(device)
            rate = warmup_cosine(step, total, settings.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            clip.train()
            for module in frozen:
                module.eval()  # so that the statistics of batch norms stay too
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                image_features = crops.encode(pixels)
                text_features = clip.encode_text(texts)
            image_features = F.normalize(image_features.float(), dim=-1)
            text_features = F.normalize(text_features.float(), dim=-1)
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


class _Steps(Dataset[tuple[Tensor, list[str]]]):
    """The input of each step: the crops, and the texts that they are matched with."""

    def __init__(self, crops: Crops) -> None:
        self.crops = crops

    def __getitem__(self, step: int) -> tuple[Tensor, list[str]]:
        batch = draw_batch(self.crops.pairs, step, self.crops.settings)
        return self.crops.of_step([number for number, _ in batch], step), [text for _, text in batch]


def _loader(
    crops: Crops, wanted: Sequence[int], device: torch.device
) -> DataLoader[tuple[Tensor, list[str]]]:
    """Makes the steps' input. On a GPU all cores make it ahead; on a CPU they have enough to do."""
    ahead = device.type == "cuda" and not crops.settings.frozen_blocks
    workers = (os.cpu_count() or 1) if ahead else 0
    return DataLoader(_Steps(crops), batch_size=None, sampler=wanted, num_workers=workers, pin_memory=ahead)


def _freeze(clip: open_clip.CLIP, blocks: int) -> list[torch.nn.Module]:
    """Freeze the lowest blocks of the picture side, and all layers before them."""
    trunk = clip.visual.trunk
    if blocks > len(trunk.blocks):
        raise UsageError(f"--frozen-blocks is {blocks}; the picture side has {len(trunk.blocks)} blocks")
    frozen = [trunk.conv_stem, trunk.bn1, *trunk.blocks[:blocks]] if blocks else []
    for module in frozen:
        module.requires_grad_(False)
    return frozen


class Crops:
    """The input of the trained part of the picture side: crops, or the frozen blocks' output for them.

    That output is kept in a file in the run's folder until the training ends.
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

    def __enter__(self) -> Crops:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept = None
        (self.folder / CROPS_FILE).unlink(missing_ok=True)

    def of_step(self, numbers: Sequence[int], step: int) -> Tensor:
        """A random crop of each pair's picture, mirrored half of the time.

        A resumed run gets the same crops.
        """
        draw = random.Random(f"{self.settings.seed}/{step}/crops")
        crops = []
        for number in numbers:
            if self.settings.frozen_blocks:
                crop = self.states(number, draw.randrange(self.settings.crops))
            else:
                crop = self.cut(number, draw.getrandbits(32))
            crops.append(crop.flip(-1) if draw.random() < 0.5 else crop)
        return torch.stack(crops).contiguous(memory_format=torch.channels_last)

    def encode(self, crops: Tensor) -> Tensor:
        """Embeddings, not normalised, of what `of_step` returned."""
        if not self.settings.frozen_blocks:
            return self.clip.encode_image(crops)
        trunk = self.clip.visual.trunk  # as in timm's EfficientNet.forward, from the first trained block on
        states = trunk.bn2(trunk.conv_head(trunk.blocks[self.settings.frozen_blocks :](crops)))
        return self.clip.visual.head(trunk.forward_head(states))

    def cut(self, number: int, seed: int) -> Tensor:
        """A random crop of a picture, (3, S, S)."""
        torch.manual_seed(seed)  # torchvision draws from torch's generator
        return self.transform(open_picture(self.pairs[number].picture))

    @torch.no_grad()
    def states(self, number: int, crop: int) -> Tensor:
        """The frozen blocks' output for a crop, from the file if it is there."""
        start = number - number % _CROPS_AT_ONCE
        # Always the same crops together, so that rounding does not depend on the order of computation.
        numbers = range(start, min(start + _CROPS_AT_ONCE, len(self.pairs)))
        places = [n * self.settings.crops + crop for n in numbers]
        if self._kept is None or places[0] not in self._known:
            trunk = self.clip.visual.trunk.eval()
            cut = [self.cut(n, self._seed + place) for n, place in zip(numbers, places, strict=True)]
            pixels = torch.stack(cut)
            pixels = pixels.to(next(trunk.parameters()).device, memory_format=torch.channels_last)
            states = trunk.blocks[: self.settings.frozen_blocks](trunk.bn1(trunk.conv_stem(pixels)))
            if self._kept is None:
                shape = (len(self.pairs) * self.settings.crops, *states.shape[1:])
                self._kept = np.memmap(self.folder / CROPS_FILE, np.float16, "w+", shape=shape)
            self._kept[places] = states.cpu().numpy()
            self._known.add(places[0])
        return torch.from_numpy(self._kept[number * self.settings.crops + crop].astype(np.float32))


def draw_batch(pairs: Sequence[Pair], step: int, settings: ClipSettings) -> list[tuple[int, str]]:
    """The numbers of a step's pairs, each with one of its texts. An epoch shows as many pictures as there
    are.

    No two pairs of a batch have the same texts, if that is possible: the loss would tell them apart.
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

"""A small CLIP of our own, trained on pictures with texts. Its picture side is a vision tower of open_clip.

The picture side starts from a tower that was trained on ImageNet; the text side starts from random weights.
Both learn to find each other's matching half within a batch, with open_clip's own loss (Radford et al., arXiv
2103.00020).

Shapes: B pairs of a batch, S side of a picture in pixels, C tokens of a text, E width of the embeddings.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save
from torch import Tensor

from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import write_atomically, write_json
from llama_adapter.data.drawings import drawing_captions, is_drawings
from llama_adapter.data.pictures import open_picture
from llama_adapter.data.records import PictureFile, read_records
from llama_adapter.data.sources import EASY_VQA, read_rows
from llama_adapter.data.templates import CAPTION_QUESTIONS
from llama_adapter.vision.tower import prepare_batches

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"


@dataclass(frozen=True)
class Pair:
    """A picture and the texts that describe it. Training chooses one of them at random each time."""

    picture: PictureFile
    texts: tuple[str, ...]


# --- pairs --------------------------------------------------------------------------------------------------


def read_pairs(
    source: str, *, split: str = "train", tell: Callable[[object], None] = lambda summary: None
) -> list[Pair]:
    """The pairs of a source: rows of {"image", "captions"}, easy-vqa, or drawings:N.

    Rows of another split are left out. `tell` gets a summary of what was read.

    Raises UsageError if a row has no captions, or no row is left.
    """
    if source == EASY_VQA:
        return shape_pairs([row for _, row in read_rows(source).rows if row["split"] == split])
    if is_drawings(source):
        return [Pair(picture, captions) for picture, captions in drawing_captions(source, split)]
    texts: dict[PictureFile, list[str]] = {}
    records, summary = read_records(source, split=split)
    tell(summary)
    for record in records:
        if len(record.images) != 1 or record.turns[0].text not in CAPTION_QUESTIONS:
            raise UsageError(f"{source}: row {record.row}: expected 'image' and 'captions'")
        texts.setdefault(record.images[0], []).append(record.turns[-1].text)
    return [Pair(picture, tuple(several)) for picture, several in texts.items()]


def read_names(folder: str | Path) -> list[Pair]:
    """Pictures with one name each, from names.json (file to name) beside images/; one picture for each name.

    Raises UsageError for a file that is missing, damaged or of another form.
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
    """Split off `kept` names for zero-shot scoring, the same ones every time; the rest is to train on."""
    drawn = list(names)
    random.Random(0).shuffle(drawn)
    return drawn[:kept], drawn[kept:]


def shape_pairs(rows: Sequence[dict[str, str]]) -> list[Pair]:
    """Describe easy-VQA's pictures: the answers to its questions "what ..." give the shape and the colour."""
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
    """Load the whole model of an open_clip folder, for scoring. Raises UsageError if it can't be loaded."""
    try:
        clip = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        clip.llama_adapter_config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except Exception as error:  # open_clip and timm raise all kinds of errors for a wrong config
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{folder}: not an open_clip folder: {reason}") from None
    return clip


def build_clip(
    start: Path, *, embed_dim: int = 256, text_width: int = 96, text_layers: int = 3
) -> open_clip.CLIP:
    """A CLIP whose picture side has the weights of the open_clip folder ``start``. The rest is random.

    The text side reads 32 tokens and has attention heads of width 32.
    """
    known = load_clip(start)
    if not hasattr(getattr(known.visual, "trunk", None), "conv_stem"):
        raise UsageError(f"{start}: its picture side is not an EfficientNet of timm, which is needed")
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


# --- scoring ------------------------------------------------------------------------------------------------


@torch.no_grad()
def retrieval(clip: open_clip.CLIP, pairs: Sequence[Pair]) -> dict[str, float]:
    """How often a text's picture is among the first 1, 5, 10, and the reverse: shares from 0 to 1."""
    clip.eval()
    images = encode_images(clip, [pair.picture for pair in pairs])
    owners = torch.tensor([number for number, pair in enumerate(pairs) for _ in pair.texts])
    texts = encode_texts(clip, [text for pair in pairs for text in pair.texts])
    scores = texts @ images.T  # a line for each text, a column for each picture
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
    """How often a picture's own text is the nearest of all pairs' first texts, as a share from 0 to 1."""
    clip.eval()
    images = encode_images(clip, [pair.picture for pair in pairs])
    texts = encode_texts(clip, [pair.texts[0] for pair in pairs])
    return ((images @ texts.T).argmax(1) == torch.arange(len(pairs))).float().mean().item()


def encode_images(clip: open_clip.CLIP, pictures: Sequence[PictureFile]) -> Tensor:
    """The embeddings of N pictures, (N, E), of length 1."""
    device = next(clip.parameters()).device
    preprocess = image_transform_v2(
        PreprocessCfg(**clip.llama_adapter_config["preprocess_cfg"]), is_train=False
    )
    batches = prepare_batches(pictures, lambda picture: preprocess(open_picture(picture)), device)
    encoded = [clip.encode_image(pixels.to(device), normalize=True) for _, pixels in batches]
    return torch.cat(encoded).cpu()


def encode_texts(clip: open_clip.CLIP, texts: Sequence[str]) -> Tensor:
    """The embeddings of N texts, (N, E), of length 1."""
    tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)
    device = next(clip.parameters()).device
    batches = (tokenizer(list(texts[start : start + 64])) for start in range(0, len(texts), 64))
    return torch.cat([clip.encode_text(batch.to(device), normalize=True) for batch in batches]).cpu()

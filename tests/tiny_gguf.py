"""Tiny GGUF files with random blocks of any kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks import llama_cpp
from llama_adapter.quantization.formats import Quantized
from tests.tiny_models import build_tiny_decoder

WIDTH = 256  # the smallest that all kinds have whole blocks of
# The bytes at which a block has its float16 scale and offset, and their ratio for weights of mean zero.
_HALVES: dict[str, tuple[int, tuple[int, float] | None]] = {
    "Q8_0": (0, None),
    "Q4_0": (0, None),
    "Q4_1": (0, (2, -7.5)),
    "Q5_0": (0, None),
    "Q5_1": (0, (2, -15.5)),
    "Q4_K": (0, (2, 7.5)),
    "Q5_K": (0, (2, 15.5)),
    "Q6_K": (208, None),
}


def random_blocks(kind: str, rows: int, columns: int = WIDTH, *, seed: int = 0) -> np.ndarray[Any, Any]:
    """(rows, bytes of a row) uint8, random but for the scales: weights of about 1 / sqrt(K)."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    if kind not in _HALVES:  # nobody computes with them
        return blocks.reshape(rows, -1)
    place, offset = _HALVES[kind]
    spread = draw.uniform(0.5, 1.5, len(blocks))

    def write(scale: float) -> None:
        for at, factor in ((place, 1.0), *([] if offset is None else [offset])):
            halves = (scale * factor * spread).astype(np.float16)
            blocks[:, at : at + 2] = halves[:, None].view(np.uint8)

    write(1e-3)
    values = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    write(1e-3 * columns**-0.5 / float(values.std()))
    return blocks.reshape(rows, -1)


def random_gguf_weight(kind: str, rows: int, columns: int = WIDTH, *, seed: int = 0) -> Quantized:
    """A random matrix in GGUF's blocks."""
    return Quantized(kind, columns, torch.from_numpy(random_blocks(kind, rows, columns, seed=seed)), None)


def build_tiny_gguf(
    path: Path,
    family: str = "llama",
    kinds: Sequence[str] = tuple(_HALVES),
    *,
    left_over: str | None = None,
    **settings: Any,
) -> None:
    """Write a tiny decoder as a GGUF file. Its random matrices have the kinds of blocks in turn.

    Args:
        kinds: the kinds of blocks.
        left_over: one more tensor, which no decoder has, by the name that gguf's table of names has for it.
    """
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "head_dim": WIDTH // 4, "num_hidden_layers": 2}
    decoder = build_tiny_decoder(family, **{**sizes, **settings})
    number = -1

    def encode(_: str, value: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], str | None]:
        nonlocal number
        number += 1
        kind = kinds[number % len(kinds)]
        return (value, None) if kind == "F32" else (random_blocks(kind, *value.shape, seed=number), kind)

    write_gguf(decoder, path, family, encode, left_over=left_over)


def write_gguf(
    decoder: PreTrainedModel,
    path: Path,
    family: str,
    encode: Callable[[str, np.ndarray[Any, Any]], tuple[np.ndarray[Any, Any], str | None]],
    *,
    left_over: str | None = None,
) -> None:
    """Write a decoder as a GGUF file without a tokenizer.

    Args:
        encode: called with each matrix and its name in transformers. It gives what the file has in its place,
            and the kind of its blocks (None: float32).
        left_over: as for `build_tiny_gguf`.
    """
    config: Any = decoder.config

    def tensors() -> Iterator[tuple[str, Any, str | None]]:
        for name, value in decoder.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            array = value.float().numpy()
            yield name, *(encode(name, array) if array.ndim == 2 else (array, None))
        if left_over is not None:
            yield left_over, np.ones(4, np.float32), None

    llama_cpp.write_gguf(config, tensors(), path, family)

"""The formats of quantised weights, and their plain arithmetic.

Each row of a matrix is cut into blocks of 32 columns. Each weight of a block is stored as a small integer,
and stands for

    weight = scale * number + offset

with one float16 scale for each block and, for int4, one float16 offset. Both formats are GGUF's: int8 is its
Q8_0 (without offset, numbers from -127 to 127), int4 its Q4_1 (numbers from 0 to 15).

A decoder in int4 has its embedding and its head in int8: four bits would lose most there.

The matrices of a GGUF file keep the file's own blocks, in which scales, offsets and numbers lie together.
Without the kernels, gguf-py dequantises them.

Shapes: N rows, K columns, C = ceil(K / 32) blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import torch
from torch import Tensor
from torch.nn import functional as F

from llama_adapter.common.errors import UsageError

BLOCK = 32
SLICE = 1 << 22  # weights that are quantised at a time, since each needs several floats meanwhile
INT8, INT4 = "int8", "int4"
FORMATS = (INT8, INT4)  # ours
NF4 = "nf4"  # bitsandbytes'
AUTO, AS_IT_IS = "auto", "none"
CHOICES = (AUTO, AS_IT_IS)  # in place of a format: int8 if it is fast, or the weights as they are
GGUF_KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")  # which kernels.cpp reads
CODES = {name: code for code, name in enumerate((*FORMATS, *GGUF_KINDS), start=1)}  # their numbers there


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix.

    Attributes:
        format: one of `FORMATS` or of `GGUF_KINDS`.
        columns: K.
        numbers: for int8: int8 (N, K). For int4: uint8 (N, 16 C). Each block has 16 bytes. Their low
            nibbles are the numbers of its columns 0 to 15, their high nibbles those of columns 16 to 31. For
            a GGUF kind: uint8 (N, bytes of a row), as in the file.
        scales: float16 (N, C); None for a GGUF kind.
        offsets: float16 (N, C), or None.
    """

    format: str
    columns: int
    numbers: Tensor
    scales: Tensor | None
    offsets: Tensor | None = None


def check_format(name: str) -> str:
    """The name of a format, ours or a library's. Raises UsageError for any other."""
    if name not in (*FORMATS, NF4):
        known = ", ".join((*FORMATS, NF4, *CHOICES))
        raise UsageError(f"quantize: {name!r} is not known; choose one of {known}")
    return name


@torch.no_grad()
def quantize(weight: Tensor, format: str) -> Quantized:
    """Quantise a matrix (N, K). Each number is the nearest one for the scale as it is stored."""
    columns = weight.shape[1]
    parts = [_quantize(part, format) for part in weight.split(max(1, SLICE // columns))]
    numbers = torch.cat([part.numbers for part in parts])
    scales = [part.scales for part in parts if part.scales is not None]
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return Quantized(format, columns, numbers, torch.cat(scales), torch.cat(offsets) if offsets else None)


def _quantize(weight: Tensor, format: str) -> Quantized:
    columns = weight.shape[1]
    blocks = _blocks(weight.float())
    if format == INT8:
        scales = (blocks.abs().amax(-1) / 127).half()
        numbers = _divide(blocks, scales).round().clamp(-127, 127).to(torch.int8)
        return Quantized(format, columns, numbers.flatten(1)[:, :columns].contiguous(), scales)
    assert format == INT4
    numbers, scales, offsets = _quantize_int4(blocks)
    packed = numbers[..., :16] | numbers[..., 16:] << 4
    return Quantized(format, columns, packed.flatten(1), scales, offsets)


def _quantize_int4(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers (N, C, 32), scales and offsets (N, C) with a small squared error.

    At first a block's numbers span its smallest to its largest weight. Then, in turn, scale and offset are
    fitted to the numbers and the numbers are chosen again. Each block keeps its best result.
    """
    offsets = blocks.amin(-1).half()
    scales = ((blocks.amax(-1) - offsets.float()) / 15).half()
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = torch.full(scales.shape, torch.inf)
    for _ in range(4):
        numbers = _divide(blocks - offsets.float()[..., None], scales).round().clamp(0, 15)
        error = (numbers * scales.float()[..., None] + offsets.float()[..., None] - blocks).square().sum(-1)
        better = error < least
        found = numbers.to(torch.uint8), scales, offsets
        if best is None:
            best = found
        else:
            wide = better[..., None]
            best = (
                torch.where(wide, found[0], best[0]),
                torch.where(better, scales, best[1]),
                torch.where(better, offsets, best[2]),
            )
        least = torch.where(better, error, least)
        mean, target = numbers.mean(-1, keepdim=True), blocks.mean(-1, keepdim=True)
        centred = numbers - mean
        fitted = (centred * (blocks - target)).sum(-1) / centred.square().sum(-1).clamp_min(1e-9)
        scales = fitted.half()
        offsets = (target[..., 0] - scales.float() * mean[..., 0]).half()
    assert best is not None
    return best


def dequantize(quantized: Quantized) -> Tensor:
    """The matrix that the numbers stand for, float32 (N, K)."""
    numbers = quantized.numbers
    if quantized.format in GGUF_KINDS:
        kind = gguf.GGMLQuantizationType[quantized.format]
        return torch.from_numpy(gguf.dequantize(numbers.cpu().numpy(), kind)).to(numbers.device)
    assert quantized.scales is not None
    if quantized.format == INT4:
        halves = numbers.unflatten(1, (-1, 16))
        numbers = torch.cat((halves & 15, halves >> 4), dim=-1).flatten(1)
    blocks = _blocks(numbers.float()) * quantized.scales.float()[..., None]
    if quantized.offsets is not None:
        blocks += quantized.offsets.float()[..., None]
    return blocks.flatten(1)[:, : quantized.columns]


def _blocks(matrix: Tensor) -> Tensor:
    """(N, K) -> (N, C, 32). The last block is padded with zeros."""
    return F.pad(matrix, (0, -matrix.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _divide(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks divided by their scales. A block with scale 0 gives zeros."""
    divisor = scales.float()[..., None]
    return torch.where(divisor == 0, 0.0, blocks / divisor)

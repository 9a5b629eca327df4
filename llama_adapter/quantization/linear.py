"""Modules with quantised weights that replace ``nn.Linear`` and ``nn.Embedding``.

Shapes: N outputs, K inputs, T tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from llama_adapter.quantization.formats import (
    CODES,
    FORMATS,
    INT4,
    INT8,
    Quantized,
    dequantize,
    quantize,
)
from llama_adapter.quantization.kernels import Matrix, load_kernels

# Up to this many vectors, the kernel `linear` multiplies each row of the weights by each vector. For more,
# `multiply_many` converts a panel of weights to floats and multiplies it by all vectors.
FEW_VECTORS = 16
# Without `multiply_many`, a slice of the weights is converted to floats at a time, for torch's own product.
SLICE = 1 << 22  # weights


class QuantizedWeight(nn.Module):
    """A quantised matrix, (N, K). Several modules may share it, such as an embedding and a head tied to it.

    Scales and offsets are stored as the bits of their float16, so that ``module.to(dtype)`` does not convert
    them.

    Attributes:
        format: see `formats`.
        shape: (N, K).
    """

    numbers: Tensor
    scale_bits: Tensor | None
    offset_bits: Tensor | None

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        self.format = quantized.format
        self.shape = torch.Size((quantized.numbers.shape[0], quantized.columns))
        self.register_buffer("numbers", quantized.numbers.contiguous())
        for name, halves in (("scale_bits", quantized.scales), ("offset_bits", quantized.offsets)):
            self.register_buffer(name, None if halves is None else halves.contiguous().view(torch.int16))

    def extra_repr(self) -> str:
        return f"{self.format}, {tuple(self.shape)}"

    def rows(self, which: slice | Tensor) -> Quantized:
        """Some rows of the matrix."""
        scales, offsets = (
            None if bits is None else bits[which].view(torch.float16)
            for bits in (self.scale_bits, self.offset_bits)
        )
        return Quantized(self.format, self.shape[1], self.numbers[which], scales, offsets)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights with their scales and offsets."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def matrix(self, bias: Tensor | None = None) -> Matrix:
        """The matrix in the kernels' form. Valid as long as the tensors are not moved."""
        return _matrix(self.rows(slice(None)), bias)

    def dequantize(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rows first to last of the matrix that the numbers stand for: float32 (last - first, K)."""
        return _floats(self.rows(slice(first, last)))

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: (T, N) from (T, K). Has a gradient for ``x`` if it needs one."""
        if torch.is_grad_enabled() and x.requires_grad:
            product: Tensor = _Product.apply(x, self, bias)
            return product
        return self._product(x, bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x.float()
        bias = None if bias is None else bias.float()
        kernels = load_kernels() if x.device.type == "cpu" else None
        if kernels is not None and x.shape[0] <= FEW_VECTORS:
            return self._multiply(kernels.linear, x, self.shape[0], bias)
        if (multiply_many := getattr(kernels, "multiply_many", None)) is not None:
            return self._multiply(multiply_many, x, self.shape[0], bias, True)
        product = x.new_empty(x.shape[0], self.shape[0])
        for first, last, panel in self._panels():
            torch.mm(x, panel.T, out=product[:, first:last])
        return product if bias is None else product.add_(bias)

    def gradient(self, gradient: Tensor) -> Tensor:
        """``gradient @ weight``: (T, K) from (T, N)."""
        gradient = gradient.float()
        kernels = load_kernels() if gradient.device.type == "cpu" else None
        if (multiply_many := getattr(kernels, "multiply_many", None)) is not None:
            return self._multiply(multiply_many, gradient, self.shape[1], None, False)
        found = gradient.new_empty(gradient.shape[0], self.shape[1])
        for first, last, panel in self._panels():
            found.addmm_(gradient[:, first:last], panel, beta=1 if first else 0)
        return found

    def _multiply(self, kernel: Any, x: Tensor, outputs: int, bias: Tensor | None, *options: bool) -> Tensor:
        """What a compiled function makes of the matrix and x: (T, outputs)."""
        x = x.contiguous()
        bias = None if bias is None else bias.contiguous()
        product = torch.empty(x.shape[0], outputs)
        matrix = self.matrix(bias)
        threads = torch.get_num_threads()
        kernel(ctypes.addressof(matrix), x.data_ptr(), len(x), product.data_ptr(), *options, threads)
        return product

    def _panels(self) -> Iterator[tuple[int, int, Tensor]]:
        """Slices in float32, one after the other in the same memory: first row, last row, the slice."""
        rows, columns = self.shape
        slices = -(-rows * columns // SLICE)
        step = -(-rows // slices)
        panel = torch.empty(step, columns, device=self.numbers.device)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            yield first, last, _floats(self.rows(slice(first, last)), panel[: last - first])


def _matrix(quantized: Quantized, bias: Tensor | None = None) -> Matrix:
    scales, offsets = (
        None if halves is None else halves.data_ptr() for halves in (quantized.scales, quantized.offsets)
    )
    return Matrix(
        format=CODES[quantized.format],
        rows=quantized.numbers.shape[0],
        columns=quantized.columns,
        numbers=quantized.numbers.data_ptr(),
        scales=scales,
        offsets=offsets,
        bias=None if bias is None else bias.data_ptr(),
    )


def _floats(quantized: Quantized, out: Tensor | None = None) -> Tensor:
    """The matrix as float32 (N, K), in `out` if given. Uses the kernels if they are available."""
    kernels = load_kernels() if quantized.numbers.device.type == "cpu" else None
    if kernels is None:
        floats = dequantize(quantized)
        return floats if out is None else out.copy_(floats)
    rows = quantized.numbers.shape[0]
    floats = torch.empty(rows, quantized.columns) if out is None else out
    matrix = _matrix(quantized)
    kernels.dequantize(ctypes.addressof(matrix), 0, rows, floats.data_ptr(), torch.get_num_threads())
    return floats


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # as stored: the backward pass converts it to floats again
        ctx.dtype = x.dtype
        return weight._product(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.weight.gradient(gradient).to(ctx.dtype), None, None


class _Quantized(nn.Module):
    """A module with a frozen quantised weight.

    Attributes:
        quantized: the weight as it is stored.
    """

    _like: Tensor

    def __init__(self, quantized: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantized = quantized
        # Empty; module.to(dtype) changes its dtype.
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which the decoder around it computes."""
        return self._like.dtype

    @property
    def weight(self) -> Tensor:
        """(N, K), float32, computed at each call: for inspection only."""
        return self.quantized.dequantize()


class QuantizedLinear(_Quantized):
    """``nn.Linear`` with a quantised weight. It computes in float32 and returns the dtype of its input.

    Attributes:
        bias: (N,) or None.
    """

    def __init__(self, quantized: QuantizedWeight, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        super().__init__(quantized, dtype)
        self.out_features, self.in_features = quantized.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        product = self.quantized.multiply(x.reshape(-1, self.in_features), self.bias)
        return product.view(*x.shape[:-1], self.out_features).to(x.dtype)


class QuantizedEmbedding(_Quantized):
    """``nn.Embedding`` with a quantised weight."""

    def __init__(
        self, quantized: QuantizedWeight, dtype: torch.dtype, padding_idx: int | None = None
    ) -> None:
        super().__init__(quantized, dtype)
        self.padding_idx = padding_idx
        self.num_embeddings, self.embedding_dim = quantized.shape

    def forward(self, ids: Tensor) -> Tensor:
        rows = _floats(self.quantized.rows(ids.reshape(-1)))
        return rows.view(*ids.shape, self.embedding_dim).to(self.compute_dtype)


def read_bytes(decoder: nn.Module) -> int:
    """Bytes of the quantised weights that a token reads: all but the embedding, of which it reads one row."""
    modules = [module for module in decoder.modules() if isinstance(module, QuantizedLinear)]
    return sum({id(module.quantized): module.quantized.nbytes for module in modules}.values())


def count_weights(decoder: PreTrainedModel) -> int:
    """The parameters of a decoder, quantised weights among them. Shared ones count once."""
    quantized = [module for module in decoder.modules() if isinstance(module, QuantizedWeight)]
    return int(decoder.num_parameters()) + sum(module.shape.numel() for module in quantized)


def kept_bytes(decoder: nn.Module) -> int:
    """Bytes of all weights and buffers of a decoder. Shared ones count once."""
    tensors = [*decoder.parameters(), *decoder.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def format_of(decoder: nn.Module) -> str | None:
    """The format of a decoder's layers, "gguf" for a GGUF file's; None if we did not quantise them."""
    formats = {module.quantized.format for module in decoder.modules() if isinstance(module, QuantizedLinear)}
    if formats - {*FORMATS}:
        return "gguf"
    return INT4 if INT4 in formats else next(iter(formats), None)


def quantize_decoder(decoder: PreTrainedModel, format: str) -> None:
    """Replace every ``nn.Linear`` and the token embedding of a decoder by modules with quantised weights.

    They are replaced one after the other, so that each float weight is freed before the next is quantised. A
    head that is tied to the embedding stays tied. Norms, biases and other modules (a mixture's experts) are
    not changed. In int4 the embedding and the head are int8.
    """
    embedding, head = decoder.get_input_embeddings(), decoder.get_output_embeddings()
    outer = INT8 if format == INT4 else format
    tied: tuple[Tensor, QuantizedWeight] | None = None
    for name in [name for name, _ in decoder.named_modules()]:
        module = decoder.get_submodule(name)
        if module is embedding and type(module) is nn.Embedding:
            stored = QuantizedWeight(quantize(module.weight, outer))
            tied = module.weight, stored
            replacement: nn.Module = QuantizedEmbedding(stored, module.weight.dtype, module.padding_idx)
        elif type(module) is nn.Linear:
            if tied is not None and module.weight is tied[0]:
                stored = tied[1]
            else:
                stored = QuantizedWeight(quantize(module.weight, outer if module is head else format))
            replacement = QuantizedLinear(stored, module.weight.dtype, module.bias)
        else:
            continue
        decoder.set_submodule(name, replacement)

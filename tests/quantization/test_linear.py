"""Modules with quantised weights, compared with torch's own on the weights that the numbers stand for."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import gguf
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llama_adapter.quantization import linear
from llama_adapter.quantization.formats import FORMATS, GGUF_KINDS, dequantize, quantize
from llama_adapter.quantization.kernels import load_kernels
from llama_adapter.quantization.linear import (
    FEW_VECTORS,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    quantize_decoder,
)
from tests.tiny_gguf import random_gguf_weight
from tests.tiny_models import build_tiny_decoder

COMPILED = pytest.mark.skipif(load_kernels() is None, reason="there is no C++ compiler")


@pytest.fixture(params=[*(pytest.param(way, marks=COMPILED) for way in ("compiled", "not AVX2")), "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernels, as on a processor without AVX2, and as on a machine without a compiler."""
    kernels = load_kernels()
    if request.param == "not AVX2":
        assert kernels is not None
        fewer = SimpleNamespace(linear=kernels.linear, dequantize=kernels.dequantize)
        monkeypatch.setattr(linear, "load_kernels", lambda: fewer)
    elif request.param == "torch":
        monkeypatch.setattr(linear, "load_kernels", lambda: None)
    return str(request.param)


def random_weight(name: str, outputs: int = 40, inputs: int = 72, *, seed: int = 0) -> QuantizedWeight:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return QuantizedWeight(quantize(weight, name))


def random_input(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, FEW_VECTORS, FEW_VECTORS + 1, 50])
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 72), (3, 32), (70, 20), (45, 404)])
def test_the_product_is_that_of_the_dequantised_weight(
    way: str, name: str, tokens: int, outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "SLICE", 500)  # so that a large product needs several slices
    weight = random_weight(name, outputs, inputs)
    plain = dequantize(weight.rows(slice(None)))
    torch.testing.assert_close(weight.dequantize(), plain, rtol=0, atol=1e-6)
    bias, x = random_input(outputs), random_input(tokens, inputs)
    module = QuantizedLinear(weight, torch.float32, bias)
    torch.testing.assert_close(module(x[None]), F.linear(x, plain, bias)[None], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", GGUF_KINDS)
@pytest.mark.parametrize("columns", [256, 768])
def test_blocks_of_gguf_stand_for_exactly_what_gguf_py_says(way: str, kind: str, columns: int) -> None:
    stored = random_gguf_weight(kind, 9, columns)
    weight = QuantizedWeight(stored)
    expected = torch.from_numpy(gguf.dequantize(stored.numbers.numpy(), gguf.GGMLQuantizationType[kind]))
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(weight.dequantize(3, 7), expected[3:7])
    ids = torch.tensor([[8, 0], [3, 8]])
    assert torch.equal(QuantizedEmbedding(weight, torch.float32)(ids), F.embedding(ids, expected))


@pytest.mark.parametrize("kind", GGUF_KINDS)
@pytest.mark.parametrize("tokens", [1, 7, 50])
def test_products_with_blocks_of_gguf(way: str, kind: str, tokens: int) -> None:
    weight = QuantizedWeight(random_gguf_weight(kind, 40))
    plain = dequantize(weight.rows(slice(None)))
    x, gradient = random_input(tokens, 256), random_input(tokens, 40)
    torch.testing.assert_close(weight.multiply(x, None), F.linear(x, plain), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.gradient(gradient), gradient @ plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [3, 50])
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 72), (404, 45)])
def test_gradients_are_those_of_the_dequantised_weight(
    way: str, name: str, tokens: int, outputs: int, inputs: int
) -> None:
    weight = random_weight(name, outputs, inputs)
    x = random_input(tokens, inputs).requires_grad_()
    y = x.detach().clone().requires_grad_()
    QuantizedLinear(weight, torch.float32)(x).square().sum().backward()
    F.linear(y, weight.dequantize()).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-3)


def test_another_dtype_comes_back_as_it_came() -> None:
    module = QuantizedLinear(random_weight("int8"), torch.float32).to(torch.bfloat16)
    x = random_input(2, 72).bfloat16()
    product = module(x)
    assert module.compute_dtype == product.dtype == torch.bfloat16
    assert module.quantized.scale_bits.dtype == torch.int16  # not a float, so it is not converted
    torch.testing.assert_close(product.float(), F.linear(x.float(), module.weight), rtol=1e-2, atol=1e-1)


def test_an_embedding_gives_the_dequantised_rows() -> None:
    weight = random_weight("int8")
    ids = torch.tensor([[3, 0], [39, 3]])
    given = QuantizedEmbedding(weight, torch.float32)(ids)
    torch.testing.assert_close(given, F.embedding(ids, weight.dequantize()), rtol=0, atol=0)


@COMPILED
@pytest.mark.parametrize("tokens", [2, 50])
def test_two_threads_of_torch_give_the_same(tokens: int) -> None:
    weight, x = random_weight("int8", 500, 404), random_input(tokens, 404)
    before = torch.get_num_threads()
    products = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            products.append(weight.multiply(x, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*products)


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_computes_as_with_dequantised_weights(tied: bool) -> None:
    decoder = build_tiny_decoder("qwen2", tie_word_embeddings=tied)
    plain = copy.deepcopy(decoder)
    quantize_decoder(decoder, "int8")
    with torch.no_grad():  # tied weights are a single parameter
        for weight in {
            module.weight for module in plain.modules() if isinstance(module, (nn.Linear, nn.Embedding))
        }:
            weight.copy_(dequantize(quantize(weight, "int8")))
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decoder(ids).logits, plain(ids).logits, rtol=2e-3, atol=2e-3)
    assert (decoder.lm_head.quantized is decoder.get_input_embeddings().quantized) == tied
    assert not any(type(module) is nn.Linear for module in decoder.modules())

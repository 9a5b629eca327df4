"""The GGUF file that llama.cpp gets: exactly the numbers and scales of our quantised decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from benchmarks.llama_cpp import FAMILIES, llama_cpp, quantized_tensors, write_gguf
from llama_adapter.model import LlamaAdapter
from llama_adapter.quantization.formats import FORMATS
from llama_adapter.quantization.gguf_files import load_gguf
from llama_adapter.quantization.linear import QuantizedEmbedding, QuantizedLinear, quantize_decoder
from tests.tiny_models import build_tiny_decoder, random_rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_file_is_the_same_decoder(tmp_path: Path, family: str, format: str, tied: bool) -> None:
    decoder = build_tiny_decoder(family, intermediate_size=64, tie_word_embeddings=tied)
    quantize_decoder(decoder, format)
    file = tmp_path / "tiny.gguf"
    write_gguf(decoder.config, quantized_tensors(decoder), file, family)
    config = AutoConfig.from_pretrained(tmp_path, gguf_file=file.name)
    read = load_gguf(file, config, torch.float32)
    for name, module in decoder.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            assert torch.equal(read.get_submodule(name).weight, module.weight), name
    ids = random_rows(9)[0][None]
    torch.testing.assert_close(read(ids).logits, decoder(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_llama_cpp_decodes_it(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = build_tiny_decoder(family, hidden_size=64, head_dim=16, intermediate_size=64)
    quantize_decoder(decoder, "int8")
    with llama_cpp(LlamaAdapter(decoder, base="tiny"), None, [5, 7, 9], 4) as answer:
        if answer is None:
            assert "llama.cpp left out: " in capsys.readouterr().out
        else:
            assert family in FAMILIES and answer(0) > 0

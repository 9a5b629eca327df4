"""Every way to quantise, on the fetched base: what it loses, and that it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from llama_adapter.data.examples import Example, encode_records
from llama_adapter.data.records import read_records
from llama_adapter.methods.decoder import load_decoder, load_tokenizer
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.packing.losses import accumulate_gradient, mean_answer_loss
from llama_adapter.quantization import stored
from llama_adapter.quantization.formats import FORMATS
from llama_adapter.quantization.linear import format_of, kept_bytes
from tests.conftest import CHECKOUT
from tests.tiny_gguf import write_gguf

CPU = torch.device("cpu")
# Nats a token, on few tokens: `eval.alpaca --quantize` measures many. The GGUF file has blocks of Q8_0.
MOST = {"int8": 0.02, "int4": 0.05, "gguf": 0.02}


@pytest.fixture(scope="module")
def plain(base_folder: Path) -> LlamaAdapter:
    """The base in float32, with an adapter that is far from doing nothing."""
    model = LlamaAdapter.from_base(str(base_folder), device="cpu", dtype="float32")
    add_adapter(model)
    return model


@pytest.fixture(scope="module")
def examples(plain: LlamaAdapter) -> list[Example]:
    """Some rows to learn from."""
    records, _ = read_records(str(CHECKOUT / "examples" / "instructions.jsonl"))
    assert plain.tokenizer is not None
    return encode_records(records, template="alpaca", tokenizer=plain.tokenizer, max_length=128)[:8]


def add_adapter(model: LlamaAdapter) -> None:
    adapter: Any = model.new_adapter("trained", method="prompts+lora", adapted_layers=4, seed=0)
    torch.nn.init.constant_(adapter.prompts.gates, 0.1)


def write_as_gguf(model: LlamaAdapter, path: Path) -> None:
    """The base as llama.cpp has it: Q8_0, queries and keys with each head's two halves interleaved."""
    heads = {"q_proj": model.shape.num_heads, "k_proj": model.shape.num_key_value_heads}

    def encode(name: str, value: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], str]:
        if (count := heads.get(name.split(".")[-2])) is not None:
            halves = value.reshape(count, 2, -1, value.shape[1])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        return gguf.quantize(np.ascontiguousarray(value), gguf.GGMLQuantizationType.Q8_0), "Q8_0"

    write_gguf(model.decoder, path, "llama", encode)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [*FORMATS, "gguf"])
def test_the_fetched_base(
    kept: str,
    base_folder: Path,
    plain: LlamaAdapter,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored, "cache_folder", lambda: tmp_path / "cache")
    if kept == "gguf":
        write_as_gguf(plain, tmp_path / "base.gguf")
        decoder = load_decoder(str(tmp_path / "base.gguf"), device=CPU, dtype=torch.float32)
    else:
        decoder = load_decoder(str(base_folder), device=CPU, dtype=torch.float32, quantize=kept)
    model = LlamaAdapter(decoder, load_tokenizer(str(base_folder)), base="quantised")
    assert format_of(decoder) == kept
    assert kept_bytes(decoder) < 0.33 * kept_bytes(plain.decoder)
    options: dict[str, Any] = {"device": CPU, "max_tokens": 2048}
    losses = [mean_answer_loss(each, examples, **options, adapter=NO_ADAPTER)[0] for each in (model, plain)]
    assert abs(losses[0] - losses[1]) < MOST[kept]
    add_adapter(model)
    gradients = []
    for each in (model, plain):
        each.zero_grad()
        accumulate_gradient(each, examples, **options, adapter="trained")
        parameters = each.adapters["trained"].parameters()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99

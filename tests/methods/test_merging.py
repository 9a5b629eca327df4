"""Adapters folded into a decoder's weights: a plain decoder with the same logits, or a refusal by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.merging import merge_adapter
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.quantization.linear import quantize_decoder
from tests.tiny_models import VISION, build_tiny_decoder

TOKENS = torch.tensor([[5, 9, 33, 7, 21, 2], [3, 44, 12, 60, 8, 2]])


def stirred(family: str, method: str, **settings: Any) -> tuple[LlamaAdapter, Adapter]:
    """A tiny model with an adapter that has random values."""
    model = LlamaAdapter(build_tiny_decoder(family, torch.float64, **settings), base="tiny")
    adapter = model.new_adapter("own", method=method, adapted_layers=2, seed=0)
    generator = torch.Generator().manual_seed(4)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model, adapter


@torch.no_grad()
def logits_of(model: Any, **options: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS, **options).logits
    return found


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(
            ("llama", method)
            for method in ("lora", "ia3", "scales", "bitfit", "scales+ia3+bitfit+lora+adalora")
        ),
        *(("qwen2", method) for method in ("lora", "ia3")),  # has biases at three projections
        *(("starcoder2", method) for method in ("scales+lora", "bitfit")),  # has biases at all projections
        *(("gpt2", method) for method in ("lora", "scales")),  # has transposed weights
        ("qwen3", "lora"),
    ],
)
def test_a_merged_decoder_is_plain_and_has_the_same_logits(family: str, method: str, tmp_path: Path) -> None:
    model, adapter = stirred(family, method)
    expected, bare = logits_of(model), logits_of(model, adapter=NO_ADAPTER)
    assert not torch.allclose(expected, bare, atol=1e-2)
    merged = merge_adapter(model.decoder, adapter)
    assert torch.allclose(logits_of(merged), expected, atol=1e-5)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(logits_of(loaded), expected, atol=1e-5)
    # The original is unchanged, and shares the weights that do not change.
    assert torch.equal(logits_of(model, adapter=NO_ADAPTER), bare)
    assert torch.equal(logits_of(model), expected)
    assert merged.get_input_embeddings().weight is model.decoder.get_input_embeddings().weight


def test_a_merged_decoder_can_be_adapted_again() -> None:
    model, adapter = stirred("llama", "lora")
    expected = logits_of(model)
    again = LlamaAdapter(merge_adapter(model.decoder, adapter), base="merged")
    again.new_adapter("more", seed=0)
    assert torch.allclose(logits_of(again), expected, atol=1e-5)


def test_biases_are_added_only_where_they_are_needed() -> None:
    model, adapter = stirred("llama", "bitfit")
    merged = merge_adapter(model.decoder, adapter)
    assert merged.config.attention_bias
    assert merged.config.mlp_bias
    assert not model.decoder.config.attention_bias
    model, adapter = stirred("llama", "lora")
    assert not merge_adapter(model.decoder, adapter).config.attention_bias


@pytest.mark.parametrize(
    ("family", "method", "said"),
    [
        (
            "llama",
            "prompts",
            "prompts cannot be merged into weights, only scales, ia3, bitfit, lora",
        ),
        ("llama", "prompts+lora", "prompts cannot be merged"),
        ("llama", "bottleneck", "bottleneck cannot be merged"),
        ("llama", "prefix", "prefix cannot be merged"),
        ("mistral", "bitfit", "family 'mistral' have no bias at model.layers.1.mlp.down_proj"),
        ("qwen3", "bitfit", "family 'qwen3' have no bias at model.layers.1.mlp.down_proj"),
        ("qwen2", "scales", "family 'qwen2' have no bias at"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(family: str, method: str, said: str) -> None:
    model, adapter = stirred(family, method)
    before = copy.deepcopy(model.decoder.config.to_dict())
    with pytest.raises(UsageError, match=said):
        merge_adapter(model.decoder, adapter)
    assert model.decoder.config.to_dict() == before


def test_pictures_and_quantised_weights_are_refused() -> None:
    model = LlamaAdapter(build_tiny_decoder(), base="tiny")
    adapter = model.new_adapter("sees", adapted_layers=2, vision=VISION)
    with pytest.raises(UsageError, match="prompts and projection cannot be merged"):
        merge_adapter(model.decoder, adapter)
    decoder = build_tiny_decoder()
    quantize_decoder(decoder, "int8")
    model = LlamaAdapter(decoder, base="tiny")
    adapter = model.new_adapter("own", method="lora", adapted_layers=2)
    with pytest.raises(UsageError, match="is quantised; load the base without quantisation"):
        merge_adapter(model.decoder, adapter)

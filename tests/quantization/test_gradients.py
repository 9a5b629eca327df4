"""Training through quantised weights: the gradients of the same decoder in float32, with every method."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llama_adapter.methods.decoder import checkpoint_activations
from llama_adapter.methods.table import METHODS, PARTS
from llama_adapter.model import LlamaAdapter
from llama_adapter.packing.losses import answer_loss
from llama_adapter.packing.pack import pack
from llama_adapter.quantization.formats import FORMATS
from llama_adapter.quantization.gguf_files import load_gguf
from llama_adapter.quantization.linear import QuantizedEmbedding, QuantizedLinear, quantize_decoder
from tests.tiny_gguf import build_tiny_gguf
from tests.tiny_models import VISION, build_tiny_decoder
from tests.train_tiny import rows

EXAMPLES, FEATURES = rows(8)
KEPT = (*FORMATS, "gguf")
ADDED = [name for name in METHODS if not PARTS[name].alone]  # the others train the base's own weights


def build(kept: str, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A quantised decoder, and the float32 one that its numbers stand for."""
    if kept == "gguf":
        file = folder / "tiny.gguf"
        build_tiny_gguf(file, "qwen2")
        config = AutoConfig.from_pretrained(folder, gguf_file=file.name)
        quantised = load_gguf(file, config, torch.float32)
    else:
        quantised = build_tiny_decoder("qwen2")
        quantize_decoder(quantised, kept)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(quantised.config), dtype=torch.float32).eval()
    plain.load_state_dict(quantised.state_dict(), strict=False)  # norms and biases
    with torch.no_grad():
        for name, module in quantised.named_modules():
            if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
                plain.get_submodule(name).weight.copy_(module.weight)
    return quantised, plain


@pytest.fixture(scope="module", params=KEPT)
def decoders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Of each way to keep weights, for all tests."""
    return build(request.param, tmp_path_factory.mktemp("gguf"))


def gradients(
    decoder: PreTrainedModel, method: str, *, seeing: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of packed rows with an adapter whose parameters are all random, and its gradient."""
    model = LlamaAdapter(decoder, base="tiny")
    vision = VISION if seeing else None
    adapter: Any = model.new_adapter("trained", method=method, adapted_layers=2, seed=3, vision=vision)
    generator = torch.Generator().manual_seed(4)
    for parameter in adapter.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3, generator=generator)
    examples = EXAMPLES if seeing else [replace(example, images=()) for example in EXAMPLES]
    loss = answer_loss(model, pack(examples), adapter="trained", features=FEATURES).sum()
    loss.backward()
    return loss.detach(), {name: value.grad for name, value in adapter.named_parameters()}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each parameter's gradient to 1e-3 of its largest."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        off = float((found[name] - gradient).abs().max() / gradient.abs().max())
        assert off <= 1e-3, (name, off)


@pytest.mark.parametrize("method", [*ADDED, "prompts+lora"])
def test_they_are_those_of_the_base_in_float32(
    decoders: tuple[PreTrainedModel, PreTrainedModel], method: str
) -> None:
    (loss, found), (expected_loss, expected) = (gradients(decoder, method) for decoder in decoders)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-4)
    compare(found, expected)


def test_they_are_with_pictures(decoders: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    (_, found), (_, expected) = (gradients(decoder, "prompts", seeing=True) for decoder in decoders)
    assert any("projection" in name for name in found)
    compare(found, expected)


@pytest.mark.parametrize("kept", KEPT)
def test_they_are_with_checkpointed_activations(kept: str, tmp_path: Path) -> None:
    quantised, plain = build(kept, tmp_path)
    checkpoint_activations(quantised)
    compare(gradients(quantised, "prompts+lora")[1], gradients(plain, "prompts+lora")[1])


def test_the_backward_pass_keeps_no_weight_in_floats() -> None:
    """Whatever autograd saves is smaller than a matrix in float32 would be."""
    decoder = build_tiny_decoder(intermediate_size=512)
    quantize_decoder(decoder, "int8")
    model = LlamaAdapter(decoder, base="tiny")
    model.new_adapter("trained", method="lora", adapted_layers=2, seed=3)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() if tensor.shape[-2:] in matrices else 0)
        return tensor

    matrices = {m.quantized.shape for m in decoder.modules() if isinstance(m, QuantizedLinear)}
    matrices |= {torch.Size(shape[::-1]) for shape in matrices}
    examples = [replace(example, images=()) for example in EXAMPLES]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = answer_loss(model, pack(examples), adapter="trained").sum()
    assert saved and not any(saved)
    loss.backward()

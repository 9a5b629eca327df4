"""benchmarks.scaling's formulas against what small decoders really hold, save and compute."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scaling
from benchmarks.scaling import SHAPES, Plan, Shape
from llama_adapter.common.errors import UsageError
from llama_adapter.data.examples import Example
from llama_adapter.model import LlamaAdapter
from llama_adapter.packing.losses import accumulate_gradient, answer_loss
from llama_adapter.packing.pack import pack
from tests.conftest import CHECKOUT
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import build_tiny_decoder

SMALL = Shape(4, 64, 96, 8, 2, 16, 200)
WIDE = Shape(5, 128, 320, 4, 4, 32, 200)
TOKENS = 256


def build(shape: Shape, dtype: torch.dtype = torch.float32) -> LlamaAdapter:
    decoder = build_tiny_decoder(
        dtype=dtype,
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    return LlamaAdapter(decoder, base="random")


def row(labelled: int) -> Example:
    ids = [5 + place % 90 for place in range(TOKENS)]
    return Example(ids, [-100] * (TOKENS - labelled) + ids[-labelled:], (), 1)


def saved_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """What a forward pass keeps for the backward one, the weights left out."""
    model = build(shape, dtype)
    model.new_adapter("new", prompt_length=10, adapted_layers=shape.layers, seed=0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.decoder.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _loss = answer_loss(model, pack([row(1)])).sum()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("shape", [SMALL, WIDE])
def test_parameters_are_those_of_the_decoder(shape: Shape) -> None:
    assert shape.parameters == sum(parameter.numel() for parameter in build(shape).decoder.parameters())


def test_a_tied_head_counts_once_as_in_the_base_that_is_here() -> None:
    assert SHAPES["smollm2-135m"].parameters == 134_515_008


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [SMALL, WIDE])
def test_a_layer_keeps_what_the_formula_says(shape: Shape, dtype: torch.dtype) -> None:
    more = dataclasses.replace(shape, layers=shape.layers + 1)
    kept = (saved_bytes(more, dtype) - saved_bytes(shape, dtype)) / TOKENS
    assert shape.saved_by_a_layer(width=dtype.itemsize, attention_width=4) == pytest.approx(kept, rel=0.1)


def test_a_step_computes_what_the_formula_says() -> None:
    shape = dataclasses.replace(WIDE, layers=16)
    model = build(shape)
    model.new_adapter("new", prompt_length=1, adapted_layers=15, seed=0)
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counted:
        accumulate_gradient(model, [row(100)], device=torch.device("cpu"), max_tokens=999)
    measured = counted.get_flop_counts()["Global"][torch.ops.aten.mm]
    plan = Plan(shape, 1, 64)
    scale = TOKENS / plan.tokens
    layers = plan.flop - 4 * plan.labelled * shape.head_parameters
    expected = layers * scale + 4 * 100 * shape.head_parameters
    assert expected == pytest.approx(measured, rel=0.05)


def test_an_adapter_is_as_large_as_planned() -> None:
    model = build(SMALL)
    adapter = model.new_adapter("new")
    assert Plan(SMALL, 1, 64).trained == sum(parameter.numel() for parameter in adapter.parameters())


def test_a_plan_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling", "--gpus", "64", "--gradient-checkpointing", "--json", "-"])
    scaling.main()
    printed = capsys.readouterr().out
    assert "68.98e9 parameters, sharded over all of 64 GPUs" in printed
    assert "gathered layers" in printed and '"hours_least"' in printed


def test_more_gpus_hold_less_and_a_whole_base_moves_no_weights() -> None:
    shape = SHAPES["llama-70b"]
    few, many = (Plan(shape, gpus, 64).memory()["base"] for gpus in (8, 64))
    assert few == 8 * many
    assert set(Plan(SHAPES["llama-7b"], 8, 64, sharded=False).traffic()) == {"gradient of the adapter"}


def test_batches_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny_tokenizer().save_pretrained(tmp_path)
    figures = tmp_path / "figures.json"
    data = CHECKOUT / "examples" / "instructions.jsonl"
    asked = ["--data", str(data), "--base", str(tmp_path), "--batch-size", "4", "--shape", "smollm2-135m"]
    monkeypatch.setattr(sys, "argv", ["scaling", *asked, "--json", str(figures)])
    scaling.main()
    counts = json.loads(figures.read_text())
    assert counts["labelled"] < counts["packed"] < counts["padded"] < 4 * 512
    assert 1 < counts["products_vs_peft_lora"] < counts["products_vs_peft"] < counts["products_vs_pad512"]
    # LoRA reads each token with all matrices once: only tokens and logits are saved.
    shape = SHAPES["smollm2-135m"]
    layers, head = shape.layers * shape.layer_parameters, shape.head_parameters
    saved = counts["padded"] * (layers + head) / (counts["packed"] * layers + counts["labelled"] * head)
    assert counts["products_vs_peft_lora"] == pytest.approx(saved)
    monkeypatch.setattr(sys, "argv", ["scaling", *asked[:-4], "--batch-size", "99"])
    with pytest.raises(UsageError, match="24 rows are fewer than a batch of 99"):
        scaling.main()

"""Compiled decoding steps, compared with the decoder's own modules."""

from __future__ import annotations

import copy
import json
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from llama_adapter.decoding.batch import Batch
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.methods.decoder import prepare_decoder
from llama_adapter.methods.decoding_step import DecodingStep
from llama_adapter.methods.lora import Lora
from llama_adapter.methods.sites import SitePart
from llama_adapter.methods.state import merge_states
from llama_adapter.model import LlamaAdapter
from llama_adapter.quantization.formats import FORMATS
from llama_adapter.quantization.kernels import load_kernels
from llama_adapter.quantization.linear import quantize_decoder
from tests.tiny_models import build_tiny_decoder, padded, random_rows

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="there is no C++ compiler")

# Families with LLaMA's layers. Others have different norms, scales or windows.
KNOWN = {"llama", "qwen2", "qwen3"}


def build_quantized_model(family: str = "llama", format: str = "int8", **settings: Any) -> LlamaAdapter:
    decoder = build_tiny_decoder(family, **settings)
    quantize_decoder(decoder, format)
    model = LlamaAdapter(decoder, base="tiny-base")
    for seed, name in enumerate(("plain", "tuned"), start=1):
        generator = torch.Generator().manual_seed(seed)
        method = "prompts+scales" if name == "tuned" else "prompts"
        adapter = model.new_adapter(
            name, method=method, prompt_length=2 + seed, adapted_layers=seed, seed=seed
        )
        zero = [parameter for parameter in adapter.parameters() if not parameter.any()]
        for parameter in zero:
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


# Each method, and compositions.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3},
    "adalora": {"init_rank": 4, "target_rank": 2, "targets": ("v_proj", "mlp.up_proj")},
    "ia3": {},
    "bitfit": {},
    "bottleneck": {"bottleneck_width": 5},
    "prefix": {"prefix_length": 3},
    "prompts+lora": {"rank": 2, "targets": ("q_proj", "down_proj")},
    "scales+ia3+bitfit+lora+bottleneck": {"placement": "parallel", "bottleneck_width": 4},
    "prompts+prefix+scales": {"prompt_length": 2, "prefix_length": 4},
}


def add_adapters(model: LlamaAdapter) -> None:
    """An adapter of each of `METHODS`, named after its method, with different numbers of layers."""
    for seed, (method, options) in enumerate(METHODS.items(), start=1):
        adapter = model.new_adapter(
            method, method=method, adapted_layers=1 + seed % model.shape.num_layers, seed=seed, **options
        )
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)


def step_of(model: LlamaAdapter) -> DecodingStep:
    step = model.decoder.base_model.forward.__self__
    assert isinstance(step, DecodingStep)
    return step


@torch.no_grad()
def decode(model: LlamaAdapter, ids: Tensor, mask: Tensor | None, adapter: str, steps: int) -> Tensor:
    """The logits of the last ``steps`` tokens, which are read one by one."""
    cache = DynamicCache()
    projected = {"adapter": model.project(adapter)}
    first = ids.shape[1] - steps
    logits = []
    for start, stop in [(0, first), *((n, n + 1) for n in range(first, ids.shape[1]))]:
        seen = None if mask is None else mask[:, :stop]
        output = model(ids[:, start:stop], seen, past_key_values=cache, use_cache=True, **projected)
        logits.append(output.logits[:, -1])
    return torch.stack(logits[1:], dim=1)


@pytest.mark.parametrize("adapter", ["none", "plain", "tuned"])
@pytest.mark.parametrize("family", sorted(KNOWN))
@pytest.mark.parametrize("format", FORMATS)
def test_steps_give_the_whole_passs_logits(family: str, format: str, adapter: str) -> None:
    model = build_quantized_model(family, format)
    ids, mask = padded(random_rows(12, 9, 7), "left")
    before = step_of(model).calls
    ours = decode(model, ids, mask, adapter, steps=4)
    assert step_of(model).calls == before + 4
    with torch.no_grad():
        whole = model(ids, mask, adapter=adapter, use_cache=False).logits[:, -4:]
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3_text", "granite", "mistral", "olmo2", "smollm3", "starcoder2"])
def test_a_decoder_that_is_built_otherwise_keeps_its_own_steps(family: str) -> None:
    model = build_quantized_model(family)
    assert not hasattr(model.decoder.base_model.forward, "__self__") or not isinstance(
        model.decoder.base_model.forward.__self__, DecodingStep
    )
    ids = random_rows(9)[0][None]
    with torch.no_grad():
        whole = model(ids, adapter="plain", use_cache=False).logits[:, -3:]
    torch.testing.assert_close(decode(model, ids, None, "plain", 3), whole, rtol=1e-4, atol=1e-4)


def test_a_decoder_that_is_not_quantised_is_left_alone() -> None:
    inner = prepare_decoder(build_tiny_decoder()).base_model
    assert "forward" not in vars(inner)


def test_a_cache_outgrows_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_adapter.methods.decoding_step.MORE_PLACES", 2)
    model = build_quantized_model()
    ids = random_rows(30)[0][None]
    with torch.no_grad():
        whole = model(ids, adapter="plain", use_cache=False).logits[:, -20:]
    torch.testing.assert_close(decode(model, ids, None, "plain", 20), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_that_was_cut_goes_on_from_there() -> None:
    model = build_quantized_model()
    ids = random_rows(8)[0][None]
    cache = DynamicCache()
    model(ids[:, :5], past_key_values=cache, use_cache=True)
    kept = [layer.keys.clone() for layer in cache.layers]
    for token in (5, 6):
        model(ids[:, token : token + 1], past_key_values=cache, use_cache=True)
    cache.crop(-2)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, kept, strict=True))
    again = copy.deepcopy(cache)
    ours, theirs = (
        model(ids[:, 7:8], past_key_values=own, use_cache=True).logits[:, -1] for own in (cache, again)
    )
    whole = model(torch.cat((ids[:, :5], ids[:, 7:8]), 1), use_cache=False).logits[:, -1]
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs, whole, rtol=1e-4, atol=1e-4)


def test_a_mixed_batch_is_answered_as_each_alone() -> None:
    model = build_quantized_model()
    sampling = Sampling(max_new_tokens=6, temperature=0)
    asked = [
        (row[None], model.project(name), sampling)
        for row, name in zip(random_rows(5, 9, 3), ("none", "plain", "tuned"), strict=True)
    ]

    alone = []
    for question in asked:
        batch = Batch(model)
        row = batch.join(*question)
        tokens = [row.token]
        for _ in range(4):
            batch.step()
            tokens.append(row.token)
        alone.append(torch.cat(tokens))
    batch = Batch(model)
    rows = [batch.join(*asked[0])]
    batch.step()
    rows += batch.join_together(asked[1:])
    tokens = [[row.token] for row in rows]
    before = step_of(model).calls
    for _ in range(3):
        batch.step()
        for own, row in zip(tokens, rows, strict=True):
            own.append(row.token)
    assert step_of(model).calls == before + 3
    for number, own in enumerate(tokens):
        first = 1 if number == 0 else 0
        assert torch.equal(torch.cat(own), alone[number][first : first + 4])


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_each_method_give_the_whole_passs_logits(method: str) -> None:
    model = build_quantized_model("qwen2")
    add_adapters(model)
    ids, mask = padded(random_rows(12, 9, 7), "left")
    before = step_of(model).calls
    ours = decode(model, ids, mask, method, steps=4)
    assert step_of(model).calls == before + 4
    with torch.no_grad():
        whole = model(ids, mask, adapter=method, use_cache=False).logits[:, -4:]
        bare = model(ids, mask, adapter="none", use_cache=False).logits[:, -4:]
    torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4)
    assert (whole - bare).abs().max() > 1e-2


@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_rows_of_one_step_may_have_adapters_of_any_methods(threads: int) -> None:
    model = build_quantized_model()
    add_adapters(model)
    model.new_adapter("wide", method="lora", adapted_layers=3, rank=6)
    torch.nn.init.normal_(model.adapters["wide"]["lora"].get_parameter("mlp.down_proj.up"), std=0.3)
    names = ["none", "plain", "tuned", "wide", *METHODS]
    ids = torch.stack(random_rows(*[8] * len(names)))
    states = [model.project(name) for name in names]
    steps, usual = torch.get_num_threads(), step_of(model)
    torch.set_num_threads(threads)
    try:
        cache, before = DynamicCache(), usual.calls
        logits = [
            model(
                ids[:, first:last],
                past_key_values=cache,
                use_cache=True,
                adapter=merge_states(states),
            ).logits[:, -1]
            for first, last in ((0, 6), (6, 7), (7, 8))
        ]
    finally:
        torch.set_num_threads(steps)
    assert usual.calls == before + 2
    for name, row, *ours in zip(names, ids, *logits[1:], strict=True):
        alone = model(row[None], adapter=name, use_cache=False).logits[0, -2:]
        torch.testing.assert_close(torch.stack(ours), alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_part_that_the_step_does_not_know_takes_the_decoders_own_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_quantized_model()
    add_adapters(model)
    ids = random_rows(9)[0][None]
    expected = decode(model, ids, None, "lora", 3)
    monkeypatch.setattr(Lora, "terms", SitePart.terms)
    before = step_of(model).calls
    torch.testing.assert_close(decode(model, ids, None, "lora", 3), expected, rtol=1e-4, atol=1e-4)
    assert step_of(model).calls == before


def test_a_state_with_gradients_is_read_anew_each_time() -> None:
    model = build_quantized_model()
    add_adapters(model)
    state = model.adapters["lora"].requires_grad_(True).state()
    ids = random_rows(9)[0][None]
    with torch.no_grad():
        cache = DynamicCache()
        model(ids[:, :7], past_key_values=cache, use_cache=True, adapter=state)
        first = model(ids[:, 7:8], past_key_values=cache, use_cache=True, adapter=state).logits
        cache.crop(-1)
        for parameter in model.adapters["lora"].parameters():
            parameter.zero_()
        second = model(ids[:, 7:8], past_key_values=cache, use_cache=True, adapter=state).logits
    assert not torch.allclose(first, second)


def test_threads_use_different_adapters_at_once() -> None:
    model = build_quantized_model()
    ids = random_rows(12)[0][None]
    expected = {name: decode(model, ids, None, name, 6) for name in ("none", "plain", "tuned")}
    wrong: list[str] = []

    def check(name: str) -> None:
        for _ in range(5):
            if not torch.equal(decode(model, ids, None, name, 6), expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=check, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_weights(copied: Any) -> None:
    model = build_quantized_model()
    ids = random_rows(12)[0][None]
    expected = decode(model, ids, None, "plain", 4)
    other = copied(model)
    for buffer in model.decoder.buffers():
        buffer.zero_()
    assert torch.equal(decode(other, ids, None, "plain", 4), expected)
    assert step_of(other).inner is other.decoder.base_model


def test_an_adapter_says_once_where_its_base_has_another_precision(tmp_path: Path) -> None:
    model = build_quantized_model()
    model.save_pretrained(tmp_path / "adapter", adapter="plain")
    config = json.loads((tmp_path / "adapter" / "llama_adapter_config.json").read_text())
    assert config["quantization"] == "int8"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(tmp_path / "adapter", name="again")
    plain = LlamaAdapter(build_tiny_decoder(), base="tiny-base")
    with pytest.warns(UserWarning, match="with quantization int8; 'tiny-base' has none here") as told:
        plain.load_adapter(tmp_path / "adapter", name="elsewhere")
        plain.load_adapter(tmp_path / "adapter", name="once more")
    assert len(told) == 1


def test_a_decoder_in_another_dtype_takes_its_own_steps() -> None:
    model = build_quantized_model()
    model.decoder.to(torch.bfloat16)
    before = step_of(model).calls
    assert decode(model, random_rows(9)[0][None], None, "none", 3).isfinite().all()
    assert step_of(model).calls == before


def test_norms_in_another_dtype_are_read_as_they_are() -> None:
    decoder = build_tiny_decoder(dtype=torch.bfloat16)
    exact = copy.deepcopy(decoder).float()
    for own in (decoder, exact):
        quantize_decoder(own, "int8")
    rows = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    states = []
    for own in (decoder, exact):
        inner, cache = LlamaAdapter(own, base="tiny-base").decoder.base_model, DynamicCache()
        with torch.no_grad():
            inner(inputs_embeds=rows[:, :5], past_key_values=cache, use_cache=True)
            states.append(inner(inputs_embeds=rows[:, 5:], past_key_values=cache, use_cache=True)[0])
        assert inner.forward.__self__.calls > 0
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)


def test_generate_gives_the_same_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_quantized_model()
    ids, mask = padded(random_rows(6, 4), "left")
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "adapter": "plain",
    }
    for more in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        before = step_of(model).calls
        ours = model.generate(ids, **options, **more)
        assert step_of(model).calls > before
        monkeypatch.setattr(DecodingStep, "step", lambda self, **_: None)
        assert torch.equal(model.generate(ids, **options, **more), ours)
        monkeypatch.undo()

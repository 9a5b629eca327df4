"""Prefix tuning against its equation, written out head by head, in every way in which rows are computed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.data.examples import IGNORED, Example
from llama_adapter.methods.attention import gated_attention
from llama_adapter.methods.checkpoint import load_adapter, save_adapter
from llama_adapter.methods.prefix import Prefix, PrefixConfig
from llama_adapter.methods.prepared import attention_layers
from llama_adapter.methods.state import merge_states
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.packing.losses import answer_loss
from llama_adapter.packing.pack import pack
from tests.reference import read
from tests.tiny_models import FAMILIES, UNUSUAL, build_tiny_decoder, build_tiny_model, padded, random_rows

CLOSE = {"rtol": 0, "atol": 1e-5}
NAME = "plain_prefix"


def prefixed(family: str = "llama", *, length: int = 3, layers: int = 2, **settings: Any) -> LlamaAdapter:
    """A tiny model with a prefix that is far from what the base has by itself."""
    model = LlamaAdapter(build_tiny_decoder(family, **settings), base="tiny")
    add(model, "prefix", length=length, layers=layers)
    return model


def add(model: LlamaAdapter, name: str, *, length: int, layers: int = 2, seed: int = 1) -> Prefix:
    adapter = model.new_adapter(
        name, method="prefix", adapted_layers=layers, prefix_length=length, seed=seed
    ).to(model.decoder.dtype)
    found = adapter.find(Prefix)
    assert found is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.5)
    return found


def plain_attention(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention function for one row: (1, H, T, d) -> (1, T, H, d)."""
    length = query.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    window = kwargs.get("sliding_window")
    if layer.config.model_type == "phimoe":  # its layers are not told
        window = layer.config.sliding_window
    visible = (distance >= 0) & (distance < (window or length))
    key, value = key[0], value[0]
    if layer.plain_prefix is not None:
        keys, values = layer.plain_prefix
        key, value = torch.cat([keys, key], dim=1), torch.cat([values, value], dim=1)
        visible = torch.cat([torch.ones(length, keys.shape[1], dtype=torch.bool), visible], dim=1)
    if (sinks := getattr(layer, "sinks", None)) is not None:
        # A key of score s whose value is zero.
        heads = zip(query[0], sinks, strict=True)
        repeats = query.shape[1] // len(key)
        outputs = [
            _with_sink(head, key[index // repeats], value[index // repeats], visible, kwargs["scaling"], sink)
            for index, (head, sink) in enumerate(heads)
        ]
    else:
        outputs = [
            read(head, key[group], value[group], visible, kwargs["scaling"], kwargs.get("softcap"))
            for index, head in enumerate(query[0])
            for group in [index * len(key) // query.shape[1]]
        ]
    return torch.stack(outputs, dim=1)[None], None


def _with_sink(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, sink: Tensor
) -> Tensor:
    weights = torch.exp(query @ key.T * scale) * visible
    return weights @ value / (weights.sum(1, keepdim=True) + sink.exp())


AttentionInterface.register(NAME, plain_attention)


def plain(model: LlamaAdapter, base: PreTrainedModel, name: str = "prefix") -> Any:
    """The logits (T, V) of a row (T,), by the equation."""
    decoder = copy.deepcopy(base)
    decoder.set_attn_implementation(NAME)
    prefix = model.get_adapter(name).find(Prefix)
    assert prefix is not None
    layers = [m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "q_proj")]
    layers = layers or [m for m in decoder.modules() if type(m).__name__.endswith("Attention")]
    for index, layer in enumerate(layers):
        adapted = index - (len(layers) - len(prefix.keys))
        own = (prefix.keys[adapted], prefix.values[adapted]) if adapted >= 0 else None
        layer.plain_prefix = None if own is None else tuple(states.transpose(0, 1) for states in own)
    return lambda row: decoder(input_ids=row[None], use_cache=False).logits[0]


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
@torch.no_grad()
def test_every_family_gives_the_logits_of_the_equation(family: str) -> None:
    model = prefixed(family)
    expected_of = plain(model, build_tiny_decoder(family))
    rows = random_rows(7, 10)
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        logits = model(ids, attention_mask=mask).logits
        bare = model(ids, attention_mask=mask, adapter=NO_ADAPTER).logits
        for row, real, of_row, of_base in zip(rows, mask.bool(), logits, bare, strict=True):
            expected = expected_of(row)
            torch.testing.assert_close(of_row[real], expected, **CLOSE)
            assert (of_base[real] - expected).abs().max() > 0.02
    torch.testing.assert_close(model(rows[0][None]).logits[0], expected_of(rows[0]), **CLOSE)


@torch.no_grad()
def test_it_stands_beside_sinks() -> None:
    base = build_tiny_decoder("gpt_oss", num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    model = LlamaAdapter(copy.deepcopy(base), base="tiny")
    add(model, "prefix", length=3)
    (row,) = random_rows(9)
    expected = plain(model, base)(row)
    torch.testing.assert_close(model(row[None]).logits[0], expected, **CLOSE)


def test_it_fits_keys_and_values_that_a_config_does_not_tell_of(tmp_path: Path) -> None:
    model = prefixed("deepseek_v3")
    adapter = model.get_adapter("prefix")
    settings = adapter.config.find(PrefixConfig)
    assert settings is not None
    sizes = (settings.key_value_heads, settings.key_width, settings.value_width)
    assert sizes == (4, 14, 4)
    save_adapter(adapter, tmp_path)
    model.add_adapter("again", load_adapter(tmp_path))
    (row,) = random_rows(5)
    assert model(row[None], adapter="again").logits.equal(model(row[None], adapter="prefix").logits)
    of_an_mlp = model.new_adapter("made", method="prefix", prefix_mlp=4, prefix_length=2, seed=1)
    state = of_an_mlp.state().parts[Prefix]
    assert (state["keys"].shape[2:], state["values"].shape[2:]) == ((4, 2, 14), (4, 2, 4))


@pytest.mark.parametrize("sizes", [(4, 0, 4), (-1, 4, 4)])
def test_sizes_that_cannot_be_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="expected three numbers above 0"):
        PrefixConfig(3, 0, *sizes)


def test_a_bias_by_position_is_refused() -> None:
    model = prefixed()
    layer = attention_layers(model.decoder)[-1]
    query, key = torch.ones(1, 4, 2, 8), torch.ones(1, 2, 2, 8)
    with pytest.raises(UsageError, match="position_bias"):
        gated_attention(
            "sdpa", layer, query, key, key, None, adapter=model.project("prefix"), position_bias=query
        )


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
@torch.no_grad()
def test_with_a_cache_it_is_the_same(family: str) -> None:
    model = prefixed(family)
    rows = random_rows(6, 9)
    ids, mask = padded(rows, "left")
    whole = model(ids, attention_mask=mask).logits
    state = model.project("prefix")
    cache = None
    for start, stop in ((0, 4), (4, 6), (6, 7), (7, 8), (8, 9)):
        output = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            past_key_values=cache,
            use_cache=True,
            adapter=state,
        )
        cache = output.past_key_values
        for row, real in enumerate(mask.bool()[:, start:stop]):
            found = output.logits[row, real]
            torch.testing.assert_close(found, whole[row, start:stop][real], **CLOSE)


@torch.no_grad()
def test_beams_and_a_static_cache_have_it_too() -> None:
    model = prefixed()
    rows = random_rows(5, 8)
    ids, mask = padded(rows, "left")
    asked: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for ways in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        together = model.generate(ids, attention_mask=mask, **asked, **ways)
        for row, answer in zip(rows, together, strict=True):
            alone = model.generate(row[None], attention_mask=torch.ones_like(row)[None], **asked, **ways)
            assert answer[-5:].equal(alone[0, -5:]), ways
    row = rows[0]
    for _ in range(5):
        row = torch.cat([row, model(row[None]).logits[0, -1].argmax()[None]])
    assert model.generate(rows[0][None], **asked)[0].equal(row)


@torch.no_grad()
def test_rows_with_other_lengths_layers_and_none_decode_in_one_batch() -> None:
    model = prefixed()
    add(model, "longer", length=5, layers=3, seed=2)
    add(model, "shorter", length=1, layers=1, seed=3)
    model.new_adapter("prompts", adapted_layers=2, prompt_length=2, seed=4)
    names = ["prefix", NO_ADAPTER, "longer", "shorter", "prompts"]
    rows = random_rows(9, 7, 8, 9, 5)
    ids, mask = padded(rows, "left")
    merged = merge_states([model.project(name) for name in names])
    again = merge_states([merged.of_row(number) for number in range(len(names))])
    for state in (merged, again):
        cache = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True, adapter=state).past_key_values
        step = model(ids[:, -1:], attention_mask=mask, past_key_values=cache, adapter=state).logits[:, -1]
        for name, row, logits in zip(names, rows, step, strict=True):
            torch.testing.assert_close(logits, model(row[None], adapter=name).logits[0, -1], **CLOSE)
    single = merge_states([model.project("prefix"), model.project("prompts")])
    assert "mask" in single.parts[Prefix]
    of_one_length = merge_states([model.project("prefix"), model.project("prefix").of_row(0)])
    assert "mask" not in of_one_length.parts[Prefix]


@torch.no_grad()
def test_eager_attention_gives_the_same_and_its_weights_begin_with_the_prefix() -> None:
    sdpa, eager = prefixed(), prefixed(attn_implementation="eager")
    ids = torch.stack(random_rows(7, 7))
    output = eager(ids, output_attentions=True)
    torch.testing.assert_close(output.logits, sdpa(ids).logits, **CLOSE)
    assert [weights.shape[-1] for weights in output.attentions] == [7, 10, 10]
    torch.testing.assert_close(output.attentions[-1].sum(-1), torch.ones(2, 4, 7))


def example(tokens: Tensor, opening: list[int], row: int) -> Example:
    ids = [*opening, *tokens.tolist()]
    return Example(ids, [IGNORED] * (len(ids) - 4) + ids[-4:], (), row)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text"])
def test_packed_rows_with_a_shared_opening_have_the_loss_that_they_have_alone(family: str) -> None:
    model = prefixed(family, dtype=torch.float64)
    opening = random_rows(20, seed=5)[0].tolist()
    examples = [example(row, opening, number) for number, row in enumerate(random_rows(6, 9, 13, 7), 1)]
    packed = pack(examples)
    assert any(segment.context is not None for segment in packed.segments)
    total = torch.zeros((), dtype=torch.float64)
    for one in examples:
        labels = torch.tensor([one.labels])
        total += model(torch.tensor([one.input_ids]), labels=labels).loss.detach() * 4
    together = answer_loss(model, packed, adapter="prefix").sum()
    assert float(together.detach()) == pytest.approx(float(total), rel=1e-5)


def test_a_packed_sequence_has_one() -> None:
    model = prefixed()
    add(model, "other", length=3, seed=2)
    state = merge_states([model.project("prefix"), model.project("other")])
    packed = pack([example(row, [], number) for number, row in enumerate(random_rows(6, 9), 1)])
    with pytest.raises(UsageError, match="2 sets of prefix for a packed sequence; give one"):
        answer_loss(model, packed, adapter=state)


@torch.no_grad()
def test_it_starts_as_keys_and_values_of_the_base_s_tokens() -> None:
    model = LlamaAdapter(build_tiny_decoder(), base="tiny")
    options: dict[str, Any] = {"method": "prefix", "prefix_length": 200}
    own = model.new_adapter("new", seed=1, **options).find(Prefix)
    again = model.new_adapter("again", seed=1, **options).find(Prefix)
    other = model.new_adapter("other", seed=2, **options).find(Prefix)
    made = model.new_adapter("made", seed=1, prefix_mlp=64, **options)
    assert own is not None and again is not None and other is not None
    assert own.keys.equal(again.keys) and not own.keys.equal(other.keys)
    read: list[Tensor] = []
    layer: Any = attention_layers(model.decoder)[-1]
    hook = layer.k_proj.register_forward_hook(lambda module, args, output: read.append(output))
    (row,) = random_rows(100)
    model(row[None], adapter=NO_ADAPTER)
    hook.remove()
    keys = made.state().parts[Prefix]["keys"][0, -1]
    for found in (own.keys[-1], keys):
        assert float(found.square().mean() / read[0].square().mean()) == pytest.approx(1, rel=0.3)


def test_it_computes_what_pefts_does() -> None:
    decoder = build_tiny_decoder(dtype=torch.float64)
    model = LlamaAdapter(copy.deepcopy(decoder), base="tiny")
    peft = get_peft_model(decoder, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    prefix = add(model, "prefix", length=3, layers=3).requires_grad_(True)
    theirs: Any = peft.prompt_encoder["default"].embedding.weight
    # Theirs is (K, L * 2 * G * d), keys before values.
    ours = torch.stack([prefix.keys, prefix.values], dim=1).permute(2, 0, 1, 3, 4)
    theirs.data.copy_(ours.flatten(1))
    tokens = torch.stack(random_rows(8, 8))
    # Their cache holds the prefix, so their first token is at position K.
    positions = torch.arange(3, 11)[None]
    found = model(tokens, position_ids=positions, labels=tokens, adapter="prefix")
    expected = peft(tokens, labels=tokens)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    found.loss.backward()
    expected.loss.backward()
    gradient = torch.stack([prefix.keys.grad, prefix.values.grad], dim=1).permute(2, 0, 1, 3, 4)
    torch.testing.assert_close(gradient.flatten(1), theirs.grad.double(), rtol=0, atol=1e-7)
    assert theirs.grad.abs().max() > 1e-3


def test_an_mlp_makes_the_keys_and_values_that_are_kept() -> None:
    model = LlamaAdapter(build_tiny_decoder(), base="tiny")
    prefix = model.new_adapter(
        "made", method="prefix", adapted_layers=2, prefix_length=3, prefix_mlp=5, seed=1
    ).find(Prefix)
    assert prefix is not None
    mlp: Any = prefix.mlp
    hidden = F.linear(prefix.embeddings, mlp.hidden.weight, mlp.hidden.bias).tanh()
    numbers = F.linear(hidden, mlp.output.weight, mlp.output.bias).view(3, 2, 2, 16)
    state = model.project("made").parts[Prefix]
    for which, name in enumerate(("keys", "values")):
        for layer in range(2):
            own = numbers[:, layer, :, 8 * which : 8 * which + 8]
            expected = own.transpose(0, 1) * prefix.sizes[which, layer]
            torch.testing.assert_close(state[name][0, layer], expected)
    assert not state["keys"].requires_grad


def test_the_probe_s_decoder_is_left_as_it_was() -> None:
    model = build_tiny_model()
    before = {name: value.clone() for name, value in model.decoder.state_dict().items()}
    model.new_adapter("prefix", method="prefix", seed=1)
    assert all(value.equal(before[name]) for name, value in model.decoder.state_dict().items())
    assert not any(len(module._forward_pre_hooks) for module in _modules(model.decoder))


def _modules(decoder: nn.Module) -> list[nn.Module]:
    return list(decoder.modules())

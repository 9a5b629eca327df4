"""Families of decoders: those that work, those that are refused, and how that is found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from llama_adapter.common.errors import UsageError
from llama_adapter.data.examples import IGNORED, Example
from llama_adapter.methods.attention import PREFIX, attention_form
from llama_adapter.methods.packed_attention import Segment
from llama_adapter.methods.prepared import attention_layers
from llama_adapter.methods.probe import prepare_decoder
from llama_adapter.model import LlamaAdapter
from llama_adapter.packing.losses import answer_losses
from tests.reference import PlainDecoder
from tests.tiny_models import FAMILIES, UNUSUAL, build_tiny_decoder, build_tiny_model, padded, random_rows


def one_line(error: pytest.ExceptionInfo[UsageError]) -> str:
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 500
    return message


# --- families that work -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
@torch.no_grad()
def test_zero_gates_give_the_base_s_logits_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    rows = random_rows(9, 6)
    ids, mask = padded(rows, "right")
    base = build_tiny_decoder(family, dtype)
    expected = base(input_ids=ids, attention_mask=mask).logits
    model = LlamaAdapter(build_tiny_decoder(family, dtype))
    model.new_adapter("untrained", seed=0)
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    assert torch.equal(model(ids, attention_mask=mask, adapter="none").logits, expected)

    output = model(ids[:1, :5], use_cache=True)
    base_output = base(input_ids=ids[:1, :5], use_cache=True)
    step = {"input_ids": ids[:1, 5:6]}
    assert torch.equal(
        model(**step, past_key_values=output.past_key_values).logits,
        base(**step, past_key_values=base_output.past_key_values).logits,
    )


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
@torch.no_grad()
def test_every_family_gives_the_logits_of_the_equations(family: str) -> None:
    model = build_tiny_model(family)
    adapter = model.adapters["tiny"]
    rows = random_rows(7, 10)
    plain = PlainDecoder(build_tiny_decoder(family), adapter.prompts.embeddings, adapter.prompts.gates)
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        logits = model(ids, attention_mask=mask).logits
        bare = model(ids, attention_mask=mask, adapter="none").logits
        for row, real, of_row, of_base in zip(rows, mask.bool(), logits, bare, strict=True):
            expected = plain(row)
            torch.testing.assert_close(of_row[real], expected, rtol=0, atol=1e-5)
            assert (of_base[real] - expected).abs().max() > 0.05


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
@torch.no_grad()
def test_every_family_gives_the_same_with_a_cache(family: str) -> None:
    model = build_tiny_model(family)
    rows = random_rows(6, 9)
    ids, mask = padded(rows, "left")
    whole = model(ids, attention_mask=mask).logits
    cache = None
    for stop in range(4, ids.shape[1] + 1):
        start = 0 if cache is None else stop - 1
        output = model(
            ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        for row, real in enumerate(mask.bool()[:, stop - 1]):
            if real:
                torch.testing.assert_close(output.logits[row, -1], whole[row, stop - 1], rtol=0, atol=1e-5)


def test_prompts_reach_cohere_without_key_norms_too() -> None:
    model = build_tiny_model("cohere", use_qk_norm=False)
    adapter = model.adapters["tiny"]
    (row,) = random_rows(8)
    plain = PlainDecoder(
        build_tiny_decoder("cohere", use_qk_norm=False), adapter.prompts.embeddings, adapter.prompts.gates
    )
    torch.testing.assert_close(model(row[None]).logits[0], plain(row), rtol=0, atol=1e-5)


def test_scaled_rotary_embedding_does_not_look_like_a_strange_family() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    model = build_tiny_model("llama", rope_parameters=rope)
    adapter = model.adapters["tiny"]
    (row,) = random_rows(8)
    plain = PlainDecoder(
        build_tiny_decoder("llama", rope_parameters=rope), adapter.prompts.embeddings, adapter.prompts.gates
    )
    torch.testing.assert_close(model(row[None]).logits[0], plain(row), rtol=0, atol=1e-5)


def test_llama_7b_has_1229760_trainable_parameters_and_none_of_its_own_is_allocated() -> None:
    with torch.device("meta"):
        decoder = LlamaForCausalLM(LlamaConfig())  # LLaMA-7B's shape is transformers' default
    model = LlamaAdapter(decoder)
    adapter = model.new_adapter("published")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_229_760
    assert adapter.config.adapted_layers == 30 and adapter.prompts.embeddings.shape == (30, 10, 4096)
    assert all(p.device.type == "meta" for p in model.parameters())


def test_the_decoder_is_frozen_and_in_eval_mode_and_looking_at_it_draws_no_random_number() -> None:
    decoder = build_tiny_decoder("llama").train()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert prepare_decoder(decoder) is decoder
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(p.requires_grad for p in decoder.parameters()) and not decoder.training
    assert decoder.config._attn_implementation == PREFIX + "sdpa"
    prepare_decoder(decoder.train())
    assert decoder.config._attn_implementation == PREFIX + "sdpa" and not decoder.training


def test_a_switched_decoder_without_prompts_computes_what_it_did() -> None:
    decoder = build_tiny_decoder("llama")
    (row,) = random_rows(9)
    before = decoder(row[None]).logits
    prepare_decoder(decoder)
    assert torch.equal(decoder(row[None]).logits, before)


# --- families that are refused ------------------------------------------------------------------------------

UNHEARD = "never received the prompts"
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    # Attention of its own, keywords dropped.
    "bloom": (UNHEARD, {}),
    "falcon": (UNHEARD, {"head_dim": None}),
    "gptj": (UNHEARD, {"rotary_dim": 4}),
    "stablelm": (UNHEARD, {}),
    "nemotron": (UNHEARD, {}),
    # Attends twice, mixes in convolutions, a state space beside each attention, a mask of its own.
    "diffllama": ("calls attention more than once", {}),
    "lfm2": ("layer 0 " + UNHEARD, {"layer_types": ["conv", "full_attention", "conv"]}),
    "falcon_h1": ("interact outside of its attention", {}),
    "doge": ("needs an attention that takes", {}),
    # Sizes that change from layer to layer; keys that are clipped outside of any module.
    "gemma4_text": ("differ in size", {"global_head_dim": 16, "num_global_key_value_heads": 2}),
    "olmo": ("layer 0 computes its keys in a way of its own", {"clip_qkv": 0.1}),
}


@pytest.mark.parametrize("family", REFUSED)
@torch.no_grad()
def test_a_family_that_cannot_be_adapted_is_refused_and_left_as_it_was(family: str) -> None:
    reason, settings = REFUSED[family]
    decoder = build_tiny_decoder(family, **settings).train()
    (row,) = random_rows(6)
    implementation = decoder.config._attn_implementation
    before = decoder.eval()(input_ids=row[None]).logits
    decoder.train()
    with pytest.raises(UsageError) as error:
        LlamaAdapter(decoder)
    message = one_line(error)
    assert repr(family) in message and reason in message
    assert decoder.config._attn_implementation == implementation
    assert decoder.training and all(p.requires_grad for p in decoder.parameters())
    assert torch.equal(decoder.eval()(input_ids=row[None]).logits, before)


def test_the_probe_is_not_fooled_by_a_padding_token_that_is_embedded_as_zeros() -> None:
    decoder = build_tiny_decoder("olmo", pad_token_id=0, clip_qkv=0.1)
    with torch.no_grad():
        decoder.get_input_embeddings().weight[0] = 0
    with pytest.raises(UsageError, match="keys in a way of its own"):
        prepare_decoder(decoder)


def test_an_encoder_is_refused() -> None:
    decoder = build_tiny_decoder("llama")
    decoder.config.is_encoder_decoder = True
    with pytest.raises(UsageError, match="has an encoder"):
        prepare_decoder(decoder)


def test_an_attention_that_cannot_be_wrapped_is_refused() -> None:
    decoder = build_tiny_decoder("llama", attn_implementation="flex_attention")
    with pytest.raises(UsageError, match="attn_implementation='sdpa'"):
        prepare_decoder(decoder)


@pytest.mark.parametrize("failure", [ZeroDivisionError, TypeError, AssertionError, NotImplementedError])
def test_whatever_goes_wrong_in_a_trial_run_is_one_line(failure: type[Exception]) -> None:
    decoder = build_tiny_decoder("llama").train()
    decoder.model.layers[1].eval()  # a part that is not as the rest is

    def fail(layer: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        raise failure("of a family's\nown making")

    hook = decoder.model.layers[2].self_attn.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(UsageError) as error:
        prepare_decoder(decoder)
    message = one_line(error)
    assert "'llama'" in message and f"{failure.__name__}: of a family's own making" in message
    assert decoder.config._attn_implementation == "sdpa"
    assert decoder.training and not decoder.model.layers[1].training and decoder.model.layers[0].training
    assert not attention_layers(decoder) and all(p.requires_grad for p in decoder.parameters())
    hook.remove()
    assert len(attention_layers(prepare_decoder(decoder))) == 3


def test_stopping_a_trial_run_stays_a_stop() -> None:
    decoder = build_tiny_decoder("llama")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    decoder.model.layers[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_decoder(decoder)
    assert decoder.config._attn_implementation == "sdpa"


# The layers of Moshi do not get what they are passed.
OLD_MOSHI = pytest.mark.skipif(transformers.__version__.startswith("5.20."), reason="mended after 5.20")


@pytest.mark.parametrize("family", ["afmoe", pytest.param("moshi", marks=OLD_MOSHI), "jetmoe"])
@torch.no_grad()
def test_families_with_unusual_modules_or_views_work(family: str) -> None:
    experts = {
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    settings = {"ffn_dim": 48, "kv_channels": 8, **experts} if family != "afmoe" else experts
    model = LlamaAdapter(build_tiny_decoder(family, **settings))
    model.new_adapter("untrained", seed=0)
    (row,) = random_rows(6)
    assert torch.equal(model(row[None]).logits, model(row[None], adapter="none").logits)


# --- how far back a layer sees ------------------------------------------------------------------------------

PACKABLE = [family for family in FAMILIES if family != "deepseek_v3"] + [
    "deepseek_v3",
    "cohere2",
    "llama4_text",
]


@pytest.mark.parametrize("family", PACKABLE)
@torch.no_grad()
def test_packed_rows_have_the_loss_that_they_have_alone(family: str) -> None:
    settings: dict[str, Any] = {}
    if family == "cohere2":
        settings = {
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        }
    if family == "llama4_text":  # chunks of four; its layers without positions look at the place in the cache
        settings = {"attention_chunk_size": 4, "no_rope_layers": [1, 1, 1], "intermediate_size_mlp": 48}
        settings |= {"num_local_experts": 2, "layer_types": ["chunked_attention"] * 3}
    model = build_tiny_model(family, **settings)
    rows = random_rows(11, 3, 14)
    examples = [Example(row.tolist(), [IGNORED, *row[1:].tolist()], (), 1) for row in rows]
    packed, counts = answer_losses(model, examples, device=torch.device("cpu"))
    assert counts.tolist() == [10, 2, 13]
    for row, loss in zip(rows, packed, strict=True):
        alone = model(row[None], labels=row[None]).loss * (len(row) - 1)
        torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["mistral", "phimoe"])
def test_a_window_of_thousands_of_tokens_is_found_by_a_few(family: str, implementation: str) -> None:
    decoder = build_tiny_decoder(
        family,
        max_position_embeddings=10_000,
        **{**FAMILIES.get(family, {}), **UNUSUAL.get(family, {}), "sliding_window": 3000},
        attn_implementation=implementation,
    )
    tokens: list[int] = []
    decoder.model.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prepare_decoder(decoder)
    assert [attention_form(layer).window for layer in attention_layers(decoder)] == [3000] * 3
    assert sum(tokens) < 40


def test_a_layer_that_looks_at_its_place_in_the_sequence_cannot_be_packed() -> None:
    settings = {"no_rope_layers": [1, 0, 1], "intermediate_size_mlp": 48, "num_local_experts": 2}
    model = build_tiny_model("llama4_text", **settings)
    (row,) = random_rows(6)
    with pytest.raises(UsageError, match="rows cannot be packed for this decoder: its layers count"):
        model(row[None], segments=(Segment(0, 3), Segment(3, 6)))


def test_softcapping_is_computed_even_if_the_decoder_was_loaded_for_sdpa() -> None:
    """As transformers 5.20 loads Gemma 2, whose sdpa leaves softcapping out."""
    tokens = torch.stack(random_rows(7))
    decoder = build_tiny_decoder("gemma2", attn_implementation="eager")
    with torch.no_grad():
        expected = decoder(tokens).logits
    decoder.config._attn_implementation_internal = "sdpa"
    prepare_decoder(decoder)
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens).logits, expected)

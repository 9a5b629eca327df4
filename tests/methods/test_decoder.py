"""Families of decoders: those that work, those that are refused, and how one is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llama_adapter.common.errors import UsageError
from llama_adapter.methods import decoder as decoder_module
from llama_adapter.methods.attention import PREFIX
from llama_adapter.methods.decoder import (
    choose_device,
    choose_dtype,
    decoder_shape,
    load_decoder,
    load_shape,
    load_tokenizer,
    prepare_decoder,
)
from llama_adapter.model import LlamaAdapter
from tests.reference import PlainDecoder
from tests.tiny_models import FAMILIES, build_tiny_decoder, build_tiny_model, padded, random_rows

CPU = torch.device("cpu")


def one_line(error: pytest.ExceptionInfo[UsageError]) -> str:
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 500
    return message


# --- families that work -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_gives_the_logits_of_the_equations(family: str) -> None:
    model = build_tiny_model(family)
    adapter = model.adapters["tiny"]
    rows = random_rows(7, 10)
    plain = PlainDecoder(build_tiny_decoder(family), adapter.prompts, adapter.gates)
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        logits = model(ids, attention_mask=mask).logits
        bare = model(ids, attention_mask=mask, adapter="none").logits
        for row, real, of_row, of_base in zip(rows, mask.bool(), logits, bare, strict=True):
            expected = plain(row)
            torch.testing.assert_close(of_row[real], expected, rtol=0, atol=1e-5)
            assert (of_base[real] - expected).abs().max() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
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
    plain = PlainDecoder(build_tiny_decoder("cohere", use_qk_norm=False), adapter.prompts, adapter.gates)
    torch.testing.assert_close(model(row[None]).logits[0], plain(row), rtol=0, atol=1e-5)


def test_scaled_rotary_embedding_does_not_look_like_a_strange_family() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    model = build_tiny_model("llama", rope_parameters=rope)
    adapter = model.adapters["tiny"]
    (row,) = random_rows(8)
    plain = PlainDecoder(build_tiny_decoder("llama", rope_parameters=rope), adapter.prompts, adapter.gates)
    torch.testing.assert_close(model(row[None]).logits[0], plain(row), rtol=0, atol=1e-5)


def test_llama_7b_has_1229760_trainable_parameters_and_none_of_its_own_is_allocated() -> None:
    with torch.device("meta"):
        decoder = LlamaForCausalLM(LlamaConfig())  # LLaMA-7B's shape is transformers' default
    model = LlamaAdapter(decoder)
    adapter = model.new_adapter("published")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_229_760
    assert adapter.config.adapted_layers == 30 and adapter.prompts.shape == (30, 10, 4096)
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

FUSED = "no k_proj and v_proj of their own"
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": (FUSED, {}),
    "falcon": (FUSED, {"head_dim": None}),
    "gpt2": (FUSED, {}),
    "gpt_neox": (FUSED, {}),
    "phi3": (FUSED, {}),
    "stablelm": ("never received the prompts", {}),
    # Beyond the list: drops keywords, names its key norm otherwise, attends twice, mixes in convolutions.
    "nemotron": ("never received the prompts", {}),
    "hunyuan_v1_dense": ("computes its keys in a way of its own", {}),
    "diffllama": ("attends more than once", {}),
    "lfm2": ("3 layers but 1 attentions", {"layer_types": ["conv", "full_attention", "conv"]}),
    "falcon_h1": ("meet elsewhere than in its attention", {}),  # a state space beside each attention
    "doge": ("has a mask of its own", {}),
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
    decoder = build_tiny_decoder("hunyuan_v1_dense", pad_token_id=0)
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


# --- loading ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny-base"
    build_tiny_decoder("llama").save_pretrained(folder)
    return folder


def test_a_decoder_is_loaded_in_the_dtype_asked_for(tiny_base: Path) -> None:
    decoder = load_decoder(str(tiny_base), device=CPU, dtype=torch.bfloat16)
    assert decoder.dtype == torch.bfloat16 and not decoder.training
    assert decoder_shape(decoder.config) == load_shape(str(tiny_base))


def test_the_shape_is_read_without_the_weights(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_base / "config.json", tmp_path)
    shape = load_shape(str(tmp_path))
    assert (shape.family, shape.num_layers, shape.hidden_size, shape.head_dim) == ("llama", 3, 32, 8)
    assert (shape.num_heads, shape.num_key_value_heads, shape.vocab_size) == (4, 2, 64)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BROKEN = {
    "weights cut off": lambda folder: truncate(folder / "model.safetensors", 5000),
    "weights empty": lambda folder: truncate(folder / "model.safetensors", 0),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights of another size": lambda folder: edit_config(folder, intermediate_size=40),
    "config cut off": lambda folder: truncate(folder / "config.json", 40),
    "config is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config empty": lambda folder: (folder / "config.json").write_text("{}"),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no decoder": lambda folder: edit_config(folder, model_type="t5"),
    "unheard of": lambda folder: edit_config(folder, model_type="unheard-of"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_base_that_cannot_be_loaded_is_one_line_that_names_it(
    tiny_base: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "broken-base"
    shutil.copytree(tiny_base, folder)
    BROKEN[damage](folder)
    with pytest.raises(UsageError) as error:
        load_decoder(str(folder), device=CPU, dtype=torch.float32)
    assert "broken-base" in one_line(error)


def test_a_base_without_a_tokenizer_says_so(tiny_base: Path) -> None:
    with pytest.raises(UsageError) as error:
        load_tokenizer(str(tiny_base))
    assert "tiny-base" in one_line(error)


def hub_error(kind: type[Exception]) -> Exception:
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/owner/name"))
    return kind("Access to the model owner/name is restricted.\nYou must be logged in.", response=response)


def test_a_gated_base_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        # As transformers has it: its own error, the hub's behind it.
        raise OSError("You are trying to access a gated repo.\nMake sure to ...") from hub_error(
            GatedRepoError
        )

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UsageError) as error:
        load_decoder("owner/name", device=CPU, dtype=torch.float32)
    message = one_line(error)
    assert "'owner/name' is gated" in message and "hf auth login" in message and "HF_TOKEN" in message


def test_a_base_that_the_hub_does_not_have_says_what_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise hub_error(RepositoryNotFoundError)

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UsageError) as error:
        load_decoder("owner/name", device=CPU, dtype=torch.float32)
    assert "'owner/name' cannot be loaded" in one_line(error)


def test_a_bug_while_loading_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(AssertionError, match="a bug"):
        load_decoder("owner/name", device=CPU, dtype=torch.float32)


def test_the_fetched_base_loads_and_zero_gates_change_nothing(base_folder: Path) -> None:
    model = LlamaAdapter.from_base(str(base_folder), device="cpu", dtype="float32")
    adapter = model.new_adapter("untrained", seed=0)
    assert (adapter.config.adapted_layers, adapter.config.prompt_length) == (29, 10)
    ids = torch.stack(random_rows(8, 8, vocab_size=1000))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, adapter="none").logits)
        bare = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        assert torch.equal(model(ids).logits, bare(ids).logits)


# --- device and dtype ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
@pytest.mark.parametrize("asked", [None, "auto"])
def test_the_fastest_device_is_chosen(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device(asked).type == expected


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(UsageError) as error:
        choose_device(device)
    assert repr(device) in one_line(error)


@pytest.mark.parametrize(
    ("asked", "device", "fast", "expected"),
    [
        (None, "cpu", True, torch.float32),
        (None, "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float32),
        ("float16", "cpu", False, torch.float16),
        ("bfloat16", "cpu", False, torch.bfloat16),
    ],
)
def test_the_dtype_is_what_is_fast_on_the_device_or_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, device: str, fast: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: fast)
    assert choose_dtype(asked, torch.device(device)) == expected


def test_an_unknown_dtype_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError) as error:
        choose_dtype("float8", CPU)
    assert "bfloat16" in one_line(error)


def test_a_tokenizer_without_padding_pads_with_its_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        pad_token_id = None
        pad_token = None
        eos_token = "</s>"

    monkeypatch.setattr(decoder_module.AutoTokenizer, "from_pretrained", lambda _: Tokenizer())
    assert load_tokenizer("owner/name").pad_token == "</s>"

"""Adapters by name, as users of transformers and PEFT call them (PEFT's test_adaption_prompt.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaptionPromptConfig
from transformers import Trainer, TrainingArguments, pipeline

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.adapter import Adapter
from llama_adapter.model import LlamaAdapter
from tests.refusals import refusal
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import build_tiny_decoder, build_tiny_model, random_rows


@pytest.fixture
def model() -> LlamaAdapter:
    return build_tiny_model(names=("first", "second"))


@torch.no_grad()
def logits(model: Any, **given: Any) -> torch.Tensor:
    return model(torch.stack(random_rows(7)), **given).logits


# --- switching off ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["disable_adapters", "disable_adapter"])
def test_adapters_are_switched_off_by_a_statement_or_a_block(model: LlamaAdapter, name: str) -> None:
    switch_off = getattr(model, name)
    adapted, bare = logits(model), logits(model, adapter="none")
    switch_off()
    assert torch.equal(logits(model), bare) and model.active_adapters == []
    model.enable_adapters()
    assert torch.equal(logits(model), adapted) and model.active_adapters == ["second"]
    model.enable_adapters()
    assert model.active_adapter == "second"
    with switch_off():
        assert torch.equal(logits(model), bare)
        with switch_off():
            assert torch.equal(logits(model), bare)
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), adapted)


def test_what_is_chosen_while_adapters_are_off_stays_chosen(model: LlamaAdapter) -> None:
    with model.disable_adapters():
        model.set_adapter("first")
        assert torch.equal(logits(model), logits(model, adapter="first"))
    assert model.active_adapter == "first"
    with model.disable_adapters():
        model.new_adapter("third")
    assert model.active_adapter == "third"
    with model.disable_adapters():
        model.set_adapter("none")
    assert model.active_adapter == "none"
    model.set_adapter("third")
    model.disable_adapters()
    model.delete_adapter("third")
    model.enable_adapters()
    assert model.active_adapter == "none"


def test_active_adapters_are_read_as_in_peft_and_called_as_in_transformers(model: LlamaAdapter) -> None:
    assert model.active_adapters == model.active_adapters() == ["second"]
    assert model.active_adapters[0] == "second" and len(model.active_adapters) == 1
    model.set_adapter(["first"])
    assert model.active_adapters == ["first"]
    assert "2 adapters given (first, second)" in refusal(lambda: model.set_adapter(["first", "second"]))
    model.set_adapter("first", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in model.get_adapter("first").parameters())


# --- counting -----------------------------------------------------------------------------------------------


def test_parameters_are_counted_with_the_adapters(
    model: LlamaAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    base = sum(parameter.numel() for parameter in model.decoder.parameters())
    own = sum(parameter.numel() for parameter in model.adapters.parameters())
    assert own and model.num_parameters() == base + own
    assert model.num_parameters(only_trainable=True) == own
    embeddings = model.get_input_embeddings().weight.numel()
    assert model.num_parameters(exclude_embeddings=True) == base + own - embeddings
    assert model.get_nb_trainable_parameters() == (own, base + own)
    model.print_trainable_parameters()
    assert f"trainable params: {own:,} || all params: {base + own:,} ||" in capsys.readouterr().out
    model.set_requires_grad("first", False)
    assert model.num_parameters(only_trainable=True) == own // 2
    model.set_requires_grad(["first", "second"])
    assert model.num_parameters(only_trainable=True) == own
    assert model.get_memory_footprint() >= 4 * (base + own)
    tied = build_tiny_model(tie_word_embeddings=True)
    assert tied.num_parameters() == sum(parameter.numel() for parameter in tied.parameters())


# --- what PEFT's users do with an AdaptionPromptModel -------------------------------------------------------


def test_only_the_adapter_is_trained(model: LlamaAdapter) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"adapters.{name}.prompts.{own}" for name in ("first", "second") for own in ("embeddings", "gates")
    }


def test_an_added_adapter_is_active_and_another_can_be_set(model: LlamaAdapter) -> None:
    zero = model.new_adapter("third")
    assert torch.equal(logits(model), logits(model, adapter="none"))
    model.set_adapter("first")
    assert torch.equal(logits(model), logits(model, adapter="first"))
    model.delete_adapter("third")
    model.add_adapter("again", zero)
    assert model.active_adapter == "again" and model.get_adapter("again") is zero


def test_an_adapter_is_added_as_an_adapter_and_not_as_a_config_of_peft(model: LlamaAdapter) -> None:
    config: Any = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    for arguments in (("new", config), (config, "new"), (config,)):
        with pytest.raises((UsageError, TypeError)) as error:
            model.add_adapter(*arguments)
        assert "new_adapter(name)" in str(error.value) or len(arguments) == 1
    assert list(model.adapters) == ["first", "second"]


def test_answers_with_and_without_a_cache_are_the_same(model: LlamaAdapter) -> None:
    ids = torch.stack(random_rows(6))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **options), cached)
    assert not torch.equal(model.generate(ids, adapter="none", **options), cached)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_and_answers(dtype: torch.dtype) -> None:
    model = build_tiny_model(dtype=dtype)
    (row,) = random_rows(6)
    model(row[None], labels=row[None]).loss.backward()
    assert model.get_adapter("tiny").prompts.gates.grad.abs().max() > 0
    assert model.generate(row[None], max_new_tokens=3).shape == (1, 9)


def test_a_base_in_half_precision_with_an_adapter_in_float32_under_autocast() -> None:
    model = LlamaAdapter(build_tiny_decoder(dtype=torch.bfloat16), base="tiny-base")
    torch.nn.init.ones_(model.new_adapter("new", seed=1).prompts.gates)
    (row,) = random_rows(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(row[None], labels=row[None]).loss.backward()
    assert model.get_adapter("new").prompts.embeddings.grad.dtype == torch.float32


def test_unloading_gives_the_bare_base(model: LlamaAdapter) -> None:
    bare = logits(model, adapter="none")
    decoder = model.unload()
    assert decoder is model.decoder and list(model.adapters) == [] and model.active_adapter == "none"
    assert torch.equal(logits(decoder), bare)


def test_a_reference_stays_while_its_original_is_trained(model: LlamaAdapter) -> None:
    reference = model.reference_model()
    expected = logits(model)
    assert torch.equal(logits(reference), expected)
    with torch.no_grad():
        model.get_adapter("second").prompts.gates += 1
    assert torch.equal(logits(reference), expected) and not torch.equal(logits(model), expected)
    assert torch.equal(logits(model.reference_model("none")), logits(model, adapter="none"))
    assert isinstance(reference.get_adapter("second"), Adapter)


# --- attention and recomputation ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eager", "sdpa", "llama_adapter_eager", {"": "eager"}], ids=str)
def test_another_attention_keeps_the_adapter(model: LlamaAdapter, name: Any) -> None:
    adapted, bare = logits(model), logits(model, adapter="none")
    model.set_attn_implementation(name)
    torch.testing.assert_close(logits(model), adapted)
    torch.testing.assert_close(logits(model, adapter="none"), bare)
    output = model(torch.stack(random_rows(7)), output_attentions=True)
    assert bool(output.attentions and output.attentions[0] is not None) == ("eager" in str(name))


def test_an_attention_that_cannot_carry_prompts_is_refused(model: LlamaAdapter) -> None:
    before = logits(model)
    for name in ("flash_attention_2", "flex_attention", "paged|sdpa", {"": "sdpa", "text_config": "eager"}):
        given: Any = name
        refusal(lambda given=given: model.set_attn_implementation(given))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("spelling", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
def test_reentrant_checkpointing_is_refused(model: LlamaAdapter, spelling: str) -> None:
    enable = getattr(model, spelling)
    word = spelling.removesuffix("_enable") + "_kwargs"
    assert "use_reentrant" in refusal(lambda: enable({"use_reentrant": True}))
    assert "use_reentrant" in refusal(lambda: enable(**{word: {"use_reentrant": True}}))
    for settings in ({}, {word: None}, {word: {"use_reentrant": False}}):
        enable(**settings)
        assert model.is_gradient_checkpointing


def test_a_trainer_with_reentrant_checkpointing_is_refused(model: LlamaAdapter, tmp_path: Any) -> None:
    rows = [{"input_ids": row, "labels": row} for row in random_rows(8, 8)]
    arguments = TrainingArguments(
        str(tmp_path),
        report_to="none",
        use_cpu=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    assert "use_reentrant" in refusal(Trainer(model, arguments, train_dataset=rows).train)


# --- pipelines ----------------------------------------------------------------------------------------------


def test_a_pipeline_takes_the_model_without_complaint(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_tiny_tokenizer()
    model = build_tiny_model(tokenizer=tokenizer)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = generator("Name three colours.", max_new_tokens=5, do_sample=False)
    assert answer["generated_text"].startswith("Name three colours.")
    assert "not supported" not in caplog.text


def test_a_seed_beyond_what_a_generator_takes_is_an_error(model: LlamaAdapter) -> None:
    with pytest.raises(UsageError, match="seed: 1180591620717411303424 given"):
        model.new_adapter("seeded", seed=2**70)
    assert "seeded" not in model.adapters


# --- merging ------------------------------------------------------------------------------------------------


def test_an_adapter_is_merged_into_a_decoder_of_its_own() -> None:
    model = LlamaAdapter(build_tiny_decoder(dtype=torch.float64), base="tiny")
    adapter = model.new_adapter("lora", method="lora", seed=0)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[5, 9, 33, 7]])
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        assert torch.allclose(model.merge()(input_ids=tokens).logits, expected, atol=1e-5)
        model.new_adapter("prompts", seed=0)
        for refused in (model.merge, model.merge_and_unload):
            with pytest.raises(UsageError, match="prompts cannot be merged"):
                refused()
        merged = model.merge_and_unload(adapter_names=["lora"])
        assert torch.allclose(merged(input_ids=tokens).logits, expected, atol=1e-5)
    assert not model.adapters
    with pytest.raises(UsageError, match="there is no adapter to merge"):
        model.merge()
    with pytest.raises(UsageError, match="2 adapters given"):
        model.merge_and_unload(adapter_names=["a", "b"])

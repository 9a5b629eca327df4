"""Parts of the decoder carry the active adapter. TRL's trainers compute their loss from such parts."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llama_adapter.model import LlamaAdapter
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import build_tiny_model, padded, random_rows


@pytest.fixture
def model() -> LlamaAdapter:
    return build_tiny_model(names=("first", "second"))


# --- the backbone -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("route", ["model", "base_model", "get_decoder"])
def test_a_loss_by_parts_is_the_adapted_model_s(family: str, route: str) -> None:
    model = build_tiny_model(family)
    ids, mask = padded(random_rows(4, 7), "left")

    def by_parts() -> Tensor:
        backbone = getattr(model, route)
        backbone = backbone() if route == "get_decoder" else backbone
        head = model.get_output_embeddings()
        return head(backbone(input_ids=ids, attention_mask=mask).last_hidden_state)

    def real(logits: Tensor) -> Tensor:
        return logits[mask.bool()]

    torch.testing.assert_close(real(by_parts()), real(model(ids, attention_mask=mask).logits))
    adapted = real(by_parts())
    with model.disable_adapters():
        torch.testing.assert_close(real(by_parts()), real(model(ids, attention_mask=mask).logits))
        assert not torch.allclose(real(by_parts()), adapted, atol=1e-3)


def test_gradients_by_parts_reach_the_adapter(model: LlamaAdapter) -> None:
    (row,) = random_rows(7)
    logits = model.lm_head(model.model(row[None]).last_hidden_state)
    F.cross_entropy(logits[0, :-1], row[1:]).backward()
    by_parts = model.get_adapter("second").prompts.gates.grad
    assert by_parts is not None and by_parts.abs().max() > 0
    parts = by_parts.clone()
    model.zero_grad()
    model(row[None], labels=row[None]).loss.backward()
    torch.testing.assert_close(model.get_adapter("second").prompts.gates.grad, parts)


@torch.no_grad()
def test_the_base_model_of_peft_is_the_decoder_with_the_adapter(model: LlamaAdapter) -> None:
    ids = torch.stack(random_rows(7))
    given = model.get_base_model()
    assert isinstance(given, type(model.decoder))
    output = given(ids, labels=ids)
    expected = model(ids, labels=ids)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    bare = model.decoder(ids).logits
    assert not torch.allclose(output.logits, bare, atol=1e-3)
    with model.disable_adapters():
        assert torch.equal(given(ids).logits, bare)


@torch.no_grad()
def test_a_part_is_the_decoder_s_own_in_all_but_its_forward(model: LlamaAdapter) -> None:
    backbone, own = model.model, model.decoder.model
    assert isinstance(backbone, type(own)) and backbone.layers is own.layers
    assert set(backbone.state_dict()) == set(own.state_dict()) and backbone.config is model.config
    seen: list[int] = []
    hook = backbone.register_forward_hook(lambda *_: seen.append(1))
    ids = torch.stack(random_rows(5))
    model(ids)
    backbone(ids)
    assert len(seen) == 2
    hook.remove()
    backbone.some_setting = 3
    assert own.some_setting == 3
    expected = backbone(ids).last_hidden_state
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(twin(ids).last_hidden_state, expected)
    assert not any("model." in name for name in model.state_dict())


@torch.no_grad()
def test_an_offloaded_backbone_carries_the_adapter_too(model: LlamaAdapter) -> None:
    ids = torch.stack(random_rows(5))
    expected = model.model(ids).last_hidden_state
    cpu_offload(model.decoder, execution_device=torch.device("cpu"))
    assert model.device.type == "cpu" and model.decoder.device.type == "meta"
    torch.testing.assert_close(model.model(ids).last_hidden_state, expected)
    whole = build_tiny_model(names=("first", "second"))
    torch.testing.assert_close(model(ids).logits, whole(ids).logits)
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, do_sample=False),
        whole.generate(ids, max_new_tokens=4, do_sample=False),
    )


# --- TRL ----------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "learning_rate": 0.05,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "per_device_train_batch_size": 2,
}


def changes(model: LlamaAdapter, before: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((model.get_parameter(name) - old).abs().max()) for name, old in before.items()}


def parameters(model: LlamaAdapter) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_checkpointing": False}, {"padding_free": False, "loss_type": "dft"}], ids=str
)
def test_trl_s_sft_trains_the_adapter_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    tokenizer = build_tiny_tokenizer()
    model = build_tiny_model(tokenizer=tokenizer)
    before = parameters(model)
    rows = [{"prompt": "hi", "completion": text} for text in (" yes", " no, it is not")]
    trainer = SFTTrainer(
        model,
        args=SFTConfig(str(tmp_path), seed=0, **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        ours = model(**{name: batch[name] for name in ("input_ids", "labels", "attention_mask")})
    trainer.train()
    first = trainer.state.log_history[0]
    if settings.get("loss_type") != "dft":
        assert first["loss"] == pytest.approx(ours.loss.item(), rel=1e-3)
    assert first["grad_norm"] > 0
    for name, change in changes(model, before).items():
        assert (change > 0) == name.startswith("adapters."), name
    trainer.save_model(str(tmp_path / "final"))
    kept = LlamaAdapter(model.decoder, tokenizer)
    kept.load_adapter(tmp_path / "final")
    assert torch.equal(kept.get_adapter("final").prompts.gates, model.get_adapter("tiny").prompts.gates)


@pytest.mark.parametrize("reference", ["the start", "the bare base"])
def test_trl_s_dpo_trains_the_adapter_against_a_reference(tmp_path: Path, reference: str) -> None:
    tokenizer = build_tiny_tokenizer()
    model = build_tiny_model(tokenizer=tokenizer)
    before = parameters(model)
    pairs = [{"prompt": "hi", "chosen": " yes", "rejected": " no"}] * 4
    name = None if reference == "the start" else "none"
    other = model.reference_model(name)
    assert other.decoder is model.decoder and not any(p.requires_grad for p in other.parameters())
    trainer = DPOTrainer(
        model,
        ref_model=other,
        args=DPOConfig(str(tmp_path), seed=0, **SETTINGS),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    # At the start the policy equals its reference, so the loss is log 2.
    same = first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert same == (reference == "the start")
    assert first["grad_norm"] > 0
    for name, change in changes(model, before).items():
        assert (change > 0) == name.startswith("adapters."), name
    if reference == "the start":
        start = build_tiny_model(tokenizer=tokenizer).get_adapter("tiny")
        assert torch.equal(other.get_adapter("tiny").prompts.gates, start.prompts.gates)


def test_trl_s_dpo_without_a_reference_loads_the_bare_base(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    build_tiny_model(tokenizer=tokenizer).decoder.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = LlamaAdapter.from_base(str(tmp_path / "base"), device="cpu")
    torch.nn.init.ones_(model.new_adapter("new", seed=1).prompts.gates)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path), **SETTINGS),
        train_dataset=Dataset.from_list([{"prompt": "hi", "chosen": " yes", "rejected": " no"}] * 4),
        processing_class=tokenizer,
    )
    ids = torch.stack(random_rows(6))
    with torch.no_grad():
        torch.testing.assert_close(trainer.ref_model(ids).logits, model(ids, adapter="none").logits)

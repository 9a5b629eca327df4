"""The reserved name "auto": the adapter that sees where there is a picture, else the text adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.checkpoint import save_adapter
from llama_adapter.methods.config import ScienceQAConfig
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.surface.named_adapters import AUTO
from llama_adapter.weights.catalogue import DEFAULT_BASE, SHIPPED
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import VISION, build_tiny_decoder, build_tiny_model, random_rows

OWN = SHIPPED[DEFAULT_BASE]


@pytest.fixture
def model() -> LlamaAdapter:
    """Three adapters for text, and two that see; "auto" is chosen."""
    model = build_tiny_model(names=("first", "second"))
    for name in ("eyes", OWN.vision):
        torch.nn.init.normal_(model.new_adapter(name, vision=VISION, seed=3).prompts.gates)
    torch.nn.init.normal_(model.new_adapter(OWN.text, seed=4).prompts.gates)
    model.set_adapter(AUTO)
    return model


def pair(model: LlamaAdapter) -> tuple[str, str]:
    """Who answers without a picture, and with one."""
    return model.answering_adapter(), model.answering_adapter(AUTO, pictured=True)


def test_the_shipped_adapters_come_before_others(model: LlamaAdapter) -> None:
    assert pair(model) == (OWN.text, OWN.vision)
    assert model.active_adapter == AUTO and model.active_adapters == [OWN.text, OWN.vision]
    for name in (OWN.text, OWN.vision):
        model.delete_adapter(name)
    assert pair(model) == ("first", "eyes")
    assert model.answering_adapter("second", pictured=True) == "second"


def test_an_adapter_for_scienceqa_comes_last(model: LlamaAdapter) -> None:
    model.delete_adapter(OWN.text)
    first = model.get_adapter("first")
    first.config = replace(first.config, scienceqa=ScienceQAConfig("QCM-A"))
    assert model.answering_adapter() == "second"
    model.delete_adapter("second")
    assert model.answering_adapter() == "first"


def test_where_there_is_none_the_next_best_answers() -> None:
    model = build_tiny_model(names=("first",))
    model.set_adapter(AUTO)
    assert pair(model) == ("first", "first") and not model.sees()
    with pytest.raises(UsageError, match="'first' can't see pictures"):
        model.tower()
    model.new_adapter("eyes", vision=VISION)
    model.delete_adapter("first")
    model.set_adapter(AUTO)
    assert pair(model) == (NO_ADAPTER, "eyes")
    model.delete_adapter("eyes")
    assert model.active_adapter == NO_ADAPTER


def test_a_forward_pass_is_that_of_who_answers(model: LlamaAdapter) -> None:
    (ids,) = random_rows(7)
    features = torch.randn(1, VISION.feature_width)
    with torch.no_grad():
        text, wanted_text = (model(ids[None], adapter=name).logits for name in (None, OWN.text))
        seen, wanted_seen = (
            model(ids[None], adapter=name, image_features=features).logits for name in (AUTO, OWN.vision)
        )
    assert torch.equal(text, wanted_text) and torch.equal(seen, wanted_seen)
    options = {"max_new_tokens": 3, "do_sample": False}
    for given, name in (({}, OWN.text), ({"image_features": features}, OWN.vision)):
        assert torch.equal(
            model.generate(ids[None], **given, **options),
            model.generate(ids[None], adapter=name, **given, **options),
        )


def test_the_name_is_reserved_and_comes_back_after_a_block(model: LlamaAdapter) -> None:
    with pytest.raises(UsageError, match="'auto' is reserved"):
        model.new_adapter(AUTO)
    with model.disable_adapters():
        assert model.answering_adapter() == NO_ADAPTER
    assert model.active_adapter == AUTO
    model.set_adapter(AUTO, inference_mode=True)
    frozen = [name for name in model.adapters if not model.get_adapter(name).prompts.gates.requires_grad]
    assert sorted(frozen) == sorted([OWN.text, OWN.vision])


def test_a_name_may_have_dots(model: LlamaAdapter, tmp_path: Path) -> None:
    adapter = model.new_adapter("mine-0.5b", seed=5)
    assert model.active_adapter == "mine-0.5b" and "mine-0.5b" in list(model.adapters)
    with pytest.raises(UsageError, match="is taken"):
        model.new_adapter("mine-0_5b")
    state = model.state_dict()
    assert any(key.startswith("adapters.mine-0_5b.") for key in state)
    model.save_pretrained(tmp_path / "a.b", state_dict=state)
    model.delete_adapter("mine-0.5b")
    assert "mine-0.5b" not in model.adapters
    name = model.load_adapter(tmp_path / "a.b")
    assert name == "a.b" and dict(model.adapters.items())["a.b"] is model.get_adapter("a.b")
    for own, other in zip(adapter.parameters(), model.get_adapter("a.b").parameters(), strict=True):
        assert torch.equal(own, other)


# --- loading ------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A tiny base by the name of the default one, with its two shipped adapters."""
    tokenizer = build_tiny_tokenizer()
    decoder = build_tiny_decoder(vocab_size=len(tokenizer))
    for base in (DEFAULT_BASE, "other-base"):
        decoder.save_pretrained(tmp_path / base)
        tokenizer.save_pretrained(tmp_path / base)
    model = LlamaAdapter(decoder, tokenizer, base=DEFAULT_BASE)
    save_adapter(model.new_adapter("text"), tmp_path / OWN.text)
    save_adapter(model.new_adapter("eyes", vision=VISION), tmp_path / OWN.vision)
    return tmp_path


def test_without_arguments_the_shipped_adapters_are_loaded(weights: Path) -> None:
    model = LlamaAdapter.from_pretrained(weights=weights)
    assert list(model.adapters) == [OWN.text, OWN.vision] and model.active_adapter == AUTO
    assert model.base == DEFAULT_BASE and model.sees()
    again = LlamaAdapter.from_pretrained(AUTO, base=str(weights / DEFAULT_BASE), weights=weights)
    assert list(again.adapters) == list(model.adapters)
    (weights / OWN.vision / "llama_adapter_config.json").unlink()
    assert list(LlamaAdapter.from_pretrained(weights=weights).adapters) == [OWN.text]


def test_a_base_without_shipped_adapters_is_refused(weights: Path) -> None:
    with pytest.raises(UsageError, match="no adapter is shipped for base 'other-base'"):
        LlamaAdapter.from_pretrained(base="other-base", weights=weights)
    with pytest.raises(UsageError, match="adapter_name is 'mine'"):
        LlamaAdapter.from_pretrained(adapter_name="mine", weights=weights)

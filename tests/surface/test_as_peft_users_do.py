"""What users of PEFT's AdaptionPrompt do with a model, after PEFT's own tests, on three families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import prepare_model_for_kbit_training
from torch import Tensor
from torch.testing import assert_close

from llama_adapter.model import LlamaAdapter
from tests.tiny_models import build_tiny_decoder

IDS = torch.tensor([[3, 3, 3], [4, 3, 4]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 1]])


@pytest.fixture(params=["gpt2", "llama", "mistral"])
def decoder(request: pytest.FixtureRequest) -> Any:
    return build_tiny_decoder(request.param)


def adapted(decoder: Any) -> LlamaAdapter:
    model = LlamaAdapter(decoder, base="tiny-base")
    model.new_adapter("default", adapted_layers=2, prompt_length=4, seed=0)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS, attention_mask=MASK).logits
    return result


def train(model: LlamaAdapter) -> None:
    """Two steps, because with gates of zero the first one changes only the gates."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        optimizer.step()


def test_inputs_require_gradients_only_where_asked(decoder: Any) -> None:
    model = adapted(prepare_model_for_kbit_training(decoder, use_gradient_checkpointing=False))
    embeddings = model.get_input_embeddings()
    assert not embeddings(IDS).requires_grad
    model.enable_input_require_grads()
    assert embeddings(IDS).requires_grad
    train(model)
    assert model.get_adapter("default").prompts.gates.abs().max() > 0


def test_answers_with_a_hole_in_the_mask_by_keyword_or_position(decoder: Any) -> None:
    model = adapted(decoder)
    train(model)
    options: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), model.generate(input_ids=IDS, **options))


def test_a_sequence_of_operations(decoder: Any) -> None:
    original = logits(decoder)
    model = adapted(decoder)
    assert_close(logits(model), original, rtol=0, atol=0)
    train(model)
    default = logits(model)
    assert not torch.allclose(default, original)
    with model.disable_adapter():
        assert_close(logits(model), original, rtol=0, atol=0)

    model.new_adapter("adapter 1", adapted_layers=2, prompt_length=8, seed=1)
    assert_close(logits(model), original, rtol=0, atol=0)
    train(model)
    first = logits(model)
    assert not torch.allclose(first, original) and not torch.allclose(first, default)
    with model.disable_adapter():
        assert_close(logits(model), original, rtol=0, atol=0)
    model.set_adapter("default")
    assert_close(logits(model), default, rtol=0, atol=0)
    model.delete_adapter("default")
    assert_close(logits(model), original, rtol=0, atol=0)


def test_adapters_are_added_and_set_while_switched_off(decoder: Any) -> None:
    original = logits(decoder)
    model = adapted(decoder)
    with model.disable_adapter():
        model.new_adapter("adapter 1", adapted_layers=2, prompt_length=8, seed=1)
    assert model.active_adapter == "adapter 1"
    train(model)
    first = logits(model)
    assert not torch.allclose(first, original)
    model.set_adapter("default")
    with model.disable_adapter():
        model.set_adapter("adapter 1")
    assert_close(logits(model), first, rtol=0, atol=0)


def test_a_cache_changes_nothing(decoder: Any) -> None:
    model = adapted(decoder)
    train(model)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(IDS),
        "max_new_tokens": 4,
        "do_sample": False,
    }
    with_cache = model.generate(IDS, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("cast", [lambda model: model.to(torch.bfloat16), lambda model: model.bfloat16()])
def test_bfloat16_answers(decoder: Any, cast: Callable[[Any], Any]) -> None:
    model = cast(adapted(decoder))
    assert logits(model).isfinite().all()


def test_a_folder_holds_the_chosen_adapter_alone(decoder: Any, tmp_path: Path) -> None:
    model = adapted(decoder)
    train(model)
    expected = logits(model)
    model.new_adapter("other", adapted_layers=2, prompt_length=4)
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".md") == [
        "adapter_model.safetensors",
        "llama_adapter_config.json",
    ]
    again = LlamaAdapter(decoder, base="tiny-base")
    again.load_adapter(tmp_path, "new")
    assert_close(logits(again), expected, rtol=0, atol=0)
    own, loaded = (m.get_adapter(name).state_dict() for m, name in ((model, "default"), (again, "new")))
    assert own.keys() == loaded.keys() and all(torch.equal(own[name], loaded[name]) for name in own)

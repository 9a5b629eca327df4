"""torch.compile and torch.export work for a model with an active adapter as well as for the bare base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo import explain

from tests.tiny_models import build_tiny_decoder, build_tiny_model, random_rows

FAMILIES = ("llama", "gemma2", "gpt_neox")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.stack(random_rows(7, 7))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_adapter_breaks_no_graph_that_the_base_leaves_whole(family: str, ids: torch.Tensor) -> None:
    options: dict[str, Any] = {"use_cache": False, "attention_mask": torch.ones_like(ids)}
    base = explain(build_tiny_decoder(family))(ids, **options).graph_break_count
    torch._dynamo.reset()
    model = build_tiny_model(family)
    assert explain(model)(ids, **options).graph_break_count == base


@pytest.mark.parametrize("method", ["prompts", "prefix", "adalora"])
def test_one_graph_has_the_logits_and_gradients_of_the_model(method: str, ids: torch.Tensor) -> None:
    model = build_tiny_model("llama")
    adapter = model.get_adapter("tiny")
    if method != "prompts":
        adapter = model.new_adapter("own", method=method, adapted_layers=2, seed=1)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    expected = model(ids, use_cache=False).logits
    expected.square().mean().backward()
    gradients = [parameter.grad for parameter in adapter.parameters()]
    adapter.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    logits.square().mean().backward()
    for parameter, gradient in zip(adapter.parameters(), gradients, strict=True):
        assert gradient is not None and gradient.abs().max() > 0
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_strict_export_answers_as_the_model(ids: torch.Tensor) -> None:
    model = build_tiny_model("llama")
    program = torch.export.export(model, (ids,), {"use_cache": False}, strict=True)
    other = torch.stack(random_rows(7, 7, seed=1))
    expected = model(other, use_cache=False).logits
    torch.testing.assert_close(program.module()(other, use_cache=False).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_compiled_model_follows_the_weights_that_an_adapter_changes(ids: torch.Tensor) -> None:
    model = build_tiny_model("llama")
    adapter = model.new_adapter("own", method="full")
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=0, atol=1e-5)
        for parameter in adapter.parameters():
            parameter.add_(0.01)

"""Frozen projections by oneDNN compute what torch's do, and only where they are meant to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from llama_adapter.data.examples import Example
from llama_adapter.methods.decoder import checkpoint_activations
from llama_adapter.model import LlamaAdapter
from llama_adapter.packing import frozen_products as module
from llama_adapter.packing.frozen_products import WORTH_A_CALL, frozen_products
from llama_adapter.packing.losses import accumulate_gradient, mean_answer_loss
from tests.tiny_models import build_tiny_decoder

LARGE = (3, 40, 96, 160)  # rows, tokens, in, out: above the threshold
CPU = torch.device("cpu")
needs_both = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()),
    reason="this torch was built without MKL or without oneDNN",
)


@pytest.fixture(autouse=True, scope="module")
def processor_with_avx512() -> Iterator[None]:
    """oneDNN computes the same whatever the processor; it is only not worth while without AVX-512."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        yield


def build(width: int, out: int, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out, bias=bias).requires_grad_(False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the products that oneDNN computes."""
    made: list[tuple[int, ...]] = []
    product = module.compute_product

    def counted(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made.append((*rows.shape, weight.shape[0]))
        return product(rows, weight, bias)

    monkeypatch.setattr(module, "compute_product", counted)
    return made


@given(
    leading=st.lists(st.integers(1, 5), max_size=3),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    bias=st.booleans(),
    turned=st.booleans(),
)
def test_product_and_gradient_are_those_of_float64(
    leading: list[int], width: int, out: int, bias: bool, turned: bool
) -> None:
    """Of any shape, whatever the threshold; ``turned``: input and gradient that are not contiguous."""

    def states(size: int) -> Tensor:
        shape = (*leading, size)
        return (
            torch.randn(shape[::-1]).permute(*reversed(range(len(shape)))) if turned else torch.randn(shape)
        )

    linear = build(width, out, bias=bias)
    given_states, gradient = states(width), states(out)
    input = given_states.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch, frozen_products(linear):
        patch.setattr(module, "WORTH_A_CALL", 0)
        found = linear(input)
        (found_gradient,) = torch.autograd.grad(found, input, gradient)
        with torch.no_grad():
            assert torch.equal(linear(given_states), found)
    exact = given_states.double().requires_grad_()
    expected = linear.double()(exact)
    (expected_gradient,) = torch.autograd.grad(expected, exact, gradient.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5)


@needs_both
def test_large_products_go_to_onednn_forward_and_back(calls: list[tuple[int, ...]]) -> None:
    rows, tokens, width, out = LARGE
    linear = build(width, out, bias=True)
    input = torch.randn(rows, tokens, width, requires_grad=True)
    with frozen_products(linear):
        linear(input).square().sum().backward()
    assert calls == [(rows * tokens, width, out), (rows * tokens, out, width)]
    mine, input.grad = input.grad, None
    linear(input).square().sum().backward()
    assert len(calls) == 2, "outside the context torch computes"
    torch.testing.assert_close(mine, input.grad, rtol=1e-5, atol=1e-5)


def test_all_else_stays_with_torch(calls: list[tuple[int, ...]]) -> None:
    *leading, width, out = LARGE
    input = torch.randn(*leading, width)
    small = torch.randn(5, 8)
    assert small.numel() * 8 < WORTH_A_CALL

    class Quantised(nn.Parameter):
        pass

    quantised = build(width, out)
    quantised.weight = Quantised(quantised.weight, requires_grad=False)
    for linear, states in (
        (build(8, 8), small),
        (build(width, out).bfloat16(), input.bfloat16()),
        (build(width, out).double(), input.double()),
        (quantised, input),
    ):
        expected = linear(states)
        with frozen_products(linear):
            assert torch.equal(linear(states), expected)
    linear = build(width, out)
    with frozen_products(linear), torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(input).dtype == torch.bfloat16
    linear = build(width, out)
    with torch.backends.mkldnn.flags(enabled=False), frozen_products(linear):
        linear(input)
    assert not calls


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_weights_that_are_trained_get_their_gradient(trained: str) -> None:
    *leading, width, out = LARGE
    linear = build(width, out, bias=True)
    getattr(linear, trained).requires_grad_(True)
    with frozen_products(linear):
        linear(torch.randn(*leading, width)).sum().backward()
    assert getattr(linear, trained).grad is not None


@pytest.mark.parametrize("missing", ["mkl", "mkldnn"])
def test_a_torch_without_either_library_keeps_its_own(
    missing: str, calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    *leading, width, out = LARGE
    monkeypatch.setattr(getattr(torch.backends, missing), "is_available", lambda: False)
    linear = build(width, out)
    with frozen_products(linear):
        linear(torch.randn(*leading, width))
    assert not calls


def test_without_avx512_torch_keeps_its_own(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    *leading, width, out = LARGE
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    linear = build(width, out)
    with frozen_products(linear):
        linear(torch.randn(*leading, width))
    assert not calls


@needs_both
def test_afterwards_every_module_is_what_it_was() -> None:
    class Quantised(nn.Linear):
        pass

    decoder = nn.ModuleDict({"plain": nn.Linear(2, 2), "quantised": Quantised(2, 2), "norm": nn.LayerNorm(2)})
    types, names = [type(module) for module in decoder.values()], list(decoder.state_dict())
    with pytest.raises(KeyError), frozen_products(decoder), frozen_products(decoder):
        assert type(decoder["plain"]) is not nn.Linear
        assert [type(module) for module in decoder.values()][1:] == types[1:]
        assert list(decoder.state_dict()) == names
        raise KeyError
    assert [type(module) for module in decoder.values()] == types


@needs_both
@pytest.mark.parametrize("recomputed", [False, True])
def test_training_takes_them_and_answers_do_not(calls: list[tuple[int, ...]], recomputed: bool) -> None:
    model = LlamaAdapter(build_tiny_decoder(hidden_size=64, intermediate_size=128), base="random")
    adapter = model.new_adapter("new", prompt_length=4, seed=0)
    with torch.no_grad():
        adapter.prompts.gates.fill_(0.5)
    ids = [1 + place % 60 for place in range(300)]
    rows = [Example(ids, [-100] * 100 + ids[100:], (), 1)]
    if recomputed:
        checkpoint_activations(model.decoder)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        accumulate_gradient(model, rows, device=CPU, max_tokens=999)
        return [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]

    with torch.backends.mkldnn.flags(enabled=False):
        expected, loss = gradients(), mean_answer_loss(model, rows, device=CPU)
    model(torch.tensor([ids]))
    assert not calls
    found = gradients()
    assert calls and len(found) == len(expected) > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    before = len(calls)
    assert mean_answer_loss(model, rows, device=CPU)[0] == pytest.approx(loss[0], rel=1e-5)
    assert len(calls) > before


@needs_both
def test_other_threads_keep_torch_s_own_products(calls: list[tuple[int, ...]]) -> None:
    """While one trains another answers; and the first to leave does not stop the other."""
    linear, states = build(*LARGE[2:]), torch.randn(LARGE[:3])
    expected = linear(states)
    inside, leave = threading.Event(), threading.Event()

    def train() -> Tensor:
        with frozen_products(linear):
            inside.set()
            assert leave.wait(60)
            return linear(states)

    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train)
        assert inside.wait(60)
        assert torch.equal(linear(states), expected) and not calls
        with frozen_products(linear):
            with frozen_products(linear):
                linear(states)
            linear(states)
        assert len(calls) == 2 and torch.equal(linear(states), expected)
        leave.set()
        training.result()
    assert len(calls) == 3 and type(linear) is nn.Linear

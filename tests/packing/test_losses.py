"""Losses of packed rows: those of torch, and of the rows one at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from llama_adapter.data.examples import IGNORED, Example
from llama_adapter.packing.losses import CrossEntropy, accumulate_gradient, mean_answer_loss
from tests.packed_rows import CAT, EXAMPLES, OPENING, example, loss_one_by_one
from tests.tiny_models import VISION, build_tiny_model


@given(
    st.lists(st.lists(st.floats(-200, 200, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    st.data(),
)
def test_the_loss_and_its_gradient_are_those_of_torch(rows: list[list[float]], data: st.DataObject) -> None:
    targets = torch.tensor([data.draw(st.integers(0, 2)) for _ in rows])
    weights = torch.arange(1.0, len(rows) + 1)
    leaf = torch.tensor(rows, requires_grad=True)
    logits = leaf * 1
    losses = CrossEntropy.apply(logits, targets)
    gradient, reached = torch.autograd.grad(losses @ weights, (logits, leaf))
    exact = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(exact, targets, reduction="none")
    (expected @ weights.double()).backward()
    assert exact.grad is not None
    assert torch.allclose(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(reached.double(), exact.grad, atol=1e-5)
    assert gradient.data_ptr() == logits.data_ptr(), "an array of tokens by vocabulary was made"


def test_a_small_loss_keeps_its_digits() -> None:
    logits = torch.tensor([[200.0, 190.0]])
    expected = F.cross_entropy(logits.double(), torch.tensor([0])).item()
    assert CrossEntropy.apply(logits, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-3)


def test_the_losses_gradient_is_had_once() -> None:
    loss = CrossEntropy.apply(torch.ones(1, 3, requires_grad=True) * 1, torch.tensor([1])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    model = build_tiny_model("llama", torch.float64)
    made = []
    for max_tokens in (1000, 20):
        model.zero_grad()
        loss = accumulate_gradient(model, EXAMPLES, device=torch.device("cpu"), max_tokens=max_tokens)
        made.append(
            (loss, [p.grad.clone() for p in model.adapters["tiny"].parameters() if p.grad is not None])
        )
    (whole, expected), (parts, gradients) = made
    assert parts == pytest.approx(whole, abs=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_mean_is_over_all_tokens_of_all_rows() -> None:
    model = build_tiny_model()
    done: list[int] = []
    mean, count = mean_answer_loss(
        model, EXAMPLES, device=torch.device("cpu"), max_tokens=30, progress=done.append
    )
    assert count == sum(label != IGNORED for row in EXAMPLES for label in row.labels)
    assert mean == pytest.approx(loss_one_by_one(model, EXAMPLES).item() / count, rel=1e-5)
    assert done[-1] == len(EXAMPLES)


ASKED = [*OPENING, 30, 31]
CONTESTED = [
    replace(
        example(ASKED, [40, 41, 2], 1, (CAT,)),
        rivals=(example(ASKED, [40, 2], 1, (CAT,)), example(ASKED, [42, 43, 44, 2], 1, (CAT,))),
    ),
    example([5, 6, 7], [42, 2], 2),
    replace(example([*OPENING, 32], [43, 2], 3), rivals=(example([*OPENING, 32], [45, 2], 3),)),
]


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("max_tokens", [20, 1000])
def test_the_loss_of_a_batch_with_rivals_is_what_the_rows_alone_give(by_rows: bool, max_tokens: int) -> None:
    model = build_tiny_model("llama", torch.float64, vision=VISION)
    parameters = list(model.adapters["tiny"].parameters())
    features = {CAT: torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}

    def nats(row: Example) -> torch.Tensor:
        seen = features[CAT][None] if row.images else None
        owners = torch.zeros(1, dtype=torch.long) if row.images else None
        logits = model(torch.tensor([row.input_ids]), image_features=seen, image_owners=owners).logits
        return F.cross_entropy(logits[0, :-1], torch.tensor(row.labels[1:]), reduction="sum")

    lengths = [sum(label != IGNORED for label in row.labels) for row in CONTESTED]
    right = [nats(row) for row in CONTESTED]
    if by_rows:
        expected = torch.stack([loss / length for loss, length in zip(right, lengths, strict=True)]).mean()
    else:
        expected = torch.stack(right).sum() / sum(lengths)
    chosen = []
    for row in (CONTESTED[0], CONTESTED[2]):
        likelihoods = torch.stack([-nats(answer) for answer in (row, *row.rivals)])
        chosen.append(-torch.log(likelihoods.exp()[0] / likelihoods.exp().sum()))
    expected = expected + torch.stack(chosen).mean()

    loss = accumulate_gradient(
        model,
        CONTESTED,
        device=torch.device("cpu"),
        max_tokens=max_tokens,
        by_rows=by_rows,
        features=features,
    )
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for parameter, theirs in zip(parameters, torch.autograd.grad(expected, parameters), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, theirs, rtol=1e-4, atol=1e-6)
    if not by_rows:
        mean, count = mean_answer_loss(model, CONTESTED, device=torch.device("cpu"), features=features)
        assert mean == pytest.approx(expected.item(), rel=1e-5) and count == sum(lengths)

"""Rows packed in one sequence: the same losses and gradients as one row at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from llama_adapter.data.records import IGNORED, Example, PictureFile
from llama_adapter.methods.decoder import checkpoint_activations
from llama_adapter.methods.probe import attention_layers
from llama_adapter.packing.pack import (
    SHORTEST_OPENING,
    CrossEntropy,
    accumulate_gradient,
    answer_loss,
    mean_answer_loss,
    pack,
    split_by_tokens,
)
from tests.tiny_models import VISION, build_tiny_model

OPENING = list(range(3, 3 + SHORTEST_OPENING + 2))


def example(
    question: list[int], answer: list[int], row: int = 1, images: tuple[PictureFile, ...] = ()
) -> Example:
    return Example(question + answer, [IGNORED] * len(question) + answer, images, row)


EXAMPLES = [
    example([*OPENING, 30, 31], [40, 41, 2], 1),
    example([5, 6, 7], [42, 2], 2),
    example([*OPENING, 32], [43, 44, 45, 2], 3),
    example([*OPENING, 30, 33, 34, 35], [46, 2], 4),
]

# A row without a picture, two of one that share their opening, one of it and another.
CAT, DOG = Path("cat.png"), Path("dog.png")
SEEN = [
    example([*OPENING, 30, 31], [40, 41, 2], 1, (CAT,)),
    example([*OPENING, 30, 31], [40, 2], 2),
    example([*OPENING, 32], [43, 44, 45, 2], 3, (CAT,)),
    example([*OPENING, 30, 33], [46, 2], 4, (DOG, CAT)),
]

tokens = st.lists(st.integers(3, 63), min_size=1, max_size=6)
rows = st.builds(
    lambda opened, question, answer: example(OPENING * opened + question, answer),
    st.booleans(),
    tokens,
    tokens,
)


def loss_one_by_one(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """The summed loss by whole logits, each row alone."""
    total = torch.zeros((), dtype=torch.float64)
    for row in examples:
        logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum")
    return total


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "cohere"])
def test_equals_one_row_at_a_time(family: str) -> None:
    model = build_tiny_model(family, torch.float64)
    parameters = list(model.adapters["tiny"].parameters())
    packed = pack(EXAMPLES)
    # float64 in, float32 in the loss by design: compare at its precision
    loss = answer_loss(model, packed).sum()
    expected = loss_one_by_one(model, EXAMPLES)
    assert torch.allclose(loss.double(), expected, rtol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("image_tokens", [1, 3])
def test_rows_with_other_pictures_equal_one_row_at_a_time(image_tokens: int) -> None:
    vision = replace(VISION, image_tokens=image_tokens)
    model = build_tiny_model("llama", torch.float64, vision=vision)
    parameters = list(model.adapters["tiny"].parameters())
    generator = torch.Generator().manual_seed(0)
    features = {name: torch.randn(6, generator=generator, dtype=torch.float64) for name in (CAT, DOG)}
    packed = pack(SEEN)
    assert len(packed.pictures) == 3 and len({segment.prompts for segment in packed.segments}) == 3
    loss = answer_loss(model, packed, features=features).sum()
    expected = torch.zeros((), dtype=torch.float64)
    for row in SEEN:
        seen = torch.stack([features[name] for name in row.images]) if row.images else None
        owners = torch.zeros(len(row.images), dtype=torch.long)
        output = model(torch.tensor([row.input_ids]), image_features=seen, image_owners=owners)
        targets = torch.tensor(row.labels[1:])
        expected = expected + F.cross_entropy(output.logits[0, :-1], targets, reduction="sum")
    assert torch.allclose(loss.double(), expected, rtol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_gradient_checkpointing_computes_twice_and_gives_the_same(family: str) -> None:
    plain, checkpointed = (build_tiny_model(family, torch.float64, attention_dropout=0.5) for _ in range(2))
    checkpoint_activations(checkpointed.decoder)
    calls = []
    for number, layer in enumerate(attention_layers(checkpointed.decoder)):
        assert isinstance(layer.o_proj, torch.nn.Module)
        layer.o_proj.register_forward_hook(lambda *_, number=number: calls.append(number))
    losses = [answer_loss(model, pack(EXAMPLES)).sum() for model in (plain, checkpointed)]
    assert torch.equal(*losses) and calls == [0, 1, 2]
    gradients = [
        torch.autograd.grad(loss, list(model.adapters["tiny"].parameters()))
        for loss, model in zip(losses, (plain, checkpointed), strict=True)
    ]
    assert calls == [0, 1, 2, 2, 1], "the lowest layer is not adapted: nothing goes back through it"
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


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


def test_a_shared_opening_is_computed_once() -> None:
    packed = pack(EXAMPLES)
    alone = sum(len(row.input_ids) - 1 for row in EXAMPLES)
    assert packed.input_ids.shape[1] == alone - 2 * len(OPENING)
    assert sorted(set(packed.answers.tolist())) == [0, 1, 2, 3]
    contexts = [segment.context for segment in packed.segments]
    assert contexts.count((0, len(OPENING))) == 3 and contexts.count(None) == 2


def test_an_opening_never_takes_a_prediction_along() -> None:
    same = [example(OPENING, [40, 2], 1), example(OPENING, [40, 2], 2)]
    packed = pack(same)
    assert packed.targets.tolist() == [40, 2, 40, 2]


@given(st.lists(rows, min_size=1, max_size=6))
def test_every_label_is_predicted_from_its_predecessor(examples: list[Example]) -> None:
    packed = pack(examples)
    ids, positions = packed.input_ids[0].tolist(), packed.position_ids[0].tolist()
    assert sorted(packed.targets.tolist()) == sorted(
        label for row in examples for label in row.labels[1:] if label != IGNORED
    )
    assert [segment.start for segment in packed.segments[1:]] == [s.stop for s in packed.segments[:-1]]
    assert packed.segments[-1].stop == len(ids) == len(positions)
    restored = []
    for segment in packed.segments:
        before = [] if segment.context is None else ids[slice(*segment.context)]
        row = before + ids[segment.start : segment.stop]
        where = range(len(before), len(row))
        assert positions[segment.start : segment.stop] == list(where)
        restored.append(row)
    for row in examples:
        assert row.input_ids[:-1] in restored


@given(st.lists(rows, max_size=12), st.integers(1, 60))
def test_splitting_loses_no_row_and_keeps_the_budget(examples: list[Example], budget: int) -> None:
    runs = list(split_by_tokens(examples, budget))
    assert [row for run in runs for row in run] == examples
    for run in runs:
        assert len(run) == 1 or sum(len(row.input_ids) - 1 for row in run) <= budget


def test_the_mean_is_over_all_tokens_of_all_rows() -> None:
    model = build_tiny_model()
    done: list[int] = []
    mean, count = mean_answer_loss(
        model, EXAMPLES, device=torch.device("cpu"), max_tokens=30, progress=done.append
    )
    assert count == sum(label != IGNORED for row in EXAMPLES for label in row.labels)
    assert mean == pytest.approx(loss_one_by_one(model, EXAMPLES).item() / count, rel=1e-5)
    assert done[-1] == len(EXAMPLES)


def test_what_follows_the_last_label_is_left_out() -> None:
    cut = replace(EXAMPLES[1], labels=[IGNORED, IGNORED, IGNORED, 42, IGNORED])
    assert pack([cut]).input_ids.tolist() == [[5, 6, 7]]


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


# --- losses -------------------------------------------------------------------------------------------------

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


def test_answers_to_one_question_share_all_of_it_among_others_with_the_same_opening() -> None:
    rows = [
        example([*OPENING, 30, 31], [40, 2], 1),
        example([*OPENING, 30, 32, 33], [41, 2], 2),
        example([*OPENING, 30, 31], [42, 43, 2], 3),
    ]
    packed = pack(rows)
    alone = sum(len(row.input_ids) - 1 for row in rows)
    assert packed.input_ids.shape[1] == alone - (len(OPENING) + 1), "all but the question's last token"
    assert packed.answers.tolist() == [0, 0, 2, 2, 2, 1, 1]

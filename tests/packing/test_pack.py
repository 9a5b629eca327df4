"""Rows packed in one sequence: the same losses and gradients as one row at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from llama_adapter.data.examples import IGNORED, Example
from llama_adapter.methods.decoder import checkpoint_activations
from llama_adapter.methods.prepared import attention_layers
from llama_adapter.packing.losses import answer_loss
from llama_adapter.packing.pack import pack, split_by_tokens
from tests.packed_rows import CAT, DOG, EXAMPLES, OPENING, SEEN, example, loss_one_by_one, rows
from tests.tiny_models import VISION, build_tiny_model


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


def test_what_follows_the_last_label_is_left_out() -> None:
    cut = replace(EXAMPLES[1], labels=[IGNORED, IGNORED, IGNORED, 42, IGNORED])
    assert pack([cut]).input_ids.tolist() == [[5, 6, 7]]


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

"""Rows that join and leave a batch between tokens: each is answered as if it were alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama_adapter.decoding.batch import Batch, Row
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.decoding.streams import stream_tokens
from llama_adapter.methods.prompts import Prompts
from llama_adapter.methods.state import AdapterState, merge_states
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from tests.tiny_models import FAMILIES, VISION, build_tiny_model, random_rows

GREEDY = Sampling(temperature=0)
ADAPTERS = ("one", "two", "many", "eyes", "tuned", NO_ADAPTER)


def build(family: str = "llama") -> LlamaAdapter:
    """Two adapters of one shape, one with more prompts in more layers, one that sees, one with scales."""
    model = build_tiny_model(family, names=("one", "two"), eos_token_id=None)
    model.new_adapter("many", prompt_length=5, adapted_layers=3, seed=7)
    model.new_adapter("eyes", prompt_length=3, adapted_layers=1, vision=VISION, seed=8)
    tuned = model.new_adapter("tuned", prompt_length=3, adapted_layers=2, method="prompts+scales", seed=9)
    torch.nn.init.normal_(tuned.scales.values, std=0.3, generator=torch.Generator().manual_seed(9))
    for seed, name in enumerate(("many", "eyes", "tuned")):
        torch.nn.init.normal_(
            model.get_adapter(name).prompts.gates, generator=torch.Generator().manual_seed(seed)
        )
    return model


@pytest.fixture(scope="module")
def model() -> LlamaAdapter:
    return build()


def prompts_of(model: LlamaAdapter, name: str, colour: int = 0) -> AdapterState:
    if name != "eyes":
        return model.project(name)
    features = torch.full((1, VISION.feature_width), float(colour))
    return model.project(name, image_features=features, image_owners=torch.zeros(1, dtype=torch.long))


def alone(
    model: LlamaAdapter, question: Tensor, state: AdapterState, sampling: Sampling, count: int
) -> list[int]:
    stream = stream_tokens(partial(model, adapter=state), question[None], sampling, ())
    return [token for _, token in zip(range(count), stream, strict=False)]


def empty(model: LlamaAdapter) -> Batch:
    return Batch(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_every_family_answer_as_alone(family: str) -> None:
    """Answers longer than a sliding window, with all kinds of prompts."""
    model = build(family)
    batch = empty(model)
    said: dict[Row, list[int]] = {}
    expected = []
    asked = []
    for question, name in zip(random_rows(5, 9, 3, 7, 4, 6), ADAPTERS, strict=True):
        asked.append((question[None], prompts_of(model, name, 3), GREEDY))
        expected.append(alone(model, question, asked[-1][1], GREEDY, 8))
    for row in (batch.join(*asked[0]), *batch.join_together(asked[1:5]), batch.join(*asked[5])):
        said[row] = [int(row.token)]
    for _ in range(7):
        batch.step()
        for row in said:
            said[row].append(int(row.token))
    assert list(said.values()) == expected
    assert len({tuple(tokens) for tokens in expected}) >= 4  # gemma 2 repeats itself


samplings = st.one_of(
    st.just(GREEDY),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.5, 1.5]),
        top_p=st.sampled_from([0.5, 0.9, 1.0]),
        top_k=st.sampled_from([0, 5]),
        repetition_penalty=st.sampled_from([1.0, 1.4]),
        seed=st.integers(0, 3),
    ),
)
answers = st.tuples(
    st.integers(1, 12),  # tokens of the question
    st.sampled_from(ADAPTERS),
    samplings,
    st.integers(0, 6),  # the step at which it joins
    st.integers(1, 9),  # tokens of the answer
)


@settings(max_examples=60, deadline=None)
@given(st.lists(answers, min_size=1, max_size=6))
def test_rows_may_come_and_go_whenever_they_like(
    model: LlamaAdapter, asked: list[tuple[int, str, Sampling, int, int]]
) -> None:
    questions = random_rows(*(length for length, *_ in asked), seed=len(asked))
    prompts = [prompts_of(model, name, number) for number, (_, name, *_) in enumerate(asked)]
    batch = empty(model)
    rows: dict[int, Row] = {}
    said: dict[int, list[int]] = {}
    for step in range(6 + 9):
        joining = [number for number, (*_, joins, _) in enumerate(asked) if joins == step]
        if joining:
            newcomers = [(questions[number][None], prompts[number], asked[number][2]) for number in joining]
            for number, row in zip(joining, batch.join_together(newcomers), strict=True):
                rows[number], said[number] = row, [int(row.token)]
        ended = [number for number in rows if len(said[number]) == asked[number][-1]]
        batch.leave(*(rows.pop(number) for number in ended))
        if rows:
            batch.step()
            for number, row in rows.items():
                said[number].append(int(row.token))
    for number, (_, _, sampling, _, count) in enumerate(asked):
        assert said[number] == alone(model, questions[number], prompts[number], sampling, count)


def test_a_batch_is_as_wide_as_its_longest_row(model: LlamaAdapter) -> None:
    batch = empty(model)
    long, short = (batch.join(row[None], model.project(NO_ADAPTER), GREEDY) for row in random_rows(20, 4))
    batch.step()
    assert batch.cache.get_seq_length() == 21
    batch.leave(long)
    assert batch.cache.get_seq_length() == 5
    assert batch.rows == [short]
    batch.leave(short)
    assert batch.rows == [] and batch.cache.get_seq_length() == 0


def test_equal_rows_need_no_mask(model: LlamaAdapter) -> None:
    seen: list[dict[str, Any]] = []

    def forward(**kwargs: Any) -> Any:
        seen.append(kwargs)
        return model(**kwargs)

    batch = Batch(forward)
    for row in random_rows(6, 6):
        batch.join(row[None], model.project(NO_ADAPTER), GREEDY)
    batch.step()
    assert not {"attention_mask", "position_ids"} & set(seen[-1])
    assert not seen[-1]["adapter"].parts


def test_a_newcomer_that_fails_leaves_the_others_as_they_were(model: LlamaAdapter) -> None:
    first, second = random_rows(6, 8)
    batch = empty(model)
    row = batch.join(first[None], model.project("one"), GREEDY)
    said = [int(row.token)]
    tensors = model.project("many").parts[Prompts]
    wrong = AdapterState(3, {Prompts: {name: tensor[..., :-1] for name, tensor in tensors.items()}})
    with pytest.raises(RuntimeError):
        batch.join(second[None], wrong, GREEDY)
    for _ in range(4):
        batch.step()
        said.append(int(row.token))
    assert said == alone(model, first, model.project("one"), GREEDY, 5)


def test_prompts_of_all_kinds_become_one_batch(model: LlamaAdapter) -> None:
    bare, one, many = (model.project(name) for name in (NO_ADAPTER, "one", "many"))
    assert not merge_states([bare, bare]).parts
    assert merge_states([one, one]) is one, "rows with the same share it"
    assert set(merge_states([one, bare, one]).parts[Prompts]) == {"keys", "values"}
    merged = merge_states([one, bare, many]).parts[Prompts]
    assert merged["keys"].shape == merged["values"].shape == (3, 3, 4, 5, 8)
    mask = [[True] * 3 + [False] * 2, [True] * 5, [True] * 5]
    assert merged["mask"].transpose(0, 1).tolist() == [mask] * 3
    assert merged["keys"][0, 1:, :, :3].equal(one.parts[Prompts]["keys"][0])
    assert merged["values"][2].equal(many.parts[Prompts]["values"][0])
    assert merged["values"][1].abs().max() == merged["values"][0, 0].abs().max() == 0


def test_prompts_that_only_fill_up_change_nothing(model: LlamaAdapter) -> None:
    """In a batch with a wider row, a row gets the logits that it gets alone."""
    (ids,) = random_rows(7)
    with torch.no_grad():
        for name in ("one", NO_ADAPTER):
            expected = model(ids[None], adapter=name).logits
            merged = merge_states([model.project(name), model.project("many")])
            found = model(torch.stack([ids, ids]), adapter=merged).logits
            torch.testing.assert_close(found[:1], expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                found[1:], model(ids[None], adapter="many").logits, rtol=1e-5, atol=1e-5
            )

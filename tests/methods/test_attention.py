"""The gated attention, compared with the equations in `tests.reference`."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from llama_adapter.common.errors import UsageError
from llama_adapter.methods import packed_attention
from llama_adapter.methods.attention import (
    PREFIX,
    gated_attention,
    project_prompts,
    register,
)
from llama_adapter.methods.packed_attention import (
    Segment,
    attend,
    attend_own_prompts,
    attend_own_prompts_padded,
    attend_packed,
    segment_positions,
)
from llama_adapter.methods.prepared import attention_layers
from llama_adapter.methods.prompts import Prompts
from llama_adapter.model import LlamaAdapter
from tests.reference import gated_heads, plain_llama_logits, read, use_exact_norms
from tests.tiny_models import build_tiny_model, padded, random_rows

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def model() -> LlamaAdapter:
    return build_tiny_model("llama", names=("first", "second"))


def plain_logits(model: LlamaAdapter, row: Tensor) -> Tensor:
    adapter = model.adapters[model.active_adapter]
    return plain_llama_logits(model.decoder, row, adapter.prompts.embeddings, adapter.prompts.gates)


# --- the whole decoder against the equations ----------------------------------------------------------------


def test_logits_are_those_of_the_equations(model: LlamaAdapter) -> None:
    (row,) = random_rows(11)
    expected = plain_logits(model, row)
    torch.testing.assert_close(model(row[None]).logits[0], expected, **CLOSE)
    base = model(row[None], adapter="none").logits[0]
    assert (base - expected).abs().max() > 0.1, "the prompts must matter for this test to mean anything"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_row(model: LlamaAdapter, side: str) -> None:
    rows = random_rows(5, 9, 7)
    ids, mask = padded(rows, side)
    logits = model(ids, attention_mask=mask).logits
    for row, real, row_logits in zip(rows, mask.bool(), logits, strict=True):
        torch.testing.assert_close(row_logits[real], plain_logits(model, row), **CLOSE)


@pytest.mark.parametrize("projected", [False, True], ids=["live", "projected"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_with_a_cache_each_token_has_the_logits_of_the_whole_row(
    model: LlamaAdapter, side: str, projected: bool
) -> None:
    rows = random_rows(8, 11)
    new = 4
    adapter = model.project() if projected else None
    ids, mask = padded([row[:-new] for row in rows], side)
    output = model(ids, attention_mask=mask, use_cache=True, adapter=adapter)
    for step in range(new):
        ids = torch.stack([row[len(row) - new + step] for row in rows])[:, None]
        mask = F.pad(mask, (0, 1), value=1)
        output = model(ids, attention_mask=mask, past_key_values=output.past_key_values, adapter=adapter)
        for row, logits in zip(rows, output.logits[:, -1], strict=True):
            torch.testing.assert_close(logits, plain_logits(model, row)[len(row) - new + step], **CLOSE)


def test_gradients_are_those_of_the_equations() -> None:
    model = build_tiny_model("llama", torch.float64)
    use_exact_norms(model.decoder)
    adapter = model.adapters["tiny"]
    (row,) = random_rows(10)

    # The loss of transformers would round to float32.
    F.cross_entropy(model(row[None]).logits[0, :-1], row[1:]).backward()

    prompts = adapter.prompts.embeddings.detach().clone().requires_grad_()
    gates = adapter.prompts.gates.detach().clone().requires_grad_()
    logits = plain_llama_logits(model.decoder, row, prompts, gates)
    F.cross_entropy(logits[:-1], row[1:]).backward()
    for ours, plain in ((adapter.prompts.embeddings, prompts), (adapter.prompts.gates, gates)):
        assert plain.grad is not None and plain.grad.abs().max() > 1e-3
        torch.testing.assert_close(ours.grad, plain.grad, rtol=0, atol=1e-8)


def test_at_gate_zero_the_prompts_have_no_gradient_but_the_gates_have() -> None:
    model = build_tiny_model("llama", names=())
    adapter = model.new_adapter("untrained", seed=0)
    (row,) = random_rows(6)
    model(row[None], labels=row[None]).loss.backward()
    assert torch.equal(adapter.prompts.embeddings.grad, torch.zeros_like(adapter.prompts.embeddings))
    assert (adapter.prompts.gates.grad != 0).all()


def test_nothing_outside_the_adapter_gets_a_gradient() -> None:
    model = build_tiny_model("llama", names=("idle", "trained"))
    (row,) = random_rows(6)
    model(row[None], labels=row[None]).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"adapters.trained.prompts.embeddings", "adapters.trained.prompts.gates"}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"adapters.{name}.prompts.{own}" for name in ("idle", "trained") for own in ("embeddings", "gates")
    }


def test_two_threads_with_two_adapters_on_one_decoder_do_not_meet(model: LlamaAdapter) -> None:
    (row,) = random_rows(12)
    with torch.no_grad():
        alone = {name: model(row[None], adapter=name).logits for name in ("first", "second", "none")}
    assert not torch.equal(alone["first"], alone["second"])
    wrong: list[str] = []
    start = threading.Barrier(len(alone))

    @torch.no_grad()
    def work(name: str) -> None:
        start.wait()
        for _ in range(30):
            if not torch.equal(model(row[None], adapter=name).logits, alone[name]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_eager_attention_gives_the_same_and_its_weights_are_the_base_s() -> None:
    sdpa = build_tiny_model("llama")
    eager = build_tiny_model("llama", attn_implementation="eager")
    assert eager.config._attn_implementation == PREFIX + "eager"
    ids = torch.stack(random_rows(7, 7))
    output = eager(ids, output_attentions=True)
    torch.testing.assert_close(output.logits, sdpa(ids).logits, **CLOSE)
    assert len(output.attentions) == 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 4, 7))


# --- its parts ----------------------------------------------------------------------------------------------


def random_tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_attend_is_softmax_attention_with_the_scores_capped(softcap: float | None) -> None:
    query, keys, values = random_tensors((1, 1, 5, 8), (1, 1, 3, 8), (1, 1, 3, 8))
    mask = torch.ones(5, 3, dtype=torch.bool).tril()
    expected = read(query[0, 0], keys[0, 0], values[0, 0], mask, 0.4, softcap)
    output = attend(query, keys, values, scaling=0.4, mask=mask, softcap=softcap)
    torch.testing.assert_close(output[0, 0], expected)


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_a_token_that_sees_no_prompt_gets_nothing_from_them(softcap: float | None) -> None:
    query, keys, values = random_tensors((1, 2, 2, 8), (1, 2, 3, 8), (1, 2, 3, 8))
    mask = torch.tensor([[True, True, False], [False, False, False]])
    output = attend(query, keys, values, scaling=1.0, mask=mask, softcap=softcap)
    assert torch.equal(output[:, :, 1], torch.zeros(1, 2, 8))
    assert (output[:, :, 0] != 0).all()


def test_prompt_keys_have_no_rotary_embedding_and_the_gate_is_in_the_values(model: LlamaAdapter) -> None:
    layer: Any = attention_layers(model.decoder)[1]
    prompts, gate = random_tensors((1, 3, 32), (4,))
    keys, values = project_prompts(layer, prompts, gate)
    plain_keys = (prompts[0] @ layer.k_proj.weight.T).reshape(3, 2, 8)
    plain_values = (prompts[0] @ layer.v_proj.weight.T).reshape(3, 2, 8)
    for head in range(4):
        torch.testing.assert_close(keys[0, head], plain_keys[:, head // 2])
        torch.testing.assert_close(values[0, head], torch.tanh(gate[head]) * plain_values[:, head // 2])


def test_projected_prompts_are_what_the_layers_would_compute(model: LlamaAdapter) -> None:
    adapter = model.adapters["second"]
    live, projected = adapter.state(), model.project("second")
    assert not projected.parts[Prompts]["keys"].requires_grad
    lowest, *adapted = attention_layers(model.decoder)
    assert live.prompts_of(lowest) is projected.prompts_of(lowest) is None
    for layer in adapted:
        ours, theirs = projected.prompts_of(layer), live.prompts_of(layer)
        assert ours is not None and theirs is not None and ours[2] is theirs[2] is None
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


class FixedPrompts:
    """Prompts with keys and values that a test provides."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.tensors = keys, values, None

    def keys_of(self, attention: torch.nn.Module) -> None:
        return None

    def prompts_of(self, attention: torch.nn.Module) -> tuple[Tensor, Tensor, None]:
        return self.tensors


# --- packed rows --------------------------------------------------------------------------------------------

PACKED = (Segment(0, 3), Segment(3, 8, context=(0, 3)), Segment(8, 12, context=(0, 3)), Segment(12, 18))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize(("call_in_pairs", "calls"), [(0, 4), (40, 3), (10**6, 1)])
def test_packed_rows_read_what_they_would_alone(
    window: int | None,
    softcap: float | None,
    call_in_pairs: int,
    calls: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_attention, "CALL_IN_PAIRS_CPU", call_in_pairs)
    monkeypatch.setattr(
        packed_attention, "calls_of", packed_attention.calls_of.__wrapped__
    )  # without its cache
    assert len(packed_attention.calls_of(PACKED, window, torch.bool, torch.device("cpu"))) == calls
    query, key, value = random_tensors((1, 4, 18, 8), (1, 2, 18, 8), (1, 2, 18, 8))
    packed = attend_packed(query, key, value, PACKED, scaling=0.5, softcap=softcap, sliding_window=window)
    for segment in PACKED:
        context = range(*segment.context) if segment.context else range(0)
        places = [*context, *range(segment.start, segment.stop)]
        q, k, v = (t[0][:, places] for t in (query, key, value))
        alone = gated_heads(q, k, v, None, None, None, scale=0.5, softcap=softcap, window=window)
        torch.testing.assert_close(packed[0, :, segment.start : segment.stop], alone[:, len(context) :])


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=12), st.integers(0, 2000))
def test_rows_share_a_call_while_little_is_computed_in_vain(
    drawn: list[tuple[int, bool]], call_in_pairs: int
) -> None:
    lengths = [length for length, _ in drawn]
    context = [0 if shares else index for index, (_, shares) in enumerate(drawn)]
    calls = list(packed_attention.groups(lengths, context, call_in_pairs))
    assert [index for together in calls for index in together] == list(range(len(lengths)))

    def pairs(together: list[int]) -> int:
        seen = {*together, *(context[index] for index in together)}
        return sum(lengths[index] for index in together) * sum(lengths[index] for index in seen)

    def in_vain(together: list[int]) -> int:
        return pairs(together) - sum(pairs([index]) for index in together)

    for together, following in itertools.pairwise([*calls, []]):
        assert in_vain(together) <= call_in_pairs
        assert not following or in_vain([*together, following[0]]) > call_in_pairs


def test_the_positions_of_packed_rows_start_where_their_context_ends() -> None:
    expected = [[0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]]
    assert segment_positions(PACKED).tolist() == expected


def test_rows_cannot_be_packed_where_the_attention_has_sinks(model: LlamaAdapter) -> None:
    layer = attention_layers(model.decoder)[0]
    (states,) = random_tensors((1, 4, 18, 8))
    with pytest.raises(UsageError, match="s_aux"):
        gated_attention("sdpa", layer, states, states, states, None, segments=PACKED, s_aux=torch.zeros(4))


# --- registration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_the_stock_mask_comes_with_the_gated_attention(stock: str) -> None:
    name = register(stock)
    assert "flash" not in name and "/" not in name
    assert name in AttentionInterface() and register(stock) == name
    assert AttentionMaskInterface()[name] is AttentionMaskInterface()[stock]


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_each_packed_row_reads_its_own_prompts(model: LlamaAdapter, softcap: float | None) -> None:
    layer = attention_layers(model.decoder)[0]
    sets = (1, 1, 0, 2)
    segments = tuple(replace(segment, prompts=row) for segment, row in zip(PACKED, sets, strict=True))
    query, key, value = random_tensors((1, 4, 18, 8), (1, 2, 18, 8), (1, 2, 18, 8))
    keys, values = random_tensors((3, 4, 5, 8), (3, 4, 5, 8))

    def attention(prompts: FixedPrompts | None) -> Tensor:
        options = {"scaling": 0.5, "softcap": softcap, "segments": segments, "adapter": prompts}
        return gated_attention("sdpa", layer, query, key, value, None, **options)[0]

    own = attention(FixedPrompts(keys, values))
    for segment, row in zip(segments, sets, strict=True):
        places = slice(segment.start, segment.stop)
        same = attention(FixedPrompts(keys[row : row + 1], values[row : row + 1]))
        torch.testing.assert_close(own[:, places], same[:, places])
        assert not torch.allclose(own[:, places], attention(None)[:, places])


# Rows of several lengths, two of them behind the opening of the first; which prompt set each segment reads.
OPENED = (
    Segment(0, 6),
    Segment(6, 7, context=(0, 6)),
    Segment(7, 12, context=(0, 6)),
    Segment(12, 14),
    Segment(14, 23),
    Segment(23, 24, context=(14, 23)),
)
SETS = [
    (0, 0, 0, 1, 2, 2),  # as in a pack: an opening and its rows read the same
    (2, 2, 2, 0, 1, 1),
    (0, 1, 0, 1, 0, 1),  # no set's tokens lie together
    (3, 3, 3, 3, 0, 0),  # sets that nothing reads
    (1, 1, 1, 1, 1, 1),
]


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("sets", SETS)
def test_own_prompts_are_read_alike_in_one_padded_call(
    sets: tuple[int, ...], scaling: float | None, softcap: float | None
) -> None:
    segments = tuple(replace(segment, prompts=row) for segment, row in zip(OPENED, sets, strict=True))
    shapes = ((1, 4, 24, 8), (4, 4, 5, 8), (4, 4, 5, 8), (1, 4, 24, 8))
    *states, weights = (tensor.double() for tensor in random_tensors(*shapes))
    results = []
    for function in (attend_own_prompts, attend_own_prompts_padded):
        query, keys, values = (tensor.clone().requires_grad_() for tensor in states)
        output = function(query, keys, values, segments, scaling=scaling, softcap=softcap)
        (output * weights).sum().backward()
        results.append((output.detach(), query.grad, keys.grad, values.grad))
    for one, other in zip(*results, strict=True):
        assert one is not None and one.abs().max() > 0.01
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)


def test_a_training_can_follow_an_evaluation_of_the_same_rows() -> None:
    segments = (Segment(0, 2), Segment(2, 7, prompts=1))  # of no other test: what is computed of them is kept
    query, keys, values = random_tensors((1, 2, 7, 8), (2, 2, 3, 8), (2, 2, 3, 8))
    with torch.inference_mode():
        before = attend_own_prompts_padded(query, keys, values, segments, scaling=None, softcap=None)
    query.requires_grad_()
    after = attend_own_prompts_padded(query, keys, values, segments, scaling=None, softcap=None)
    after.sum().backward()
    assert torch.equal(before, after) and query.grad is not None

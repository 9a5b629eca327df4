"""How far prompts move an answer, compared with a plain computation layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama_adapter.answering.influence import effective_gates, measure_influence
from llama_adapter.common.errors import UsageError
from llama_adapter.data.templates import Turn, encode_dialogues
from llama_adapter.methods.packed_attention import attend
from llama_adapter.methods.prepared import attention_layers
from llama_adapter.methods.prompts import Prompts
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from tests.scripted import open_eyes
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import VISION, build_tiny_model

TURNS = (Turn("user", "Hello?"), Turn("assistant", "Hi."), Turn("user", "Name a colour."))


@pytest.fixture(scope="module")
def model() -> LlamaAdapter:
    model = build_tiny_model(
        names=("one",), tokenizer=build_tiny_tokenizer(), vision=VISION, max_position_embeddings=512
    )
    open_eyes(model)
    return model


@torch.no_grad()
def plainly(model: LlamaAdapter, answer: str, features: Tensor | None) -> Tensor:
    """(L, T): the prompts' part, computed from each layer's own queries; the rest is the tokens' part."""
    question = model.encode_question(TURNS)
    dialogue = [[*TURNS, Turn("assistant", answer)]]
    ((ids, _),) = encode_dialogues(dialogue, model.template(), model.tokenizer)  # type: ignore[arg-type]
    owners = None if features is None else torch.zeros(len(features), dtype=torch.long)
    state = model.project(image_features=features, image_owners=owners)
    prompts = state.parts[Prompts]
    hidden: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
    outputs: dict[int, Tensor] = {}
    layers = attention_layers(model.decoder)

    def before(layer, args, kwargs):  # type: ignore[no-untyped-def]
        hidden[layer.layer_idx] = kwargs["hidden_states"], kwargs["position_embeddings"]

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    for index, layer in enumerate(layers):
        hooks.append(
            layer.o_proj.register_forward_pre_hook(  # type: ignore[union-attr,operator]
                lambda _, args, index=index: outputs.__setitem__(index, args[0])
            )
        )
    model(torch.tensor([ids]), adapter=state)
    for hook in hooks:
        hook.remove()
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    first = len(layers) - prompts["keys"].shape[1]
    shares = []
    for index in range(first, len(layers)):
        layer = layers[index]
        states, (cos, sin) = hidden[index]
        query = layer.q_proj(states).unflatten(-1, (4, 8)).transpose(1, 2)  # type: ignore[operator]
        query, _ = apply_rotary_pos_emb(query, query, cos, sin)
        keys, values = (tensor[:, index - first] for tensor in prompts.values())
        part = attend(query, keys, values, scaling=8**-0.5).transpose(1, 2).flatten(2)
        share = part.norm(dim=-1) / (outputs[index] - part).norm(dim=-1)
        shares.append(share[0, len(question) - 1 : -1])
    return torch.stack(shares)


@pytest.mark.parametrize("seen", [False, True])
def test_shares_are_those_of_a_plain_computation(model: LlamaAdapter, seen: bool) -> None:
    features = torch.rand(2, VISION.feature_width) if seen else None
    found = measure_influence(model, TURNS, "It is blue.", features=features)
    expected = plainly(model, "It is blue.", features)
    assert found.shares.shape == (2, len(found.tokens)) == expected.shape
    torch.testing.assert_close(found.shares, expected, rtol=1e-4, atol=1e-5)
    assert found.first_layer == 1
    assert "".join(found.tokens).startswith("It is blue.")


def test_with_gates_of_zero_nothing_moves(model: LlamaAdapter) -> None:
    model.new_adapter("untrained", prompt_length=3, seed=0)
    try:
        assert measure_influence(model, TURNS, "Blue.", adapter="untrained").shares.abs().max() == 0
        assert effective_gates(model, "untrained").abs().max() == 0
    finally:
        model.delete_adapter("untrained")
        model.set_adapter("one")


def test_the_gates_are_those_that_multiply(model: LlamaAdapter) -> None:
    gates = effective_gates(model, "one")
    assert gates.shape == (2, 4)
    torch.testing.assert_close(gates, model.get_adapter("one").prompts.gates.detach().tanh())


def test_a_long_answer_is_cut(model: LlamaAdapter) -> None:
    found = measure_influence(model, TURNS, "blue " * 100, max_tokens=10)
    assert len(found.tokens) == found.shares.shape[1] == 10


@pytest.mark.parametrize(("adapter", "answer"), [(NO_ADAPTER, "Blue."), ("one", ""), ("nobody", "Blue.")])
def test_what_cannot_be_looked_at_is_told(model: LlamaAdapter, adapter: str, answer: str) -> None:
    with pytest.raises(UsageError):
        measure_influence(model, TURNS, answer, adapter=adapter)

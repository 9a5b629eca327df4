"""Changes to the decoder itself that would make an adapter do or learn nothing are errors."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama

from llama_adapter.common.errors import UsageError
from llama_adapter.model import LlamaAdapter
from tests.tiny_models import build_tiny_decoder, build_tiny_model, random_rows


@pytest.mark.parametrize(
    "switch",
    [
        lambda model: model.decoder.set_attn_implementation("eager"),
        lambda model: model.model.set_attn_implementation("sdpa"),
        lambda model: setattr(model.config, "_attn_implementation", "eager"),
    ],
)
def test_an_attention_that_reads_no_prompts_is_an_error(switch: Callable[[Any], None]) -> None:
    model = build_tiny_model()
    ids = torch.stack(random_rows(7))
    bare = model(ids, adapter="none").logits
    switch(model)
    for use in (model, model.model, model.get_base_model()):
        with pytest.raises(UsageError, match="reads no prompts"):
            use(ids)
    torch.testing.assert_close(model(ids, adapter="none").logits, bare)
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(model(ids).logits, bare, atol=1e-3)


def test_reentrant_recomputation_set_on_the_decoder_is_an_error() -> None:
    model = build_tiny_model().train()
    (row,) = random_rows(7)
    model.decoder.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UsageError, match="use_reentrant=True"):
        model(row[None], labels=row[None])
    with torch.no_grad():
        model(row[None])
    model.activation_checkpointing_enable()
    model(row[None], labels=row[None]).loss.backward()
    assert model.get_adapter("tiny").prompts.gates.grad.abs().max() > 0


# --- attention that was replaced ----------------------------------------------------------------------------


def plain_attention(
    self: Any, hidden_states: torch.Tensor, position_embeddings: Any, attention_mask: Any = None, **_: Any
) -> Any:
    """A forward such as patches like FlashAttention's give to a layer: it does not know prompts."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key, value = (
        projection(hidden_states).view(shape).transpose(1, 2)
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
    output, _ = AttentionInterface()["sdpa"](
        self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0
    )
    return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), None


class PlainLayer(nn.Module):
    """A layer that passes no keywords to its attention."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor, **keywords: Any) -> Any:
        return self.layer(hidden_states, **{name: keywords[name] for name in keywords if name != "adapter"})


def patch_class(model: LlamaAdapter, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modeling_llama.LlamaAttention, "forward", plain_attention)


def patch_one_layer(model: LlamaAdapter, patch: pytest.MonkeyPatch) -> None:
    attention: Any = model.decoder.model.layers[1].self_attn
    attention.forward = functools.partial(plain_attention, attention)


def replace_attention(model: LlamaAdapter, patch: pytest.MonkeyPatch) -> None:
    decoder = build_tiny_decoder("llama")
    model.decoder.model.layers[1].self_attn = copy.deepcopy(decoder.model.layers[1].self_attn)


def replace_layer(model: LlamaAdapter, patch: pytest.MonkeyPatch) -> None:
    model.decoder.model.layers[1] = PlainLayer(model.decoder.model.layers[1])


@pytest.mark.parametrize("change", [patch_class, patch_one_layer, replace_attention, replace_layer])
def test_an_attention_that_was_replaced_is_an_error(
    change: Callable[[LlamaAdapter, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny_model()
    ids = torch.stack(random_rows(7))
    bare = model(ids, adapter="none").logits
    change(model, monkeypatch)
    layer = 0 if change is patch_class else 1
    for _ in range(2):
        with pytest.raises(UsageError, match=f"layer {layer} of the decoder reads no prompts"):
            model(ids)
    assert model(ids, adapter="none").logits.shape == bare.shape


def test_a_forward_that_was_wrapped_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny_model()
    ids = torch.stack(random_rows(7))
    expected = model(ids).logits
    calls: list[int] = []
    original = modeling_llama.LlamaAttention.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.layer_idx)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", counted)
    layers = model.shape.num_layers
    for passes in (2, 3, 4):  # the check is made in one of them
        torch.testing.assert_close(model(ids).logits, expected)
        assert len(calls) == passes * layers


# --- nothing trained ----------------------------------------------------------------------------------------


def test_reentrant_checkpointing_wrapped_by_hand_is_an_error() -> None:
    model = build_tiny_model().train()
    (row,) = random_rows(7)

    def recomputed(forward: Callable[..., Any], hidden_states: torch.Tensor, **keywords: Any) -> Any:
        return checkpoint(functools.partial(forward, **keywords), hidden_states, use_reentrant=True)

    for layer in model.decoder.model.layers:
        layer.forward = functools.partial(recomputed, layer.forward)
    with pytest.raises(UsageError, match="gives the adapter no gradients"):
        model(row[None], labels=row[None], use_cache=False)
    with torch.no_grad():
        model(row[None], labels=row[None], use_cache=False)
    model(row[None], adapter="none", use_cache=False)
    # With gradients at its input, the first pass is recorded and the second one gives the adapter's
    # gradients.
    model.enable_input_require_grads()
    model(row[None], labels=row[None], use_cache=False).loss.backward()
    assert model.get_adapter("tiny").prompts.gates.grad.abs().max() > 0


def test_a_decoder_that_computes_without_gradients_is_an_error() -> None:
    model = build_tiny_model()
    (row,) = random_rows(7)
    model.decoder.forward = torch.no_grad()(model.decoder.forward)
    with pytest.raises(UsageError, match="gives the adapter no gradients"):
        model(row[None])
    model.set_requires_grad("tiny", False)
    model(row[None])


# --- offloaded by accelerate --------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [("tiny",), ()])
def test_offloading_adapters_and_all_is_refused(adapters: tuple[str, ...]) -> None:
    model = build_tiny_model(names=adapters) if adapters else LlamaAdapter(build_tiny_decoder("llama"))
    ids = torch.stack(random_rows(7))
    expected = model(ids).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    uses: list[Callable[[], Any]] = [
        lambda: model(ids),
        lambda: model(ids, adapter="none"),
        lambda: model.generate(ids, max_new_tokens=2),
        lambda: model.new_adapter("other"),
    ]
    for use in uses:
        with pytest.raises(UsageError, match=r"cpu_offload\(model\.decoder\)"):
            use()
    rest = build_tiny_model(names=adapters) if adapters else LlamaAdapter(build_tiny_decoder("llama"))
    cpu_offload(rest.decoder, execution_device=torch.device("cpu"))
    torch.testing.assert_close(rest(ids).logits, expected)
    tokens = rest.generate(ids, max_new_tokens=2)
    remove_hook_from_submodules(rest.decoder)
    assert torch.equal(rest.generate(ids, max_new_tokens=2), tokens)

"""The gated adaptation prompts of LLaMA-Adapter, as an attention function of transformers.

Every attention layer of most decoders in transformers calls the function that is registered under its
``attn_implementation``, with the queries and keys as they enter the softmax. The whole method is one such
function: it calls the stock one and adds, in the adapted layers, what the queries read from the prompts
(arXiv 2303.16199, eq. 4-8, with two separate softmaxes as eq. 7 scales them apart):

    tokens  = softmax(q k^T * s) v
    prompts = softmax(q (W_k P)^T * s) (W_v P)
    out     = tokens + tanh(g_h) * prompts

What a forward pass tells its layers travels as one keyword argument through the decoder, never as state on
modules: two threads, beams, mixed batches and recomputation in backward would break on state.

Shapes: B rows, T tokens, L adapted layers, H heads, G key-value heads, K prompts, R sets of prompts,
d head width, D hidden size; of a key, S places of the cache, else S scales and biases of a layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.keys_and_values import KeysAndValues
from llama_adapter.methods.packed_attention import Segment, attend, attend_own_prompts, attend_packed

PREFIX = "llama_adapter_"  # no "flash" and no "/" in it: transformers reads meaning into both
STOCK = ("sdpa", "eager")  # the implementations that can be wrapped
FORM = "llama_adapter_form"  # the attribute of an attention layer that holds its `AttentionForm`
# The scales and biases of the layer that is computing, (1 or B, 1, width) each; see `methods.tuning`.
TUNING: ContextVar[tuple[Tensor, ...] | None] = ContextVar("tuning", default=None)


class Prompts(Protocol):
    """What an adapted layer asks for: its prompts' keys and values, the gate already in the values; and its
    projections' scales and biases."""

    @property
    def first_layer(self) -> int:
        """Index of the lowest adapted layer; all above it are adapted."""
        ...

    @property
    def mask(self) -> Tensor | None:
        """(R, K), False for what only fills up a batch whose rows have more or fewer; None: there is none."""
        ...

    def of_layer(self, attention: nn.Module) -> tuple[Tensor, Tensor]:
        """Keys and gated values for the decoder's layer ``attention``, each (R, H, K, d): R is 1 where all
        tokens read the same prompts, else B, or in a packed sequence what its segments count to."""
        ...

    def tuning_of_layer(self, index: int) -> Tensor | None:
        """The scales and biases of the decoder's layer of this index, (1 or B, S); None: it has none."""
        ...


@dataclass(frozen=True)
class LivePrompts:
    """Prompts that each layer projects itself, with gradients: for training.

    ``W_k P`` is computed inside the layer's own forward, where a sharded layer's weights are gathered.
    """

    prompts: Tensor  # (R, L, K, D)
    gates: Tensor  # (L, H), before tanh
    first_layer: int
    mask: Tensor | None = None
    tuning: Tensor | None = None  # (L, S)

    def of_layer(self, attention: nn.Module) -> tuple[Tensor, Tensor]:
        index = layer_index(attention) - self.first_layer
        prompts, gates = self._of_all_layers
        return project_prompts(attention, prompts[index], gates[index])

    @cached_property
    def _of_all_layers(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Both cut once: a cut a layer would have a gradient as large as all layers together, each."""
        return self.prompts.unbind(1), self.gates.unbind(0)

    def tuning_of_layer(self, index: int) -> Tensor | None:
        if self.tuning is None or index < self.first_layer:
            return None
        return self._tuning_of_all_layers[index - self.first_layer]

    @cached_property
    def _tuning_of_all_layers(self) -> tuple[Tensor, ...]:
        assert self.tuning is not None
        return self.tuning[:, None].unbind(0)


@dataclass(frozen=True)
class ProjectedPrompts:
    """Prompts whose keys and values were computed beforehand, once for a whole generation."""

    keys: Tensor  # (R, L, H, K, d)
    values: Tensor  # (R, L, H, K, d), times tanh(gate)
    first_layer: int
    mask: Tensor | None = None  # (R, K)
    tuning: Tensor | None = None  # (R, L, S)

    def of_layer(self, attention: nn.Module) -> tuple[Tensor, Tensor]:
        index = layer_index(attention) - self.first_layer
        return self.keys[:, index], self.values[:, index]

    def tuning_of_layer(self, index: int) -> Tensor | None:
        if self.tuning is None or index < self.first_layer:
            return None
        return self.tuning[:, index - self.first_layer]


@dataclass(frozen=True)
class AttentionForm:
    """What the probe found out about an attention layer of a decoder.

    Attributes:
        keys_and_values: how it computes them.
        window: how many tokens back a token sees, itself included; None: all.
        chunk: how long the chunks are outside of which it sees nothing; None: there are none.
        unpackable: why rows cannot be packed for it; None: they can.
    """

    keys_and_values: KeysAndValues
    window: int | None = None
    chunk: int | None = None
    unpackable: str | None = None


def attention_form(attention: nn.Module) -> AttentionForm:
    """The form of a layer of a prepared decoder."""
    form: AttentionForm = getattr(attention, FORM)
    return form


def layer_index(attention: nn.Module) -> int:
    return int(attention.layer_idx)  # type: ignore[arg-type]


def project_prompts(attention: nn.Module, prompts: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """``W_k P`` and ``tanh(g) * W_v P`` by the layer's own frozen weights, without rotary embedding.

    Args:
        attention: a layer of a prepared decoder.
        prompts: (B, K, D).
        gate: (H,), before tanh.

    Returns:
        keys and gated values, each (B, H, K, d). Folding the gate into the values saves one multiplication a
        token and changes nothing else: the softmax is linear in them.
    """
    tuning = TUNING.set(None)
    try:
        form = attention_form(attention)
        keys, values = form.keys_and_values.of(attention, prompts.to(compute_dtype(attention)))
    finally:
        TUNING.reset(tuning)
    repeats = gate.shape[-1] // keys.shape[1]
    keys = keys.repeat_interleave(repeats, dim=1)
    values = values.repeat_interleave(repeats, dim=1)
    return keys, values * torch.tanh(gate)[:, None, None].to(values.dtype)


def compute_dtype(attention: nn.Module) -> torch.dtype:
    """The dtype in which the layer computes (a quantised projection's weight has another)."""
    projection = attention.get_submodule(attention_form(attention).keys_and_values.steps[0].module)
    declared = getattr(projection, "compute_dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    candidates = [
        getattr(projection, "weight", None),
        getattr(projection, "bias", None),
        *attention.parameters(),
        *attention.buffers(),
    ]
    for tensor in candidates:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.itemsize > 1:
            return tensor.dtype
    return torch.get_default_dtype()


def gated_attention(
    stock: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    prompts: Prompts | None = None,
    segments: tuple[Segment, ...] | None = None,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The stock attention plus the gated prompts; without ``prompts`` exactly the stock one.

    Args:
        query: (B, H, T, d). key, value: (B, G, S, d), after rotary embedding and cache.
        prompts: what the adapted layers read, or None.
        segments: the rows of a packed sequence (B = 1), in place of ``attention_mask``.
        observe: gets, from every adapted layer, its index and the two parts of its output, (B, T, H, d) each:
            what was read from the tokens, and what from the prompts, gated.

    Returns:
        (B, T, H, d) and the attention weights where the stock function gives them.
    """
    softcap = kwargs.get("softcap")
    weights = None
    dtype = query.dtype
    if segments is None:
        attention = _stock_function(stock, module)
        output, weights = attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    else:
        form = attention_form(module)
        unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
        reason = f"its attention uses {unknown[0]}" if unknown else form.unpackable
        if reason is not None:
            raise UsageError(f"rows cannot be packed for this decoder: {reason}")
        if query.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
            # On CPUs sdpa's backward takes four times as long in bfloat16, on rows of 20 tokens.
            query, key, value = query.float(), key.float(), value.float()
        packed = attend_packed(
            query,
            key,
            value,
            segments,
            scaling=scaling,
            softcap=softcap,
            sliding_window=form.window,
            chunk=form.chunk,
        )
        output = packed.transpose(1, 2).contiguous()  # as the stock functions give it: some families view it
    if prompts is None or layer_index(module) < prompts.first_layer:
        return output.to(dtype), weights
    keys, values = (states.to(query.dtype) for states in prompts.of_layer(module))
    if segments is None or keys.shape[0] == 1:
        rows = query.shape[0]
        if keys.shape[0] != rows:
            keys, values = keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)
        mask = None if prompts.mask is None else prompts.mask[:, None, None]
        gated = attend(query, keys, values, scaling=scaling, mask=mask, softcap=softcap)
    else:
        gated = attend_own_prompts(query, keys, values, segments, scaling=scaling, softcap=softcap)
    gated = gated.transpose(1, 2)
    if observe is not None:
        observe(layer_index(module), output, gated)
    return (output + gated).to(dtype), weights


def _stock_function(stock: str, module: nn.Module) -> Any:
    if stock != "eager":
        return AttentionInterface()[stock]
    # The eager function is not registered: each family has its own, beside its layers.
    return sys.modules[type(module).__module__].eager_attention_forward


def register(stock: str) -> str:
    """Register the gated form of a stock implementation with transformers; returns its name."""

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return gated_attention(stock, module, *args, **kwargs)

    name = PREFIX + stock
    AttentionInterface.register(name, attention)
    # Without its mask function a custom implementation gets no mask at all, and padding is silently ignored.
    AttentionMaskInterface.register(name, AttentionMaskInterface()[stock])
    return name

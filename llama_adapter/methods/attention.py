"""The gated adaptation prompts of LLaMA-Adapter, as an attention function of transformers.

In most decoders of transformers every attention layer calls the function registered under its
``attn_implementation``, with queries and keys ready for the softmax. The whole method is one such function.
It calls the stock function and, in adapted layers, adds what the queries read from the prompts (arXiv
2303.16199, eq. 4-8; there are two separate softmaxes, since eq. 7 scales their scores separately):

    tokens  = softmax(q k^T * s) v
    prompts = softmax(q (W_k P)^T * s) (W_v P)
    out     = tokens + tanh(g_h) * prompts

Everything that a forward pass tells its layers travels through the decoder as one keyword argument, never as
state on modules. State would break with two threads, beams, mixed batches, and recomputation in the backward
pass.

Shapes: B rows, T tokens, H heads, G key-value heads, K prompts, R prompt sets, S positions of the cache, d
head
    width, D hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.computing import nothing_acting
from llama_adapter.methods.keys_and_values import KeysAndValues
from llama_adapter.methods.packed_attention import Segment, attend, attend_own_prompts, attend_packed

PREFIX = "llama_adapter_"  # must not contain "flash" or "/", which have a meaning for transformers
STOCK = ("sdpa", "eager")  # the implementations that can be wrapped
FORM = "llama_adapter_form"  # the attribute of an attention layer that holds its `AttentionForm`


class PromptSource(Protocol):
    """Where attention gets the prompts of its layer. `llama_adapter.methods.state.AdapterState` is one."""

    def prompts_of(self, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys and gated values, (R, H, K, d) each, and a mask, (R, K), False at padding, or None.

        R is 1 if all tokens read the same prompts, else B, or in a packed sequence the number of its prompt
        sets. Returns None for a layer without prompts.
        """
        ...

    def keys_of(self, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys and values before those of the tokens, (R, G, K, d) each, and a mask, (R, K), or None.

        The mask is False at padding. Returns None for a layer without a prefix.
        """
        ...


@dataclass(frozen=True)
class AttentionForm:
    """What the probe found out about an attention layer of a decoder.

    Attributes:
        keys_and_values: how the layer computes keys and values.
        window: how many tokens back a token sees, including itself; None: all.
        chunk: the length of the chunks; a token sees only its own chunk. None: there are no chunks.
        unpackable: why rows can't be packed for this layer; None: they can.
    """

    keys_and_values: KeysAndValues
    window: int | None = None
    chunk: int | None = None
    unpackable: str | None = None


def attention_form(attention: nn.Module) -> AttentionForm:
    """The `AttentionForm` of a layer of a prepared decoder."""
    form: AttentionForm = getattr(attention, FORM)
    return form


def layer_index(attention: nn.Module) -> int:
    return int(attention.layer_idx)  # type: ignore[arg-type]


def is_sharded(module: nn.Module) -> bool:
    """Whether processes share the module's weights (FSDP2). They are then whole only in a forward pass."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def project_prompts(attention: nn.Module, prompts: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """``W_k P`` and ``tanh(g) * W_v P``, by the layer's own frozen weights, without rotary embedding.

    Args:
        attention: a layer of a prepared decoder.
        prompts: (B, K, D).
        gate: (H,), before tanh.

    Returns:
        keys and gated values, (B, H, K, d) each. The softmax is linear in the values, so the gate can be
        multiplied into them. This saves one multiplication for each token.
    """
    with nothing_acting():  # parts that act on tokens, such as LoRA, do not act on prompts
        form = attention_form(attention)
        keys, values = form.keys_and_values.of(attention, prompts.to(compute_dtype(attention)))
    repeats = gate.shape[-1] // keys.shape[1]
    keys = keys.repeat_interleave(repeats, dim=1)
    values = values.repeat_interleave(repeats, dim=1)
    return keys, values * torch.tanh(gate)[:, None, None].to(values.dtype)


def compute_dtype(attention: nn.Module) -> torch.dtype:
    """The dtype in which the layer computes. The weight of a quantized projection has another one."""
    projection = attention.get_submodule(attention_form(attention).keys_and_values.steps[0].module)
    declared = getattr(projection, "compute_dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    weight = getattr(projection, "weight", None)
    if isinstance(weight, Tensor) and _computes(weight):
        return weight.dtype
    others = (tensor for tensor in (*attention.parameters(), *attention.buffers()) if _computes(tensor))
    return next((tensor.dtype for tensor in others), torch.get_default_dtype())


def _computes(tensor: Tensor) -> bool:
    """Whether the tensor's dtype is one to compute in. Integer and one-byte dtypes are for storage only."""
    return tensor.is_floating_point() and tensor.itemsize > 1


def gated_attention(
    stock: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    adapter: PromptSource | None = None,
    segments: tuple[Segment, ...] | None = None,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The stock attention, plus the gated prompts, with a prefix before its tokens. Without ``adapter`` it is
    exactly the stock attention.

    Args:
        query: (B, H, T, d).
        key, value: (B, G, S, d), after rotary embedding and cache.
        adapter: where the layers get their prompts, or None.
        segments: the rows of a packed sequence (B = 1). They take the place of ``attention_mask``.
        observe: called in every adapted layer with its index and the two parts of its output, (B, T, H, d)
            each: what was read from the tokens, and what was read from the prompts, gated.

    Returns:
        (B, T, H, d), and the attention weights if the stock function gives them, those of a prefix first.
    """
    softcap = kwargs.get("softcap")
    weights = None
    dtype = query.dtype
    prefix = None if adapter is None else adapter.keys_of(module)
    if prefix is not None and kwargs.get("position_bias") is not None:
        raise UsageError(
            "a prefix has no position, and this decoder's attention depends on positions (position_bias); "
            "choose another method, such as prompts"
        )
    if segments is None:
        if prefix is not None:
            causal = stock == "sdpa" and _is_causal(module, kwargs.get("is_causal"))
            key, value, attention_mask = _behind_prefix(
                query, key, value, attention_mask, prefix, causal=causal
            )
        attention = _stock_function(stock, module)
        output, weights = attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    else:
        form = attention_form(module)
        unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
        reason = f"its attention uses {unknown[0]}" if unknown else form.unpackable
        if reason is not None:
            raise UsageError(f"rows cannot be packed for this decoder: {reason}")
        if query.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
            # On CPUs the backward pass of sdpa takes four times as long in bfloat16 for rows of 20 tokens.
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
            prefix=None if prefix is None else (prefix[0].to(key.dtype), prefix[1].to(value.dtype)),
        )
        output = packed.transpose(1, 2).contiguous()  # as stock functions do: some families use view() on it
    added = None if adapter is None else adapter.prompts_of(module)
    if added is None:
        return output.to(dtype), weights
    keys, values = (states.to(query.dtype) for states in added[:2])
    mask = added[2]
    if segments is None or keys.shape[0] == 1:
        rows = query.shape[0]
        if keys.shape[0] != rows:
            keys, values = keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)
        if mask is not None:
            mask = mask[:, None, None]
        gated = attend(query, keys, values, scaling=scaling, mask=mask, softcap=softcap)
    else:
        gated = attend_own_prompts(query, keys, values, segments, scaling=scaling, softcap=softcap)
    gated = gated.transpose(1, 2)
    if observe is not None:
        observe(layer_index(module), output, gated)
    return (output + gated).to(dtype), weights


def _is_causal(module: nn.Module, asked: bool | None) -> bool:
    """Whether sdpa without a mask hides later tokens. The rule is that of transformers' own function."""
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def _behind_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prefix: tuple[Tensor, Tensor, Tensor | None],
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask of a call with a prefix before the tokens. All queries see the prefix.

    Args:
        mask: (B or 1, H or 1, T, S): bool, or numbers to add to the scores. None: every query sees all keys,
            or with ``causal`` those up to its own position.
        prefix: keys and values, (R, G, K, d) each, and a mask, (R, K), or None.
    """
    rows, _, length, _ = query.shape
    keys, values = (states.to(key.dtype).expand(rows, -1, -1, -1) for states in prefix[:2])
    there = prefix[2]
    if mask is None and causal and length > 1:
        # sdpa would align queries and keys at their first positions, where the keys now have the prefix.
        mask = query.new_ones(length, key.shape[2], dtype=torch.bool).tril()[None, None]
    elif mask is None and there is not None:
        mask = query.new_ones(1, 1, length, key.shape[2], dtype=torch.bool)
    if mask is not None:
        if there is None:
            there = torch.ones(1, keys.shape[2], dtype=torch.bool, device=mask.device)
        if mask.dtype != torch.bool:
            added = torch.zeros(there.shape, dtype=mask.dtype, device=mask.device)
            there = added.masked_fill(~there, torch.finfo(mask.dtype).min)
        sets = max(len(mask), len(there))
        front = there[:, None, None].expand(sets, mask.shape[1], length, -1)
        mask = torch.cat([front, mask.expand(sets, -1, -1, -1)], dim=-1)
    return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2), mask


def _stock_function(stock: str, module: nn.Module) -> Any:
    if stock != "eager":
        return AttentionInterface()[stock]
    # Eager functions are not registered: each family has its own in the module of its layers.
    return sys.modules[type(module).__module__].eager_attention_forward


def register(stock: str) -> str:
    """Register the gated form of a stock implementation with transformers. Returns its name."""

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return gated_attention(stock, module, *args, **kwargs)

    name = PREFIX + stock
    AttentionInterface.register(name, attention)
    # Without a mask function, a custom implementation gets no mask, and padding is silently ignored.
    AttentionMaskInterface.register(name, AttentionMaskInterface()[stock])
    return name

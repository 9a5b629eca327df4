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

Shapes: B rows, T tokens, H heads, G key-value heads, K prompts, R sets of prompts, S places of the cache, d
    head width, D hidden size.
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

PREFIX = "llama_adapter_"  # no "flash" and no "/" in it: transformers reads meaning into both
STOCK = ("sdpa", "eager")  # the implementations that can be wrapped
FORM = "llama_adapter_form"  # the attribute of an attention layer that holds its `AttentionForm`


class PromptSource(Protocol):
    """What attention asks for the prompts of its layer; `llama_adapter.methods.state.AdapterState` is one."""

    def prompts_of(self, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys and gated values, (R, H, K, d) each, and a mask, (R, K), False at padding, or None.

        R is 1 where all tokens read the same prompts, else B, or in a packed sequence what its segments
        count to. None where the layer has no prompts.
        """
        ...

    def keys_of(self, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys and values in front of the tokens', (R, G, K, d) each, and a mask, (R, K), or None.

        The mask is False at padding. None where the layer has no prefix.
        """
        ...


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


def is_sharded(module: nn.Module) -> bool:
    """Whether processes share its weights out (FSDP2), so that they are whole only within a forward pass."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


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
    with nothing_acting():  # what parts do to tokens leaves the prompts alone
        form = attention_form(attention)
        keys, values = form.keys_and_values.of(attention, prompts.to(compute_dtype(attention)))
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
    weight = getattr(projection, "weight", None)
    if isinstance(weight, Tensor) and _computes(weight):
        return weight.dtype
    others = (tensor for tensor in (*attention.parameters(), *attention.buffers()) if _computes(tensor))
    return next((tensor.dtype for tensor in others), torch.get_default_dtype())


def _computes(tensor: Tensor) -> bool:
    """Whether products are computed in its dtype; weights are only stored in whole numbers or one byte."""
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
    """The stock attention plus the gated prompts, with a prefix in front of its tokens; without ``adapter``
    exactly the stock one.

    Args:
        query: (B, H, T, d). key, value: (B, G, S, d), after rotary embedding and cache.
        adapter: what the layers' prompts are asked of, or None.
        segments: the rows of a packed sequence (B = 1), in place of ``attention_mask``.
        observe: gets, from every adapted layer, its index and the two parts of its output, (B, T, H, d) each:
            what was read from the tokens, and what from the prompts, gated.

    Returns:
        (B, T, H, d) and the attention weights where the stock function gives them, those of a prefix first.
    """
    softcap = kwargs.get("softcap")
    weights = None
    dtype = query.dtype
    prefix = None if adapter is None else adapter.keys_of(module)
    if prefix is not None and kwargs.get("position_bias") is not None:
        raise UsageError(
            "a prefix has no position, and this decoder weighs keys by theirs (position_bias); choose "
            "another method, such as prompts"
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
            prefix=None if prefix is None else (prefix[0].to(key.dtype), prefix[1].to(value.dtype)),
        )
        output = packed.transpose(1, 2).contiguous()  # as the stock functions give it: some families view it
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
    """Whether sdpa hides later tokens where it is given no mask, as transformers' function decides it."""
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
    """Keys, values and mask of a call with a prefix in front, which all queries see.

    Args:
        mask: (B or 1, H or 1, T, S), bool or what is added to the scores; None: all are seen, or with
            ``causal`` those up to the query.
        prefix: keys and values, (R, G, K, d) each, and a mask, (R, K), or None.
    """
    rows, _, length, _ = query.shape
    keys, values = (states.to(key.dtype).expand(rows, -1, -1, -1) for states in prefix[:2])
    there = prefix[2]
    if mask is None and causal and length > 1:
        # sdpa counts queries and keys from the first one, which would no longer be the first token's.
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

"""The method written out from its equations, slowly and without the library, for comparison.

It computes one row at a time without padding or cache, each head separately, and each softmax by its
definition. `PlainDecoder` uses a family's own layers and replaces their attention. `plain_llama_logits` uses
only the weights.

Shapes: T tokens, L adapted layers, H heads, G key-value heads, K prompts, d head width, D hidden size.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

NAME = "plain_reference"


def read(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """softmax(q k^T s) v for one head: query (T, d), keys and values (S, d), visible (T, S)."""
    scores = (query @ keys.T) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.exp(scores - scores.max(dim=1, keepdim=True).values) * visible
    return (weights / weights.sum(dim=1, keepdim=True)) @ values


def gated_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_keys: Tensor | None,
    prompt_values: Tensor | None,
    gate: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """out = tokens + tanh(g_h) * prompts: query (H, T, d), keys and values (G, T or K, d) -> (H, T, d)."""
    length = query.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < (window or length))
    outputs = []
    for head in range(query.shape[0]):
        group = head * key.shape[0] // query.shape[0]
        out = read(query[head], key[group], value[group], visible, scale, softcap)
        if prompt_keys is not None and prompt_values is not None and gate is not None:
            seen = torch.ones(length, prompt_keys.shape[1], dtype=torch.bool)
            prompts = read(query[head], prompt_keys[group], prompt_values[group], seen, scale, softcap)
            out = out + torch.tanh(gate[head]) * prompts
        outputs.append(out)
    return torch.stack(outputs)


def split_heads(states: Tensor, width: int) -> Tensor:
    """(T, H * d) -> (H, T, d)."""
    return torch.stack(states.split(width, dim=1))


# --- any family ---------------------------------------------------------------------------------------------


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states / torch.sqrt((states * states).mean(-1, keepdim=True) + eps) * weight


def normalised_prompt_keys(family: str, layer: Any, keys: Tensor, width: int) -> Tensor:
    """(K, G * d) -> (G, K, d), with the family's normalisation of keys."""
    if family == "olmo2":
        return split_heads(rms_norm(keys, layer.k_norm.weight, layer.k_norm.variance_epsilon), width)
    heads = split_heads(keys, width)
    if family == "qwen3":
        return rms_norm(heads, layer.k_norm.weight, layer.k_norm.variance_epsilon)
    if family == "nanochat":
        return rms_norm(heads, torch.ones(()), layer.k_norm.eps)
    if family == "hunyuan_v1_dense":
        norm = layer.key_layernorm
        return rms_norm(heads, norm.weight, norm.variance_epsilon)
    if family == "gemma3_text":
        return rms_norm(heads, 1 + layer.k_norm.weight, layer.k_norm.eps)
    if family == "cohere" and layer.use_qk_norm:
        centred = heads - heads.mean(-1, keepdim=True)
        weight = layer.k_norm.weight[:, None]
        return (
            centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + layer.k_norm.variance_epsilon) * weight
        )
    assert not hasattr(layer, "k_norm"), f"write down how {family} normalises its keys"
    return heads


def plain_keys_and_values(family: str, layer: Any, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts (K, D) -> their keys and values, (G, K, d), by the family's own layers, not rotated."""

    def product(linear: Any, states: Tensor = prompts) -> Tensor:
        weight = linear.weight if type(linear).__name__ == "Conv1D" else linear.weight.T
        return states @ weight + (0 if linear.bias is None else linear.bias)

    if family == "deepseek_v3":
        latent, rotated = product(layer.kv_a_proj_with_mqa).split([10, 8], dim=1)
        norm = layer.kv_a_layernorm
        heads = split_heads(
            product(layer.kv_b_proj, rms_norm(latent, norm.weight, norm.variance_epsilon)), 10
        )
        # The even columns of the rotated part come first, and all heads share it.
        rotated = torch.cat((rotated[:, 0::2], rotated[:, 1::2]), dim=1).expand(len(heads), -1, -1)
        return torch.cat((heads[..., :6], rotated), dim=2), heads[..., 6:]
    width = layer.head_size if family == "gpt_neox" else layer.head_dim
    if family == "gpt2":
        _, keys, values = product(layer.c_attn).chunk(3, dim=1)
    elif family == "gpt_bigcode":
        _, keys, values = product(layer.c_attn).split([32, width, width], dim=1)
    elif family == "phi3":
        _, keys, values = product(layer.qkv_proj).split([32, 16, 16], dim=1)
    elif family == "gpt_neox":  # query, key and value of each head are neighbours
        parts = product(layer.query_key_value).unflatten(1, (-1, 3, width))
        keys, values = parts[:, :, 1].flatten(1), parts[:, :, 2].flatten(1)
    else:
        keys, values = product(layer.k_proj), product(layer.v_proj)
    return normalised_prompt_keys(family, layer, keys, width), split_heads(values, width)


def plain_attention(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for one row: (1, H, T, d) -> (1, T, H, d)."""
    prompt_keys = prompt_values = gate = None
    if layer.plain_prompts is not None:
        prompts, gate = layer.plain_prompts
        prompt_keys, prompt_values = plain_keys_and_values(layer.config.model_type, layer, prompts)
    window = kwargs.get("sliding_window")
    if layer.config.model_type == "phimoe":  # its layers do not know the config
        window = layer.config.sliding_window
    output = gated_heads(
        query[0],
        key[0],
        value[0],
        prompt_keys,
        prompt_values,
        gate,
        scale=scaling,
        softcap=kwargs.get("softcap"),
        window=window,
    )
    return output.transpose(0, 1)[None], None


AttentionInterface.register(NAME, plain_attention)


class PlainDecoder:
    """A copy of a decoder of any family with prompts (L, K, D) and gates (L, H) in its top L layers."""

    def __init__(self, decoder: PreTrainedModel, prompts: Tensor, gates: Tensor) -> None:
        self.decoder = copy.deepcopy(decoder)
        self.decoder.set_attn_implementation(NAME)
        self.prompts = prompts.detach().clone().requires_grad_()
        self.gates = gates.detach().clone().requires_grad_()
        layers: list[Any] = [
            m
            for m in self.decoder.modules()
            if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")
        ]
        for index, layer in enumerate(layers):
            adapted = index - (len(layers) - len(prompts))
            layer.plain_prompts = (self.prompts[adapted], self.gates[adapted]) if adapted >= 0 else None

    def __call__(self, row: Tensor) -> Tensor:
        """Token ids (T,) -> logits (T, V)."""
        return self.decoder(input_ids=row[None], use_cache=False).logits[0]


# --- Llama, from the weights alone -------------------------------------------------------------------------


def plain_llama_logits(decoder: PreTrainedModel, row: Tensor, prompts: Tensor, gates: Tensor) -> Tensor:
    """Token ids (T,) -> logits (T, V), with prompts (L, K, D) and gates (L, H) in the top L layers."""
    config, weights = decoder.config, decoder.state_dict()
    width = config.head_dim
    hidden = weights["model.embed_tokens.weight"][row]
    for index in range(config.num_hidden_layers):
        layer = {
            name.removeprefix(f"model.layers.{index}."): weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{index}.")
        }
        wk, wv = layer["self_attn.k_proj.weight"], layer["self_attn.v_proj.weight"]
        normed = rms_norm(hidden, layer["input_layernorm.weight"], config.rms_norm_eps)
        adapted = index - (config.num_hidden_layers - len(prompts))
        heads = gated_heads(
            rotate(split_heads(normed @ layer["self_attn.q_proj.weight"].T, width), config),
            rotate(split_heads(normed @ wk.T, width), config),
            split_heads(normed @ wv.T, width),
            split_heads(prompts[adapted] @ wk.T, width) if adapted >= 0 else None,
            split_heads(prompts[adapted] @ wv.T, width) if adapted >= 0 else None,
            gates[adapted] if adapted >= 0 else None,
            scale=width**-0.5,
        )
        joined = torch.cat(list(heads), dim=1)
        hidden = hidden + joined @ layer["self_attn.o_proj.weight"].T
        normed = rms_norm(hidden, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = normed @ layer["mlp.gate_proj.weight"].T, normed @ layer["mlp.up_proj.weight"].T
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ layer["mlp.down_proj.weight"].T
    return rms_norm(hidden, weights["model.norm.weight"], config.rms_norm_eps) @ weights["lm_head.weight"].T


def rotate(heads: Tensor, config: Any) -> Tensor:
    """Rotary embedding of (H, T, d) at positions 0..T-1. Angles are in float32, as in transformers."""
    half = heads.shape[2] // 2
    speeds = config.rope_parameters["rope_theta"] ** -(torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(heads.shape[1], dtype=torch.float32)[:, None] * speeds
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=2)


def use_exact_norms(decoder: nn.Module) -> None:
    """Let a decoder's RMS norms compute in its own dtype: transformers' float32 would reduce float64."""
    for module in decoder.modules():
        if type(module).__name__.endswith("RMSNorm"):
            weight, eps = module.weight, module.variance_epsilon
            assert isinstance(weight, Tensor) and isinstance(eps, float)
            module.forward = lambda states, weight=weight, eps=eps: rms_norm(states, weight, eps)

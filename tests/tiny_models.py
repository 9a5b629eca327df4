"""Tiny random decoders and adapters that the tests share: built in milliseconds, the same every time."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llama_adapter.config import AdapterConfig, DecoderShape
from llama_adapter.model import LlamaAdapter

# For adapters that need no decoder.
SHAPE = DecoderShape(
    family="llama",
    num_layers=8,
    hidden_size=64,
    num_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=100,
)
CONFIG = AdapterConfig(base="base", shape=SHAPE, adapted_layers=6, prompt_length=10)

# What is particular to a family, set so that it matters in a decoder of width 32 and a row of ten tokens.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 5},
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 5},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "cohere": {"use_qk_norm": True, "logit_scale": 1.0},
    "starcoder2": {"sliding_window": 4},
}


def build_tiny_decoder(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    vocab_size: int = 64,
    **settings: Any,
) -> PreTrainedModel:
    """A decoder of width 32 with 3 layers of 4 heads (2 key-value), its weights random and of every size.

    ``settings`` are the config's; None leaves one out that a family does not take.

    transformers' own start has weights so small that attention sees hardly a difference, norms of one and
    biases of zero: with these a forgotten norm or scale would not show.
    """
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **FAMILIES.get(family, {}),
        **settings,
    }
    config = CONFIG_MAPPING[family](**{name: size for name, size in sizes.items() if size is not None})
    decoder = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2 and parameter.shape[0] > 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:  # norms (Cohere's has a row a key-value head) and biases
                parameter.add_(noise * 0.2)
    decoder.tie_weights()
    return decoder.to(dtype)


def build_tiny_model(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    names: tuple[str, ...] = ("tiny",),
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> LlamaAdapter:
    """A tiny decoder with adapters of 3 prompts in its top 2 layers, whose gates are far from zero.

    The last of ``names`` is the active one.
    """
    if tokenizer is not None:
        settings |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = LlamaAdapter(build_tiny_decoder(family, dtype, **settings), tokenizer, base="tiny-base")
    for seed, name in enumerate(names, start=1):
        adapter = model.new_adapter(name, prompt_length=3, adapted_layers=2, seed=seed)
        adapter.to(dtype)
        torch.nn.init.normal_(adapter.gates, generator=torch.Generator().manual_seed(seed))
    return model


def random_rows(*lengths: int, seed: int = 0, vocab_size: int = 64) -> list[torch.Tensor]:
    """Rows of random token ids, (T,) each, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str, *, fill: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as one batch: (B, T) token ids, and their mask; ``side`` is where the padding goes."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), fill)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask

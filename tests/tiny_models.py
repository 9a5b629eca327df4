"""Tiny random decoders and adapters for tests: built in milliseconds, and always the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llama_adapter.methods.config import AdapterConfig
from llama_adapter.methods.projection import VisionConfig
from llama_adapter.methods.shape import DecoderShape
from llama_adapter.model import LlamaAdapter
from tests.tiny import build_tiny_tokenizer

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
CONFIG = AdapterConfig(base="base", shape=SHAPE, adapted_layers=6)

# For adapters that see: 6 features, from a tower that is never loaded.
VISION = VisionConfig(tower="tiny", tower_fingerprint="0" * 16, depths=(1, 2), feature_width=6, bottleneck=5)

# Settings special to a family, chosen so that they matter in a decoder of width 32 with rows of ten tokens.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    # Later releases of transformers load it as eager, since sdpa leaves softcapping out; 5.20 does not.
    "gemma2": {
        "sliding_window": 4,
        "attn_logit_softcapping": 1.5,
        "query_pre_attn_scalar": 5,
        "attn_implementation": "eager",
    },
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 5},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "cohere": {"use_qk_norm": True, "logit_scale": 1.0},
    "starcoder2": {"sliding_window": 4},
}
# Families whose layers compute keys and values, or masks, in different ways.
UNUSUAL: dict[str, dict[str, Any]] = {
    # Keys and values cut out of one product, in four ways.
    "gpt2": {},
    "gpt_neox": {},
    "phi3": {"sliding_window": 4},
    "gpt_bigcode": {"multi_query": True},
    # A window that only the mask has; a norm without weights; a norm after the rotation; a latent product.
    "phimoe": {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    "nanochat": {},
    "hunyuan_v1_dense": {},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 10,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 6,
        "v_head_dim": 4,
        "first_k_dense_replace": 3,
    },
}


def build_tiny_decoder(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    vocab_size: int = 64,
    **settings: Any,
) -> PreTrainedModel:
    """A decoder of width 32 with 3 layers of 4 heads (2 key-value), with random weights of many sizes.

    ``settings`` are the config's. None leaves out one that a family does not have.

    With transformers' initial values, weights are so small that attention hardly matters, norms are one and
    biases zero: a forgotten norm or scale would not show.
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
        **UNUSUAL.get(family, {}),
        **settings,
    }
    config = CONFIG_MAPPING[family](**{name: size for name, size in sizes.items() if size is not None})
    decoder = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 2 or (parameter.ndim == 2 and parameter.shape[0] > 2):
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
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
    vision: VisionConfig | None = None,
    **settings: Any,
) -> LlamaAdapter:
    """A tiny decoder with adapters of 3 prompts in its top 2 layers, with gates far from zero.

    The last of ``names`` is active.
    """
    if tokenizer is not None:
        settings |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = LlamaAdapter(build_tiny_decoder(family, dtype, **settings), tokenizer, base="tiny-base")
    for seed, name in enumerate(names, start=1):
        adapter = model.new_adapter(name, prompt_length=3, adapted_layers=2, vision=vision, seed=seed)
        adapter.to(dtype)
        torch.nn.init.normal_(adapter.prompts.gates, generator=torch.Generator().manual_seed(seed))
    return model


def build_tiny_base(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any) -> Path:
    """Write a tiny decoder with a tokenizer, as a folder that can be loaded. Returns the folder.

    ``settings`` are those of `build_tiny_decoder`.
    """
    tokenizer = build_tiny_tokenizer() if tokenizer is None else tokenizer
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, **settings}
    build_tiny_decoder(**settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# The picture sides of open_clip models, one of each kind.
TOWERS: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    "cnn": {"timm_model_name": "test_efficientnet", "timm_pool": "avg", "image_size": 32},
    "cnn pooled by attention": {
        "timm_model_name": "test_efficientnet",
        "timm_pool": "abs_attn",
        "timm_proj": "",
        "image_size": 160,
    },
    "timm vit": {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160},
    "timm vit with registers": {"timm_model_name": "test_vit2", "timm_pool": "", "image_size": 160},
    "siglip": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
    "late class token": {"timm_model_name": "xcit_nano_12_p16_224", "timm_pool": "", "image_size": 224},
}


def build_tiny_tower_folder(folder: Path, kind: str = "vit", *, seed: int = 0, **preprocess: Any) -> Path:
    """Write an open_clip folder with a random CLIP whose picture side is one of `TOWERS`. Returns the folder.

    ``preprocess`` is the part of its config about preparing pictures.
    """
    import open_clip  # slow to import, and few tests need it
    from safetensors.torch import save_model

    text = {"context_length": 4, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1}
    config = {"embed_dim": 64, "vision_cfg": TOWERS[kind], "text_cfg": text}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = open_clip.CLIP(**config)
        for name, tensor in clip.visual.state_dict().items():
            if tensor.is_floating_point():  # norms, their running statistics and zeros at the start too
                noise = torch.randn_like(tensor) * 0.1
                tensor.add_(noise.abs() if "running_var" in name else noise)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(clip, str(folder / "open_clip_model.safetensors"))
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    return folder


def sight_of(weights: Path, tower: str) -> VisionConfig:
    """The vision config for a tower in a weights folder."""
    from llama_adapter.vision.tower import load_tower

    loaded = load_tower(tower, weights=weights)
    return VisionConfig(
        tower=tower,
        tower_fingerprint=loaded.fingerprint,
        depths=loaded.depths,
        feature_width=loaded.feature_width,
        bottleneck=5,
    )


def draw_picture(path: Path, colour: str | tuple[int, int, int] = "red", size: int = 16) -> Path:
    """Write a picture of a single colour. Returns the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)
    return path


def random_rows(*lengths: int, seed: int = 0, vocab_size: int = 64) -> list[torch.Tensor]:
    """Rows of random token ids, (T,) each, without special ones."""
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

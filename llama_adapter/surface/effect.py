"""Settings of a decoder under which its adapters would be left out, or not be trained, without a word."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import PREFIX


def check_effect(decoder: PreTrainedModel) -> None:
    """Raise UsageError where no layer would read the prompts, or none would give them a gradient.

    `LlamaAdapter` refuses both when it is asked for them; this finds what was set on the decoder itself.
    """
    attention = str(decoder.config.get_text_config()._attn_implementation)
    if not attention.startswith(PREFIX):
        raise UsageError(
            f"the decoder's attention was set to {attention!r}, which reads no prompts; use "
            "model.set_attn_implementation, or switch the adapter off"
        )
    if not torch.is_grad_enabled():
        return
    layers = (module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer))
    layer: Any = next(layers, None)
    if layer is None or not layer.gradient_checkpointing or not layer.training:
        return
    if getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
        raise UsageError(
            "the decoder recomputes its layers with use_reentrant=True, which gives an adapter no gradients; "
            "use model.activation_checkpointing_enable()"
        )

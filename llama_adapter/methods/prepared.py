"""What can be read from a prepared decoder: its attention layers, and what they read.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.methods.attention import FORM, layer_index


def computing_device(decoder: PreTrainedModel) -> torch.device:
    """The device that a decoder computes on. If its weights are offloaded, they are elsewhere.

    The meta device if it can't compute: the decoder has only shapes.
    """
    if decoder.device.type != "meta":
        return decoder.device
    for module in decoder.modules():  # accelerate's hooks bring weights to the device where they are needed
        hook = getattr(module, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):
            if (device := getattr(single, "execution_device", None)) is not None:
                return torch.device(device)
    real = (parameter.device for parameter in decoder.parameters() if parameter.device.type != "meta")
    return next(real, decoder.device)


def attention_layers(decoder: PreTrainedModel) -> list[nn.Module]:
    """The self-attention modules of a prepared decoder, in the order of its layers."""
    return sorted((m for m in decoder.modules() if hasattr(m, FORM)), key=layer_index)


def attention_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states, (B, T, D), among the arguments of an attention module."""
    found: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return found


@torch.no_grad()
def input_sizes(decoder: PreTrainedModel) -> list[float]:
    """The root mean square of the input of each attention in a prepared decoder, in the order of its layers.

    It is measured on 32 random tokens. It is 1 if there are no weights (on the meta device).
    """
    layers = attention_layers(decoder)
    if computing_device(decoder).type == "meta":
        return [1.0] * len(layers)
    vocabulary = decoder.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (1, 32), generator=torch.Generator().manual_seed(0))
    read = hidden_states(decoder, tokens)
    # Without the first token: many decoders direct spare attention to it, and its states are unlike the
    # others.
    return [float(read[layer][:, 1:].float().square().mean().sqrt()) for layer in layers]


@torch.no_grad()
def hidden_states(decoder: PreTrainedModel, tokens: Tensor) -> dict[nn.Module, Tensor]:
    """The input of each attention in a prepared decoder for tokens, (B, T): (B, T, D), by attention."""
    read: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read[layer] = attention_input(args, kwargs)

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in attention_layers(decoder)]
    try:
        decoder(tokens.to(computing_device(decoder)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return read

"""Scales and biases of a frozen decoder's projections: bias tuning (LLaMA-Adapter V2, arXiv 2304.15010, 3.1).

In an adapted layer each linear projection gives ``y + s * y + b`` in place of y = W x, with s and b learnt
from zero: an untrained adapter leaves the decoder as it is. That is the paper's s' (W x + b') with s' = 1 + s
and b' = b / s'; 1 + s itself would lose small steps in bfloat16. Other than there, norms and the layers below
the adapted ones stay as they are, and the frozen weights alone give the prompts' keys and values.

A layer's tuning is one vector: of each projection, sorted by name, its scales and then its biases.

It comes to a layer with the prompts, as the decoder's keyword argument, so that each row of a batch may have
its own. The projections read it from a context variable that the layer's attention, the first to compute
there, sets in its own call: other threads have their own, and a layer that is computed again in the backward
pass sets it again.

Shapes: B rows, T tokens, S scales and biases of a layer, R their sets (1 or B), W a projection's width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import TUNING, layer_index
from llama_adapter.methods.probe import attention_input, attention_layers

_LISTENS = "_llama_adapter_listens"  # a decoder to which it was done


def tuning_width(decoder: PreTrainedModel) -> int:
    """S, twice the widths of a layer's projections together; the same in every layer.

    Raises:
        UsageError: a decoder whose layers differ, or have no linear projections.
    """
    widths = {2 * sum(_widths(layer)) for _, layer in _layers(decoder)}
    if len(widths) != 1:
        raise UsageError(
            f"this decoder's layers have different projections ({sorted(widths)} scales and biases); leave "
            "bias tuning out"
        )
    width = widths.pop()
    if width == 0:
        raise UsageError("this decoder's layers have no linear projections to tune; leave bias tuning out")
    return width


def listen(decoder: PreTrainedModel) -> None:
    """Let a decoder apply the tuning of prompts that have one; without it computes as before."""
    if hasattr(decoder, _LISTENS):
        return
    setattr(decoder, _LISTENS, True)
    for attention, layer in _layers(decoder):
        sizes = [size for width in _widths(layer) for size in (width, width)]
        attention.register_forward_pre_hook(partial(_enter, sizes), with_kwargs=True)
        for number, projection in enumerate(_projections(layer)):
            projection.register_forward_hook(partial(_apply, number))


def _layers(decoder: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """Every attention with the layer that it is in."""
    parents = {child: module for module in decoder.modules() for child in module.children()}
    return [(attention, parents[attention]) for attention in attention_layers(decoder)]


def _projections(layer: nn.Module) -> list[nn.Module]:
    """The linear ones, quantised or not; not a mixture's experts, whose tokens have left their rows."""
    modules = dict(layer.named_modules())
    return [
        modules[name]
        for name in sorted(modules)
        if hasattr(modules[name], "in_features")
        and hasattr(modules[name], "out_features")
        and not any(part.isdigit() for part in name.split("."))
    ]


def _widths(layer: nn.Module) -> list[int]:
    return [int(projection.out_features) for projection in _projections(layer)]  # type: ignore[arg-type]


def _enter(sizes: list[int], attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    prompts = kwargs.get("prompts")
    tuning = None if prompts is None else prompts.tuning_of_layer(layer_index(attention))
    if tuning is not None:
        # Not the weights' dtype, which is another one in a quantised layer.
        tuning = tuning.to(attention_input(args, kwargs).dtype)[:, None].split(sizes, dim=-1)
    TUNING.set(tuning)


def _apply(number: int, projection: nn.Module, args: Any, output: Any) -> Any:
    """(B, T, W), or (B * T, W) as some decoders have it, scaled and shifted."""
    tuning = TUNING.get()
    if tuning is None or not isinstance(output, Tensor):  # some routers give more than a product
        return output
    scale, bias = tuning[2 * number : 2 * number + 2]
    rows = output if output.ndim == 3 else output.reshape(len(scale), -1, output.shape[-1])
    return torch.addcmul(rows, rows, scale).add_(bias).view(output.shape)

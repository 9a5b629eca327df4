"""Finds changes to a decoder that would silently leave its adapters out, or keep them from being trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import PREFIX, layer_index
from llama_adapter.methods.prepared import attention_layers, computing_device
from llama_adapter.methods.state import AdapterState


def check_settings(decoder: PreTrainedModel) -> None:
    """Raise UsageError if no layer would read the prompts, or if they would get no gradient.

    `LlamaAdapter` refuses both settings itself. This finds settings that were made on the decoder directly.
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


def check_gradient(state: AdapterState, output: Any) -> None:
    """Raise UsageError if an adapter in training got no gradient from a forward pass.

    This happens with reentrant checkpointing around all layers: its first pass runs without gradients.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    trained = any(tensor.requires_grad for part in state.parts.values() for tensor in part.values())
    first = output[0]  # loss, logits or hidden states
    if trained and isinstance(first, Tensor) and not first.requires_grad:
        raise UsageError(
            "this forward pass gives the adapter no gradients: its layers ran without them, as in reentrant "
            "checkpointing; use model.activation_checkpointing_enable(), or torch.no_grad() if nothing is "
            "trained"
        )


def check_offloading(decoder: PreTrainedModel, adapters: nn.Module) -> None:
    """Raise UsageError if accelerate has offloaded the adapters too, or looks for the base among them.

    accelerate looks up an offloaded tensor in the state dict of the module it was given, and the state dict
    of a `LlamaAdapter` holds adapters only. It brings a module's tensors back for that module's forward, but
    an adapter's tensors are read outside of a forward.
    """
    if computing_device(decoder).type == "meta":
        return
    offloaded = any(parameter.device.type == "meta" for parameter in adapters.parameters())
    if offloaded or not all(_finds_its_tensors(module) for module in decoder.modules()):
        raise UsageError(
            "the whole model was offloaded, adapters included; load it again and offload its decoder alone: "
            "cpu_offload(model.decoder)"
        )


def _finds_its_tensors(module: nn.Module) -> bool:
    hook: Any = getattr(module, "_hf_hook", None)
    for single in getattr(hook, "hooks", (hook,)):
        found = getattr(single, "weights_map", None)
        if found is not None and getattr(single, "offload", False):
            names = (name for name, tensor in module.named_parameters(recurse=False) if tensor.is_meta)
            return all(f"{found.prefix}{name}" in found.dataset for name in names)
    return True


@dataclass(frozen=True)
class _Step:
    """A module on the way from the decoder to an attention layer, and the code that runs there."""

    parent: nn.Module
    name: str
    module: nn.Module
    code: tuple[Any, Any]

    def holds(self) -> bool:
        return self.parent._modules.get(self.name) is self.module and _code(self.module) == self.code


def _code(module: nn.Module) -> tuple[Any, Any]:
    """The forward of the module's class, and the one set on the module itself."""
    return type(module).forward, vars(module).get("forward")


class Readers:
    """Makes sure that every layer of a decoder still reads the prompts, as the probe found at construction.

    Counting the reads in every forward pass would be a side effect, which torch.compile does not allow in
    recomputed layers. So each pass only checks, in some microseconds, that the code on the way to the layers
    is unchanged. If it is not, one token is run to see which layers read.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        self.code = _code(decoder)
        self.steps = _steps(decoder)

    def check(self, decoder: PreTrainedModel) -> None:
        """Raise UsageError, naming the layer, if a layer no longer reads its prompts."""
        if torch.compiler.is_compiling():
            return
        code = _code(decoder)
        if code == self.code and all(step.holds() for step in self.steps):
            return
        steps = _steps(decoder)
        layers = decoder.config.get_text_config().num_hidden_layers
        known = {layer_index(attention) for attention in attention_layers(decoder)}
        read = known
        if computing_device(decoder).type != "meta":
            reading = _Reading(set())
            with torch.no_grad():
                token = torch.zeros(1, 1, dtype=torch.long, device=computing_device(decoder))
                decoder(token, adapter=reading, use_cache=False)
            read = known & reading.layers
        if missing := sorted(set(range(layers)) - read):
            raise UsageError(
                f"layer {missing[0]} of the decoder reads no prompts: its attention was replaced after the "
                "model was made; undo that, or switch the adapter off"
            )
        self.code, self.steps = code, steps


def _steps(decoder: PreTrainedModel) -> list[_Step]:
    """All modules from the decoder downwards, each once."""
    attentions = set(attention_layers(decoder))
    steps: dict[str, _Step] = {}
    for path, attention in decoder.named_modules():
        if attention not in attentions:
            continue
        parent: nn.Module = decoder
        names = path.split(".")
        for depth, name in enumerate(names, start=1):
            module = parent._modules[name]
            assert module is not None
            steps.setdefault(".".join(names[:depth]), _Step(parent, name, module, _code(module)))
            parent = module
    return list(steps.values())


@dataclass(frozen=True)
class _Reading:
    """Stands in for an adapter's state, and records which layers ask for their prompts."""

    layers: set[int]

    def prompts_of(self, attention: nn.Module) -> None:
        self.layers.add(layer_index(attention))

    def keys_of(self, attention: nn.Module) -> None:
        return None

    def sites_of(self, layer: int) -> None:
        return None

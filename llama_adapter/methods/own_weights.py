"""Parts that change weights of the decoder itself, W = W0 + delta: all weights, those of some layers, or
single ones.

An adapter with such a part has a decoder of its own: a copy of the base in which the changed weights are W.
All other tensors are shared with the base. So the base stays unchanged, other adapters can be served beside
it, and nothing has to be switched on modules. But the rows of one batch go through one decoder, so rows of
such an adapter can't share a batch with rows of others.

What is trained and saved is delta, in float32. Each gradient of W is passed on to delta as soon as it is
computed. Weight decay pulls W back to W0.
"""

from __future__ import annotations

import copy
import hashlib
import threading
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import is_sharded
from llama_adapter.methods.part import Inputs, Part, PartConfig, State
from llama_adapter.methods.shape import Layout
from llama_adapter.methods.sites import locate_projections, register_parameters

_SAMPLED = 64  # how many values of each weight go into the fingerprint of a base


@dataclass(frozen=True)
class WeightsConfig(PartConfig):
    """What all parts that change weights store.

    Attributes:
        weights: the shape of each weight that may change, by its name in the decoder.
        fingerprint: identifies the values of these weights in the base. With another base the changes are
            useless.
    """

    weights: dict[str, Any] = field(default_factory=dict, metadata={"derived": True})
    fingerprint: str = field(default="", metadata={"derived": True})


class WeightsPart(Part):
    """A part that changes weights of the decoder. It is the only part of its adapter."""

    alone = True
    learning_rate = 1e-4
    Config: ClassVar[type[WeightsConfig]]
    config: WeightsConfig
    _own: OwnDecoder | None = None

    # --- what each method defines ---------------------------------------------------------------------------

    @classmethod
    def choose_weights(cls, config: Any, decoder: PreTrainedModel) -> list[str]:
        """The names of the weights that may change."""
        raise NotImplementedError

    def write(self, name: str, weight: Tensor, base: Tensor) -> None:
        """Set ``weight`` to the sum of the base's weight and the change."""
        raise NotImplementedError

    def take_gradient(self, name: str, gradient: Tensor) -> None:
        """Add the gradient of a weight to the gradient of its change."""
        raise NotImplementedError

    # --- what they share ------------------------------------------------------------------------------------

    @classmethod
    def complete(cls, config: Any, decoder: PreTrainedModel) -> Any:
        names = cls.choose_weights(config, decoder)
        _check_weights(cls.kind, decoder, names)
        shapes = {name: list(decoder.get_parameter(name).shape) for name in names}
        return replace(config, weights=shapes, fingerprint=weights_fingerprint(decoder, names))

    def attach(self, decoder: PreTrainedModel) -> None:
        """Use a decoder as the base.

        Raises:
            UsageError: quantised weights, or a base with other weights than the one that was changed.
        """
        names = list(self.config.weights)
        _check_weights(self.kind, decoder, names)
        if weights_fingerprint(decoder, names) != self.config.fingerprint:
            raise UsageError(
                f"{self.kind} is kept as changes to a base's weights, and this base has other ones; give the "
                "base that it was trained on, in float32 or bfloat16"
            )
        self._own = OwnDecoder(decoder)

    def decoder(self) -> PreTrainedModel:
        """The decoder with the current changes."""
        assert self._own is not None, "attach it to a decoder first"
        return self._own.decoder(self)

    def add_state(self, states: dict[type[Part], State], inputs: Inputs) -> None:
        states[type(self)] = {}

    @classmethod
    def merge(cls, states: Sequence[State | None]) -> State:
        return {}


class OwnDecoder:
    """A copy of a base with a part's weights. It is made at the first request, which may come from any
    thread.

    It is not a module of the model: its weights belong to the base and to the part, and are saved, moved and
    counted with these.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self.base = base
        self._copy: PreTrainedModel | None = None
        self._made_of: list[Any] = []
        self._written: list[Any] = []
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnDecoder:
        """For a copied part: on the same base, unless the base is copied too."""
        return OwnDecoder(memo.get(id(self.base), self.base))

    def decoder(self, part: WeightsPart) -> PreTrainedModel:
        if torch.compiler.is_compiling():
            raise UsageError(
                f"{part.kind} writes its weights outside a graph; for fullgraph=True compile model.merge()"
            )
        if is_sharded(self.base):
            raise UsageError(
                f"{part.kind} changes the base's own weights, which cannot be sharded; launch with ddp.yaml"
            )
        names = list(part.config.weights)
        trained = any(own.requires_grad for own in part.parameters())
        with self._lock, torch.inference_mode(False), torch.no_grad():
            base = [self.base.get_parameter(name) for name in names]
            if any(weight.is_meta for weight in base):
                raise UsageError(f"{part.kind} changes the base's own weights, which were offloaded since")
            made_of = [(weight.data_ptr(), weight.dtype, weight.device) for weight in base]
            if self._copy is None or made_of != self._made_of:
                self._copy = self._build(part, names)
                self._made_of, self._written = made_of, []
            weights = [self._copy.get_parameter(name) for name in names]
            # A step of an optimiser and a loaded state both count as new versions.
            written = [(id(own), own._version) for own in (*part.parameters(), *part.buffers())]
            if written != self._written:
                for name, weight, before in zip(names, weights, base, strict=True):
                    part.write(name, weight, before)
                self._written = written
            for weight in weights:
                weight.requires_grad_(trained)
            _copy_flags(self.base, self._copy)
        return self._copy

    def _build(self, part: WeightsPart, names: Sequence[str]) -> PreTrainedModel:
        configs = [own.config for own in self.base.modules() if isinstance(own, PreTrainedModel)]
        made = copy_decoder(self.base, names, *configs)  # with the same config, which names the attention
        # A weak reference: the weights live as long as the part that owns them.
        owner = weakref.ref(part)
        for name in names:
            weight = made.get_parameter(name).requires_grad_(True)
            weight.register_post_accumulate_grad_hook(partial(_hand_over, owner, name))
        return made


def copy_decoder(decoder: PreTrainedModel, names: Collection[str], *shared: object) -> PreTrainedModel:
    """A copy with parameters of its own under some names. All other tensors are shared.

    Args:
        shared: other objects that should not be copied.
    """
    everything = decoder.named_parameters(remove_duplicate=False)
    own = {id(tensor) for name, tensor in everything if name in names}
    kept = [tensor for tensor in (*decoder.parameters(), *decoder.buffers()) if id(tensor) not in own]
    memo: dict[int, Any] = {id(thing): thing for thing in (*kept, *shared)}
    made: PreTrainedModel = copy.deepcopy(decoder, memo)
    return made


def counterpart(module: nn.Module, base: nn.Module, made: nn.Module) -> nn.Module:
    """The module of a copy that corresponds to a module of the base."""
    name = next(name for name, own in base.named_modules() if own is module)
    return made.get_submodule(name)


def _hand_over(owner: weakref.ref[WeightsPart], name: str, weight: Tensor) -> None:
    gradient, weight.grad = weight.grad, None
    part = owner()
    if part is not None and gradient is not None:
        part.take_gradient(name, gradient)


def _copy_flags(base: nn.Module, made: nn.Module) -> None:
    """Give the copy's modules the same switches as the base's."""
    for module, own in zip(base.modules(), made.modules(), strict=True):
        own.training = module.training
        if isinstance(module, GradientCheckpointingLayer):
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                if hasattr(module, name):
                    setattr(own, name, getattr(module, name))


def _check_weights(kind: str, decoder: PreTrainedModel, names: Sequence[str]) -> None:
    """Raise UsageError if a decoder lacks one of these weights, or stores one in fewer than 16 bits."""
    weights: dict[str, Any] = {f"{name}.weight": None for name in locate_projections(decoder)}
    weights |= dict.fromkeys(names)
    weights |= dict(decoder.named_parameters())
    for name, weight in weights.items():
        plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize > 1
        if (not plain or weight.is_meta) and not is_sharded(decoder):
            raise UsageError(
                f"{kind} changes the base's own weights, and {name} is quantised, offloaded or missing here; "
                "load the base as it is"
            )


def weights_fingerprint(decoder: PreTrainedModel, names: Sequence[str]) -> str:
    """16 hexadecimal digits that identify the values of weights. Only a sample of the values is read.

    The values are rounded to bfloat16, so that a base has the same fingerprint in float32 and in bfloat16.
    """
    digest = hashlib.sha256()
    for name in names:
        flat = decoder.get_parameter(name).detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLED)].to("cpu", torch.bfloat16)
        digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


class DenseWeightsPart(WeightsPart):
    """A change for every number of each weight.

    Attributes:
        WEIGHT: the change of a weight, with its name and shape. Zero at the start.
    """

    def __init__(self, config: Any, layout: Layout, generator: torch.Generator | None = None) -> None:
        super().__init__(config, layout, generator)
        register_parameters(self, {name: torch.zeros(shape) for name, shape in config.weights.items()})

    def write(self, name: str, weight: Tensor, base: Tensor) -> None:
        change = self.get_parameter(name)
        weight.copy_(base + change)

    def take_gradient(self, name: str, gradient: Tensor) -> None:
        change = self.get_parameter(name)
        gradient = gradient.to(change.dtype)
        change.grad = gradient if change.grad is None else change.grad.add_(gradient)

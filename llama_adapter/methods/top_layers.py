"""Layer-wise fine-tuning: trains all weights of the topmost layers, W = W0 + delta, delta zero at the start.

The learning rate can fall with depth, as in ULMFiT (Howard and Ruder, arXiv 1801.06146, 3.2): each layer has
the rate of the layer above it, times `layer_decay`. The final norm and the head are not trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.own_weights import DenseWeightsPart, WeightsConfig
from llama_adapter.methods.sites import locate_layer_weights


@dataclass(frozen=True)
class TopLayersConfig(WeightsConfig):
    """The settings of layer-wise fine-tuning."""

    top_layers: int = 2  # how many layers are trained, counted from the top
    layer_decay: float = 1.0  # a layer's learning rate divided by that of the layer above it

    def __post_init__(self) -> None:
        if self.top_layers < 1:
            raise UsageError(f"top layers: {self.top_layers} given; choose 1 or more")
        if not 0 < self.layer_decay <= 1:
            raise UsageError(f"layer decay: {self.layer_decay} given; choose a number above 0, 1 at most")


class TopLayers(DenseWeightsPart):
    """A change of each weight of the topmost layers."""

    kind = "top-layers"
    Config = TopLayersConfig
    size = "top_layers"
    config: TopLayersConfig

    @classmethod
    def adapts(cls, config: TopLayersConfig, num_layers: int) -> int:
        return config.top_layers

    @classmethod
    def complete(cls, config: TopLayersConfig, decoder: PreTrainedModel) -> TopLayersConfig:
        """If the decoder has fewer layers than were asked for, this is an error, not a smaller adapter."""
        there = decoder.config.get_text_config().num_hidden_layers
        if config.top_layers > there:
            raise UsageError(f"top layers: {config.top_layers} given; the decoder has {there}")
        return super().complete(config, decoder)

    @classmethod
    def choose_weights(cls, config: TopLayersConfig, decoder: PreTrainedModel) -> list[str]:
        numbers = locate_layer_weights(decoder)
        lowest = max(numbers.values()) + 1 - config.top_layers
        return [name for name, number in numbers.items() if number >= lowest]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """If the rates fall, a group for each layer, such as "layer-29"; else one group."""
        if self.config.layer_decay == 1:
            return super().parameter_groups()
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            groups.setdefault(f"layer-{_layer(name)}", []).append(parameter)
        return groups

    def rate_factors(self) -> dict[str, float]:
        if self.config.layer_decay == 1:
            return {}
        numbers = sorted({_layer(name) for name in self.config.weights}, reverse=True)
        return {f"layer-{number}": self.config.layer_decay**depth for depth, number in enumerate(numbers)}


def _layer(name: str) -> int:
    """The layer's number in a weight's name, such as "model.layers.29.mlp.up_proj.weight"."""
    return int(next(part for part in name.split(".") if part.isdigit()))

"""Full fine-tuning: trains every weight of the decoder, W = W0 + delta, where delta is zero at the start.

This includes embeddings, norms and the head. The other methods are compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from llama_adapter.methods.own_weights import DenseWeightsPart, WeightsConfig


@dataclass(frozen=True)
class FullConfig(WeightsConfig):
    """Full fine-tuning has no settings."""


class Full(DenseWeightsPart):
    """A change of every weight."""

    kind = "full"
    Config = FullConfig
    learning_rate = 3e-5

    @classmethod
    def adapts(cls, config: Any, num_layers: int) -> int:
        return num_layers

    @classmethod
    def choose_weights(cls, config: FullConfig, decoder: PreTrainedModel) -> list[str]:
        return [name for name, _ in decoder.named_parameters()]

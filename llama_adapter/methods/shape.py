"""The sizes that an adapter has to fit. Does not import torch, which reading a config does not need."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from llama_adapter.common.typed import STRICT


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that an adapter has to fit."""

    __pydantic_config__ = STRICT

    family: str  # transformers' model_type
    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify this shape."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return (
            f"{self.family}, {self.num_layers} layers, width {self.hidden_size}, {self.num_heads} heads "
            f"({self.num_key_value_heads} key-value) of {self.head_dim}, vocabulary {self.vocab_size}"
        )


def default_adapted_layers(num_layers: int) -> int:
    """All but the lowest sixteenth: 30 of 32 as published, 29 of 30."""
    return num_layers - num_layers // 16


@dataclass(frozen=True)
class Layout:
    """What the parts of an adapter are built for.

    Attributes:
        shape: the decoder's sizes.
        adapted_layers: L, how many layers are adapted, counted from the top.
        projections: the linear projections of an adapted layer by their name within it ("self_attn.q_proj"),
            each with the widths of its input and output. Empty if no part needs them, and in folders of
            format version 1 until the adapter meets its decoder.
    """

    shape: DecoderShape
    adapted_layers: int
    projections: Mapping[str, tuple[int, int]] = field(default_factory=dict)

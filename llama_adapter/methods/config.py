"""What rebuilds an adapter: frozen dataclasses that are stored as JSON beside its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from llama_adapter.common.errors import UsageError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that an adapter has to fit."""

    family: str  # transformers' model_type
    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    def fingerprint(self) -> str:
        """16 hex digits that name this shape."""
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
class VisionConfig:
    """How an adapter sees (paper, section 3.3).

    Attributes:
        tower: name, folder, hub id or MODEL:TAG of the open_clip model that it was trained with.
        tower_fingerprint: of the tower's weights and preprocessing; another tower of that name is refused.
        depths: the depths of the tower whose global features are concatenated, from 1, lowest first.
        feature_width: F, the width of the concatenated features.
        bottleneck: width of the projection's hidden layer.
        image_tokens: 1, added to every prompt (eq. 10), or K, one for each, as in the authors' later code.
        normalised: the projection normalises its hidden layer and its tokens, as in the authors' code, and
            scales these by layer; False in adapters that were made before it did.
    """

    tower: str
    tower_fingerprint: str
    depths: tuple[int, ...]
    feature_width: int
    bottleneck: int = 128
    image_tokens: int = 1
    normalised: bool = True

    def __post_init__(self) -> None:
        for name in ("feature_width", "bottleneck", "image_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')}: {getattr(self, name)} given; choose 1 or more")
        if self.normalised and self.bottleneck == 1:
            raise UsageError("bottleneck: 1 given; choose 2 or more, since one number normalised is always 0")
        if not self.depths or any(not isinstance(depth, int) or depth < 1 for depth in self.depths):
            raise UsageError(f"depths: {list(self.depths)} given; expected numbers from 1")


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's settings (paper, section 3.1) and what it belongs to."""

    base: str  # name, folder or hub id of the decoder
    shape: DecoderShape
    adapted_layers: int  # L, the topmost ones
    prompt_length: int = 10  # K
    template: str = "alpaca"  # how turns were written when it was trained
    vision: VisionConfig | None = None  # None: it knows nothing of pictures
    tuning_width: int = 0  # S, scales and biases of each adapted layer (LLaMA-Adapter V2); 0: none
    format_version: int = FORMAT_VERSION
    training: dict[str, Any] = field(default_factory=dict)  # how it was made; shown, never interpreted
    template_date: str | None = (
        None  # the day that a chat template writes, as 2026-11-28; None: today, or none
    )

    def __post_init__(self) -> None:
        if self.template_date is not None and not _is_date(self.template_date):
            raise UsageError(f"template date: {self.template_date!r} given; expected one like 2026-11-28")
        if not 1 <= self.adapted_layers <= self.shape.num_layers:
            raise UsageError(
                f"adapted layers: {self.adapted_layers} given; the decoder has {self.shape.num_layers}, "
                f"so choose 1 to {self.shape.num_layers}"
            )
        if self.prompt_length < 1:
            raise UsageError(f"prompt length: {self.prompt_length} given; choose 1 or more (the paper: 10)")
        if self.tuning_width < 0:
            raise UsageError(f"tuning width: {self.tuning_width} given; choose 0 or more")
        if self.vision is not None and self.vision.image_tokens not in (1, self.prompt_length):
            raise UsageError(
                f"image tokens: {self.vision.image_tokens} given; choose 1, or one for each of the "
                f"{self.prompt_length} prompts"
            )

    @property
    def first_layer(self) -> int:
        """Index of the lowest adapted layer."""
        return self.shape.num_layers - self.adapted_layers

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict, with the shape's fingerprint for those who only compare."""
        values = {**dataclasses.asdict(self), "base_fingerprint": self.shape.fingerprint()}
        if self.vision is not None:
            values["vision"]["depths"] = list(self.vision.depths)  # JSON has no tuples
        if not self.tuning_width:
            del values["tuning_width"]  # what adapters without were always stored as
        if self.template_date is None:
            del values["template_date"]  # the same
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> AdapterConfig:
        """Rebuild from ``to_dict``'s result; ``source`` names the file in errors.

        Raises:
            UsageError: another format version, a missing or unknown key, a wrong type, a changed shape.
        """
        values = dict(values)
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise UsageError(
                f"{source}: format version {version!r}, this llama-adapter reads {FORMAT_VERSION}; "
                "install the release that wrote it"
            )
        fingerprint = values.pop("base_fingerprint", None)
        shape = values.pop("shape", None)
        if not isinstance(shape, dict):
            raise UsageError(f"{source}: 'shape' must be an object, found {type(shape).__name__}")
        values["shape"] = _build(DecoderShape, shape, source)
        if isinstance(vision := values.get("vision"), dict):
            values["vision"] = _build(VisionConfig, {"normalised": False, **vision}, source)
        config = _build(cls, values, source)
        if fingerprint != config.shape.fingerprint():
            raise UsageError(f"{source}: its base_fingerprint does not match its shape; the file was edited")
        return config


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


_TYPES: dict[str, Any] = {
    "str": str,
    "int": int,
    "bool": bool,
    "dict[str, Any]": dict,
    "tuple[int, ...]": list,
    "VisionConfig | None": (VisionConfig, type(None)),
    "str | None": (str, type(None)),
}


def _build(cls: Any, values: dict[str, Any], source: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if unknown or missing:
        what = f"unknown key {unknown[0]!r}" if unknown else f"missing key {missing[0]!r}"
        raise UsageError(f"{source}: {what}; expected {', '.join(sorted(fields))}")
    for name, value in values.items():
        expected = _TYPES.get(str(fields[name].type))
        if expected and (not isinstance(value, expected) or isinstance(value, bool) != (expected is bool)):
            kind = expected.__name__ if not isinstance(expected, tuple) else "text or null"
            if expected == (VisionConfig, type(None)):
                kind = "an object or null"
            raise UsageError(f"{source}: {name!r} must be {kind}, found {value!r:.60}")
    try:
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None

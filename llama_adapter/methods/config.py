"""The config from which an adapter is rebuilt: frozen dataclasses, stored as JSON beside its weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, TypeVar

from llama_adapter.common.errors import UsageError
from llama_adapter.common.typed import STRICT, read_typed
from llama_adapter.methods.part import PartConfig
from llama_adapter.methods.projection import VisionConfig
from llama_adapter.methods.prompts import PromptsConfig
from llama_adapter.methods.shape import DecoderShape, Layout
from llama_adapter.methods.table import METHODS, PARTS, check_composition, option_names

FORMAT_VERSION = 2  # version 1 had fixed fields for prompts, a projection and scales only
C = TypeVar("C", bound=PartConfig)


@dataclass(frozen=True)
class ScienceQAConfig:
    """How to ask ScienceQA's problems of an adapter that was trained on them.

    Attributes:
        format: an official name, such as QCM-A.
        caption: whether a machine's caption of the picture is part of the context.
        answer: the way to answer that was best on validation ("generate", "letter" or "option"). None: it was
            not measured.
        rotations: whether the mean over rotations of the choices gave more right answers on validation than
            the choices in their own order.
    """

    format: str
    caption: bool = False
    answer: str | None = None
    rotations: bool = False
    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's parts, and the base that it belongs to."""

    __pydantic_config__ = STRICT

    base: str  # name, folder or hub id of the decoder
    shape: DecoderShape
    adapted_layers: int  # L, how many layers are adapted, counted from the top
    parts: tuple[PartConfig, ...] = (PromptsConfig(),)  # in the order of `table.PARTS`
    template: str = "alpaca"  # the text format of turns in training
    projections: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # see `Layout`
    scienceqa: ScienceQAConfig | None = None
    training: dict[str, Any] = field(default_factory=dict)  # how it was trained; shown, but never interpreted
    template_date: str | None = (
        None  # the date that a chat template writes, such as 2026-11-28; None: today, or none
    )
    quantization: str | None = None  # of the decoder's weights in training; None: not quantised

    def __post_init__(self) -> None:
        if self.template_date is not None and not _is_date(self.template_date):
            raise UsageError(f"template date: {self.template_date!r} given; expected one like 2026-11-28")
        if not 1 <= self.adapted_layers <= self.shape.num_layers:
            raise UsageError(
                f"adapted layers: {self.adapted_layers} given; the decoder has {self.shape.num_layers}, "
                f"so choose 1 to {self.shape.num_layers}"
            )
        if any(width < 1 for widths in self.projections.values() for width in widths):
            raise UsageError(f"projections: {dict(self.projections)} given; expected widths of 1 or more")
        kinds = [self.kind_of(part) for part in self.parts]
        if not kinds or kinds != [kind for kind in PARTS if kind in kinds]:
            raise UsageError(
                f"parts: {', '.join(kinds) or 'none'} given; expected some of {', '.join(PARTS)}, in this "
                "order"
            )
        check_composition([PARTS[kind] for kind in kinds])
        if self.vision is not None:
            prompts = self.find(PromptsConfig)
            if prompts is None:
                raise UsageError(
                    "pictures come in with the prompts, which this adapter lacks; add them to its method"
                )
            if self.vision.image_tokens not in (1, prompts.prompt_length):
                raise UsageError(
                    f"image tokens: {self.vision.image_tokens} given; choose 1, or one for each of the "
                    f"{prompts.prompt_length} prompts"
                )

    @staticmethod
    def kind_of(part: PartConfig) -> str:
        """The kind of part that has these settings."""
        return next(kind for kind, cls in PARTS.items() if cls.Config is type(part))

    def find(self, settings: type[C]) -> C | None:
        """The settings of a class, or None if the adapter has no such part."""
        return next((part for part in self.parts if isinstance(part, settings)), None)

    @property
    def method(self) -> str:
        """The parts as a method string, such as "prompts+scales". It does not name the projection."""
        return "+".join(kind for kind in map(self.kind_of, self.parts) if kind in METHODS)

    @property
    def options(self) -> dict[str, Any]:
        """The settings of its parts, except the projection's, as `LlamaAdapter.new_adapter` takes them."""
        own = [part for part in self.parts if not isinstance(part, VisionConfig)]
        return {name: getattr(part, name) for part in own for name in option_names(type(part))}

    @property
    def vision(self) -> VisionConfig | None:
        """How it sees pictures; None: it does not."""
        return self.find(VisionConfig)

    @property
    def prompt_length(self) -> int:
        """K, or 0 without prompts."""
        prompts = self.find(PromptsConfig)
        return 0 if prompts is None else prompts.prompt_length

    @property
    def first_layer(self) -> int:
        """Index of the lowest adapted layer."""
        return self.shape.num_layers - self.adapted_layers

    @property
    def layout(self) -> Layout:
        """What its parts are built for."""
        return Layout(self.shape, self.adapted_layers, self.projections)

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON. It has the shape's fingerprint too, for programs that only compare."""
        values: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "base": self.base,
            "base_fingerprint": self.shape.fingerprint(),
            "shape": dataclasses.asdict(self.shape),
            "adapted_layers": self.adapted_layers,
            "parts": [{"kind": self.kind_of(part), **_chosen(part)} for part in self.parts],
            "template": self.template,
            "template_date": self.template_date,
            "quantization": self.quantization,
            "projections": self.projections,
            "scienceqa": None if self.scienceqa is None else dataclasses.asdict(self.scienceqa),
            "training": self.training,
        }
        plain: dict[str, Any] = json.loads(json.dumps(values))  # lists in place of tuples
        return plain

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> AdapterConfig:
        """Rebuild a config from the result of ``to_dict``. ``source`` names the file in errors.

        Raises:
            UsageError: another format version, a missing or unknown key, a wrong type, or a changed shape.
        """
        values = dict(values)
        version = values.pop("format_version", None)
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise UsageError(
                f"{source}: format version {version!r}, this llama-adapter reads up to {FORMAT_VERSION}; "
                "install the release that wrote it"
            )
        if version == 1:
            values = _from_version_1(values, source)
        fingerprint = values.pop("base_fingerprint", None)
        stored = values.pop("parts", None)
        if not isinstance(stored, list):
            raise UsageError(f"{source}: 'parts': expected a list, found {type(stored).__name__}")
        parts = tuple(_build_part(part, source) for part in stored)
        config = read_typed(cls, values, source)
        try:
            config = dataclasses.replace(config, parts=parts)
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from None
        if fingerprint != config.shape.fingerprint():
            raise UsageError(f"{source}: its base_fingerprint does not match its shape; the file was edited")
        return config


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _chosen(part: PartConfig) -> dict[str, Any]:
    """A part's settings.

    Derived fields, and fields that came later, only if they differ from their default.
    """
    fields = {own.name: own for own in dataclasses.fields(part)}
    return {
        name: value
        for name, value in dataclasses.asdict(part).items()
        if not {"derived", "later"} & fields[name].metadata.keys() or value != fields[name].default
    }


def _build_part(values: Any, source: str) -> PartConfig:
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str):
        raise UsageError(f"{source}: each of 'parts' must be an object with a 'kind', found {values!r:.60}")
    values = dict(values)
    kind = values.pop("kind")
    if kind not in PARTS:
        raise UsageError(
            f"{source}: a part of kind {kind!r}; this llama-adapter knows {', '.join(PARTS)}: "
            "install the release that wrote it"
        )
    return read_typed(PARTS[kind].Config, values, f"{source}, part {kind!r}")


def _from_version_1(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A config of format version 1 as one of version 2. Its errors are found when the result is read."""
    values = dict(values)
    parts = [{"kind": "prompts", **_moved(values, "prompt_length")}]
    if (vision := values.pop("vision", None)) is not None:
        if not isinstance(vision, dict):
            raise UsageError(f"{source}: 'vision' must be an object or null, found {vision!r:.60}")
        parts.append({"kind": "projection", "normalised": False, **vision})
    if width := values.pop("tuning_width", 0):
        parts.append({"kind": "scales", "width": width})
    training = values.get("training")
    data = training.get("data") if isinstance(training, dict) else None
    if isinstance(training, dict) and isinstance(data, dict) and "format" in data:
        # In version 1, the way to ask ScienceQA's problems was among the training settings.
        values["scienceqa"] = {
            "format": data["format"],
            "caption": data.get("caption", False),
            "answer": training.get("answer"),
            "rotations": training.get("rotations", False),
        }
    return {**values, "parts": parts}


def _moved(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: values.pop(name) for name in names if name in values}

"""The table of methods. A new one needs a line here and a file beside this one (see docs/methods.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.adalora import AdaLora
from llama_adapter.methods.bitfit import BitFit
from llama_adapter.methods.bottleneck import Bottleneck
from llama_adapter.methods.full import Full
from llama_adapter.methods.ia3 import Ia3
from llama_adapter.methods.lora import Lora
from llama_adapter.methods.part import Part, PartConfig
from llama_adapter.methods.prefix import Prefix
from llama_adapter.methods.projection import Projection, VisionConfig
from llama_adapter.methods.prompts import Prompts
from llama_adapter.methods.scales import Scales
from llama_adapter.methods.selected import Selected
from llama_adapter.methods.top_layers import TopLayers

# In the order in which they act on the same output.
_PARTS: tuple[type[Part], ...] = (
    Prompts,
    Projection,
    Prefix,
    Scales,
    Ia3,
    BitFit,
    Lora,
    AdaLora,
    Bottleneck,
    Full,
    TopLayers,
    Selected,
)
PARTS: dict[str, type[Part]] = {part.kind: part for part in _PARTS}  # by kind, in the same order
METHODS = tuple(
    kind for kind in PARTS if kind != Projection.kind
)  # an adapter that sees pictures has the projection too


def parts_of_method(method: str) -> list[type[Part]]:
    """The parts that a method string names ("prompts" or "prompts+scales"), in the order of the table.

    Raises:
        UsageError: an unknown part, a part named twice, or others beside a part that has to be alone.
    """
    named = [kind.strip() for kind in method.split("+")]
    for kind in named:
        if kind not in METHODS:
            raise UsageError(
                f"method {method!r}: there is no {kind!r}; choose among {', '.join(METHODS)}, joined by +"
            )
        if named.count(kind) > 1:
            raise UsageError(f"method {method!r} has {kind!r} twice; name it once")
    parts = [PARTS[kind] for kind in METHODS if kind in named]
    check_composition(parts)
    return parts


def check_composition(parts: Sequence[type[Part]]) -> None:
    """Raise UsageError if a part that has to be alone has others beside it."""
    for part in parts:
        if part.alone and len(parts) > 1:
            others = ", ".join(other.kind for other in parts if other is not part)
            raise UsageError(
                f"{part.kind} trains the base's own weights and can't be combined; leave out {others}"
            )


def option_names(settings: type[PartConfig]) -> list[str]:
    """The settings that users choose."""
    return [own.name for own in dataclasses.fields(settings) if not own.metadata.get("derived")]


def parse_options(method: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Convert options of a method from a command line's texts to the types of their fields.

    Raises:
        UsageError: an unknown option, or a text that is no value for it.
    """
    fields = {
        own.name: str(own.type)
        for part in parts_of_method(method)
        for own in dataclasses.fields(part.Config)
        if own.name in option_names(part.Config)
    }
    values = {}
    for name, text in texts.items():
        if name not in fields:
            raise UsageError(
                f"method {method!r} has no option {name!r}; it has {', '.join(fields) or 'none'}"
            )
        kind = fields[name].removesuffix(" | None")
        try:
            values[name] = _FROM_TEXT[kind](text)
        except (ValueError, KeyError):
            raise UsageError(f"option {name}={text}: expected a value of type {kind}") from None
    return values


_FROM_TEXT: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "tuple[str, ...]": lambda text: tuple(text.split(",")),
    "tuple[int, ...]": lambda text: tuple(map(int, text.split(","))),
}


def build_configs(
    method: str, options: Mapping[str, Any], vision: VisionConfig | None = None
) -> tuple[PartConfig, ...]:
    """The settings of a method's parts, in the order of the table.

    Args:
        options: settings by name. Each is given to all parts that have a setting of this name.
        vision: how the adapter sees pictures; None: it does not.

    Raises:
        UsageError: an unknown method or option, or a value out of its range.
    """
    parts = parts_of_method(method)
    there = {part: option_names(part.Config) for part in parts}
    known = sorted({name for names in there.values() for name in names})
    for name in options:
        if name not in known:
            raise UsageError(f"method {method!r} has no option {name!r}; it has {', '.join(known) or 'none'}")
    configs = {
        part.kind: part.Config(**{name: options[name] for name in names if name in options})
        for part, names in there.items()
    }
    if vision is not None:
        configs[Projection.kind] = vision
    return tuple(configs[kind] for kind in PARTS if kind in configs)

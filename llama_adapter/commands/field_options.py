"""Options made from the fields of a dataclass: type, default and help are said once, at the field."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

# How a field's annotation is read on the command line.
_KINDS: dict[str, dict[str, Any]] = {
    "int": {"type": int},
    "float": {"type": float},
    "str": {},
    "Path": {"type": Path},
    "Sequence[int]": {"type": int, "nargs": "+"},
}


def described_fields(settings: Any) -> list[str]:
    """The names of those fields of a dataclass that have a "help"."""
    return [own.name for own in dataclasses.fields(settings) if "help" in own.metadata]


def add_fields(
    group: Any,
    settings: Any,
    names: Collection[str] | None = None,
    special: Mapping[str, Mapping[str, Any]] = {},
) -> None:
    """Add a command-line option for each of the fields `names` of a dataclass.

    Its type, default and help come from the field.

    Args:
        names: the fields; by default all that have a "help".
        special: for some fields, other arguments for argparse; "option" is the option's name.
    """
    fields = {own.name: own for own in dataclasses.fields(settings)}
    for name in described_fields(settings) if names is None else names:
        own = fields[name]
        default = None if own.default is dataclasses.MISSING else own.default
        shown = "" if default is None or default is False else f" ({_shown(default)})"
        words: dict[str, Any] = {"dest": name, "default": default, "help": own.metadata["help"] + shown}
        if own.type == "bool":
            words["action"] = "store_true"
        else:
            words |= _KINDS.get(str(own.type).removesuffix(" | None"), {})
        if "metavar" in own.metadata:
            words["metavar"] = own.metadata["metavar"]
        words |= special.get(name, {})
        group.add_argument(words.pop("option", f"--{name.replace('_', '-')}"), **words)


def given_fields(arguments: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """The values of those fields of a dataclass that have an option."""
    names = [own.name for own in dataclasses.fields(settings)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def _shown(default: object) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)

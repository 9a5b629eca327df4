"""The options of the training scripts, made from the fields of what they set: each is said once, there."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_adapter.commands.arguments import seed_number

if TYPE_CHECKING:  # slow to import: a mistyped option of a script without a training is answered without
    from llama_adapter.training.recipes import AdapterPlan
    from llama_adapter.training.trainer import TrainingSettings

VISION_FIELDS = ("tower", "depths", "bottleneck", "image_tokens", "cache")
# What a field's annotation is on the command line.
_KINDS: dict[str, dict[str, Any]] = {
    "int": {"type": int},
    "float": {"type": float},
    "str": {},
    "Path": {"type": Path},
    "Sequence[int]": {"type": int, "nargs": "+"},
}


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Everything in `TrainingSettings`, and in `AdapterPlan` all but pictures and where it computes."""
    from llama_adapter.training.recipes import AdapterPlan

    adapter = parser.add_argument_group("adapter")
    add_fields(adapter, AdapterPlan, ("start_from", "method"))
    adapter.add_argument(
        "--option",
        dest="options",
        action="append",
        type=_option,
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the method, such as prompt_length=20; can be given several times",
    )
    adapter.add_argument("--prompt-length", type=int, metavar="K", help="prompts in each layer (10)")
    add_fields(adapter, AdapterPlan, ("adapted_layers", "template"))
    training = parser.add_argument_group("training")
    add_settings(training)
    add_fields(training, AdapterPlan, ("gradient_checkpointing",))
    training.add_argument("--resume", action="store_true", help="go on with the run in --output")


def add_settings(group: Any, *, leave_out: Collection[str] = ()) -> None:
    """The options for the fields of `TrainingSettings`, some left out."""
    from llama_adapter.training.trainer import TrainingSettings

    # What a type alone does not say.
    special: dict[str, dict[str, Any]] = {
        "seed": {"type": seed_number},
        "rates": {
            "option": "--rate",
            "action": "append",
            "type": _group_rate,
            "default": [],
            "metavar": "GROUP=VALUE",
        },
    }
    names = [own.name for own in dataclasses.fields(TrainingSettings) if "help" in own.metadata]
    add_fields(group, TrainingSettings, [name for name in names if name not in leave_out], special)


def add_vision_options(parser: argparse.ArgumentParser) -> None:
    """The tower, what is taken from it, and how that reaches the prompts."""
    from llama_adapter.training.recipes import AdapterPlan

    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--images",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="--no-images trains on the text of the same rows alone",
    )
    add_fields(group, AdapterPlan, VISION_FIELDS)


def add_fields(
    group: Any,
    settings: Any,
    names: Collection[str],
    special: Mapping[str, Mapping[str, Any]] = {},
) -> None:
    """An option for each of some fields of a dataclass: its type, default and help are the field's.

    Args:
        special: for some fields, argparse's arguments in place of these, "option" being its name.
    """
    fields = {own.name: own for own in dataclasses.fields(settings)}
    for name in names:
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


def _shown(default: object) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)


def _option(text: str) -> tuple[str, str]:
    """An option's type: a setting of the method, "prompt_length=20"."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=VALUE, such as prompt_length=20")
    return name.strip().replace("-", "_"), value.strip()


def _group_rate(text: str) -> tuple[str, float]:
    """An option's type: a group of parameters and its rate, "gates=0.003"."""
    group, _, value = text.partition("=")
    try:
        return group.strip(), float(value)
    except ValueError:
        said = f"{text}: expected GROUP=VALUE, such as gates=0.003"
        raise argparse.ArgumentTypeError(said) from None


def rows_kept_back(arguments: argparse.Namespace) -> list[object]:
    """The words by which a scoring script reads the rows that a training kept back."""
    # Of all rows others are kept back than of the first few.
    rows = "--validation-rows" if arguments.limit is None else "--limit"
    return [rows, arguments.validation_rows, "--split", arguments.split]


def training_settings(arguments: argparse.Namespace, **changed: Any) -> TrainingSettings:
    """The settings that `add_settings` read; ``changed`` are fields in place of what was read."""
    from llama_adapter.training.trainer import TrainingSettings

    given = _read(arguments, TrainingSettings)
    return TrainingSettings(**{**given, "rates": dict(given.get("rates", ())), **changed})


def adapter_plan(arguments: argparse.Namespace) -> AdapterPlan:
    """The plan that `add_training_options`, `add_vision_options` and `add_model_options` read."""
    from llama_adapter.training.recipes import AdapterPlan

    options: dict[str, Any] = {}
    if arguments.prompt_length is not None:
        options["prompt_length"] = arguments.prompt_length
    options |= arguments.options
    return AdapterPlan(**{**_read(arguments, AdapterPlan), "options": options})


def _read(arguments: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """The fields of a dataclass for which there were options."""
    names = [own.name for own in dataclasses.fields(settings)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}

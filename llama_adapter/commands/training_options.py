"""The options of the training scripts, made from the fields of the dataclasses that they fill."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_adapter.commands.arguments import seed_number
from llama_adapter.commands.field_options import add_fields, described_fields, given_fields

if TYPE_CHECKING:  # slow to import; mistyped options are answered without it
    from llama_adapter.training.plan import AdapterPlan
    from llama_adapter.training.settings import TrainingSettings

VISION_FIELDS = ("tower", "depths", "bottleneck", "image_tokens", "cache")


def add_output_option(parser: argparse.ArgumentParser) -> None:
    """Add --output."""
    parser.add_argument(
        "--output", required=True, type=Path, help="folder of the run and of the best adapter"
    )


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add options for `TrainingSettings` and for `AdapterPlan`, except for pictures and devices."""
    from llama_adapter.training.plan import AdapterPlan

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
    training.add_argument("--resume", action="store_true", help="continue the run in --output")


def add_settings(group: Any, *, leave_out: Collection[str] = ()) -> None:
    """Add options for the fields of `TrainingSettings`, except those to leave out."""
    from llama_adapter.training.settings import TrainingSettings

    # What the type of a field does not tell.
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
    names = [name for name in described_fields(TrainingSettings) if name not in leave_out]
    add_fields(group, TrainingSettings, names, special)


def add_vision_options(parser: argparse.ArgumentParser, *, more: Sequence[str] = ()) -> None:
    """Add options for the tower, its features, and how they reach the prompts.

    Args:
        more: other fields of `AdapterPlan` to add.
    """
    from llama_adapter.training.plan import AdapterPlan

    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--images",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="--no-images trains on only the text of the same rows",
    )
    add_fields(group, AdapterPlan, (*VISION_FIELDS, *more))


def _option(text: str) -> tuple[str, str]:
    """A type for options: a setting of the method, such as "prompt_length=20"."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=VALUE, such as prompt_length=20")
    return name.strip().replace("-", "_"), value.strip()


def _group_rate(text: str) -> tuple[str, float]:
    """A type for options: a group of parameters and its rate, such as "gates=0.003"."""
    group, _, value = text.partition("=")
    try:
        return group.strip(), float(value)
    except ValueError:
        said = f"{text}: expected GROUP=VALUE, such as gates=0.003"
        raise argparse.ArgumentTypeError(said) from None


def rows_kept_back(arguments: argparse.Namespace) -> list[object]:
    """The arguments with which a scoring script reads the rows that a training kept back."""
    # With --limit, other rows are kept back than of all rows.
    rows = "--validation-rows" if arguments.limit is None else "--limit"
    return [rows, arguments.validation_rows, "--split", arguments.split]


def training_settings(arguments: argparse.Namespace, **changed: Any) -> TrainingSettings:
    """The settings given by the options of `add_settings`. Fields in ``changed`` take precedence."""
    from llama_adapter.training.settings import TrainingSettings

    given = given_fields(arguments, TrainingSettings)
    return TrainingSettings(**{**given, "rates": dict(given.get("rates", ())), **changed})


def adapter_plan(arguments: argparse.Namespace) -> AdapterPlan:
    """The plan given by `add_training_options`, `add_vision_options` and `add_model_options`."""
    from llama_adapter.training.plan import AdapterPlan

    options: dict[str, Any] = {}
    if arguments.prompt_length is not None:
        options["prompt_length"] = arguments.prompt_length
    options |= arguments.options
    return AdapterPlan(**{**given_fields(arguments, AdapterPlan), "options": options})

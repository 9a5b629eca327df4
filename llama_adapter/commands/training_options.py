"""What the training scripts have in common: their options, and the model and pictures that these ask for."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_adapter.commands.arguments import load_model, picture_features, seed_number
from llama_adapter.common.errors import UsageError

if TYPE_CHECKING:  # slow to import: --help and a mistyped option are answered without torch
    import torch
    from torch import Tensor

    from llama_adapter.data.records import EncodeSummary, Example, PictureFile, Record
    from llama_adapter.methods.projection import VisionConfig
    from llama_adapter.model import LlamaAdapter
    from llama_adapter.training.trainer import TrainingSettings
    from llama_adapter.vision.tower import VisionTower

DEFAULT_TOWER = "clip-mini"


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Everything in `TrainingSettings`, and the adapter's sizes."""
    from llama_adapter.methods.table import METHODS
    from llama_adapter.training.trainer import TrainingSettings

    defaults = TrainingSettings()
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument(
        "--start-from",
        metavar="ADAPTER",
        help="train this one on: name, folder or hub id (default: a new one)",
    )
    adapter.add_argument(
        "--method",
        help=f"what is trained: {', '.join(METHODS)}, or several joined by + (default: prompts, or that of "
        "--start-from, whose parts are kept)",
    )
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
    adapter.add_argument(
        "--adapted-layers", type=int, metavar="L", help="topmost layers (default: N - N // 16)"
    )
    adapter.add_argument(
        "--template",
        help="text format: alpaca, brief, chat or scienceqa (default: alpaca, or that of --start-from)",
    )
    training = parser.add_argument_group("training")
    for name, kind, text in (
        ("epochs", int, "passes over the rows"),
        ("warmup_epochs", float, "passes in which the learning rate rises"),
        ("batch_size", int, "rows an optimiser step, of all processes together"),
        ("base_learning_rate", float, "the peak is this * batch size / 256"),
        ("learning_rate", float, "the peak itself, in place of that rule"),
        ("weight_decay", float, "AdamW's"),
        ("max_grad_norm", float, "scale gradients down to this norm"),
        ("max_steps", int, "end the run, and its schedule, after so many steps"),
        ("validate_every", int, "steps between validations; the best adapter is kept"),
        ("checkpoint_every", int, "steps between checkpoints"),
        (
            "max_tokens",
            int,
            "tokens through the decoder at once, in each process; gradients of a larger batch accumulate",
        ),
        ("seed", seed_number, "of the order of the rows and the first prompts"),
    ):
        default = getattr(defaults, name)
        shown = "" if default is None else f" ({default:g})"
        training.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text + shown)
    training.add_argument(
        "--rate",
        dest="rates",
        action="append",
        type=_group_rate,
        default=[],
        metavar="GROUP=VALUE",
        help="a peak of its own for a group of parameters: prompts, gates, projection, scales ...; can be "
        "given several times (default: --learning-rate for all)",
    )
    training.add_argument(
        "--mean-over",
        default=defaults.mean_over,
        help="tokens: a long answer weighs more than a short one; rows: all alike, "
        f"which makes answers shorter ({defaults.mean_over})",
    )
    training.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="compute each layer again in the backward pass: less memory, a third more time",
    )
    training.add_argument("--resume", action="store_true", help="go on with the run in --output")


def training_settings(arguments: argparse.Namespace) -> TrainingSettings:
    """The settings that `add_training_options` read."""
    from llama_adapter.training.trainer import TrainingSettings

    names = TrainingSettings.__dataclass_fields__
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    return TrainingSettings(**{**given, "rates": dict(arguments.rates)})


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


def add_vision_options(parser: argparse.ArgumentParser) -> None:
    """The tower, what is taken from it, and how that reaches the prompts."""
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--images",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="--no-images trains on the text of the same rows alone",
    )
    group.add_argument(
        "--tower", help=f"name, folder, hub id or MODEL:TAG of an open_clip model ({DEFAULT_TOWER})"
    )
    group.add_argument(
        "--depths",
        type=int,
        nargs="+",
        metavar="N",
        help="depths of the tower (default: four, evenly spaced)",
    )
    group.add_argument("--bottleneck", type=int, metavar="N", help="width of the projection's middle (128)")
    group.add_argument("--image-tokens", type=int, metavar="N", help="1 for all prompts, or K, one each (1)")
    group.add_argument("--cache", type=Path, metavar="DIR", help="where features are kept (the user's cache)")


def load_model_to_train(
    arguments: argparse.Namespace, images: Iterable[PictureFile] = ()
) -> tuple[LlamaAdapter, dict[PictureFile, Tensor]]:
    """The model with the adapter that `add_training_options` and `add_vision_options` ask for.

    Joins the other processes of the run, where there are any.

    Args:
        images: the pictures of all rows; where there are none, a new adapter is one for text alone.

    Returns:
        the model, its active adapter named "trained"; and (F,) features of each picture.
    """
    from llama_adapter.common.processes import running_processes
    from llama_adapter.methods.decoder import checkpoint_activations
    from llama_adapter.methods.projection import Projection
    from llama_adapter.methods.table import parse_options
    from llama_adapter.training.trainer import parameter_groups

    processes = running_processes()
    if processes.sharded and arguments.device is None:
        # The whole of it may fit no accelerator: it goes there by shards, when the training begins.
        arguments = argparse.Namespace(**{**vars(arguments), "device": "cpu"})
    sizes = _given(arguments, "prompt_length", "adapted_layers")
    settings = {**sizes, **_given(arguments, "template", "method")}
    sight = _given(arguments, "tower", "depths", "bottleneck", "image_tokens")
    images = list(dict.fromkeys(images))
    if sight and not arguments.images:
        option = next(iter(sight)).replace("_", "-")
        raise UsageError(f"--{option} is for pictures, which --no-images leaves out; give one of the two")
    start = None
    if arguments.start_from is None:
        model = load_model(arguments)
    else:
        model = load_model(argparse.Namespace(**{**vars(arguments), "adapter": arguments.start_from}))
        start = model.get_adapter(model.active_adapter)
        config = start.config
        kept = [name for name, _ in arguments.options if name in config.options]
        if settled := [*sizes, *kept, *(sight if config.vision is not None else ())]:
            option = settled[0].replace("_", "-")
            raise UsageError(f"--{option} is settled by --start-from {arguments.start_from}; leave it out")
        inherited = {name: getattr(config, name) for name in ("adapted_layers", "template", "method")}
        settings = {**inherited, **config.options, "vision": config.vision, **settings}
        if settings["template"] == config.template:
            settings["template_date"] = config.template_date
        missing = [kind for kind in config.method.split("+") if kind not in settings["method"].split("+")]
        if missing:
            raise UsageError(
                f"--method {arguments.method} leaves out {missing[0]!r}, which --start-from "
                f"{arguments.start_from} has; name it too"
            )
    if arguments.resume:
        settings["template_date"] = _date_of_run(arguments.output)
    method = settings.get("method", "prompts")
    settings |= parse_options(method, dict(arguments.options))
    tower = None
    if images:
        if settings.get("vision") is None:
            tower, settings["vision"] = _new_sight(arguments, sight, model.decoder.device)
        else:
            tower = model.tower()
    if start is not None:
        model.delete_adapter(model.active_adapter)  # its name may be the same
    adapter = model.new_adapter("trained", seed=arguments.seed, **settings)
    parameter_groups(adapter, training_settings(arguments))  # a mistyped --rate is told before long work
    features: dict[PictureFile, Tensor] = {}
    if tower is not None:
        with processes.main_first():  # the others find them in the cache
            features = picture_features(tower, arguments.cache, images)
        projection = adapter.find(Projection)
        assert projection is not None
        projection.fit(features.values())
    if start is not None:
        adapter.load_state_dict(start.state_dict(), strict=False)  # new parts stay as they are
    if arguments.gradient_checkpointing:
        checkpoint_activations(model.decoder)
    return model, features


def encode_rows(
    records: Sequence[Record], model: LlamaAdapter, name: str, *, max_length: int
) -> tuple[list[Example], EncodeSummary]:
    """Records as tokens for the model's active adapter; says what became of them, under a name."""
    from llama_adapter.data.records import encode_and_count

    assert model.tokenizer is not None
    examples, summary = encode_and_count(
        records,
        template=model.template(),
        tokenizer=model.tokenizer,
        max_length=max_length,
        date=model.template_date(),
    )
    say_encoded(name, summary)
    return examples, summary


def say_encoded(name: str, summary: EncodeSummary) -> None:
    """Say what became of rows as tokens, on standard error; warn where most are lost."""
    from llama_adapter.common.processes import running_processes

    running_processes().say(f"{name}: {summary}", file=sys.stderr)
    if summary.warning is not None:
        running_processes().say(f"{name}: {summary.warning}", file=sys.stderr)


def _date_of_run(output: Path) -> str | None:
    """The day that the chat template wrote when a run was started, where it writes one."""
    try:
        adapter = json.loads((output / "run.json").read_text(encoding="utf-8"))["adapter"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the run's folder says what is wrong with it when it is opened
    return adapter.get("template_date") if isinstance(adapter, dict) else None


def _new_sight(
    arguments: argparse.Namespace, sight: dict[str, Any], device: torch.device
) -> tuple[VisionTower, VisionConfig]:
    from llama_adapter.methods.projection import VisionConfig
    from llama_adapter.vision.tower import load_tower

    tower = load_tower(
        sight.pop("tower", DEFAULT_TOWER),
        depths=sight.pop("depths", None),
        weights=arguments.weights,
        device=device,
    )
    vision = VisionConfig(
        tower=tower.name,
        tower_fingerprint=tower.fingerprint,
        depths=tower.depths,
        feature_width=tower.feature_width,
        **sight,
    )
    return tower, vision


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    values = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}

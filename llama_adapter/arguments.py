"""Command-line options that several commands share, each said once, and the model that they ask for."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llama_adapter import locations
from llama_adapter.errors import UsageError
from llama_adapter.files import write_json
from llama_adapter.sampling import Sampling

if TYPE_CHECKING:  # slow to import: --help and a mistyped option are answered without torch
    import torch
    from torch import Tensor

    from llama_adapter.config import VisionConfig
    from llama_adapter.data import PictureFile, Record
    from llama_adapter.model import LlamaAdapter
    from llama_adapter.training import TrainingSettings
    from llama_adapter.vision import VisionTower

DEFAULT_BASE = "smollm2-135m-instruct"
DEFAULT_TOWER = "clip-mini"
# The shipped adapters, the one that does most first.
SHIPPED_ADAPTERS = ("smollm2-135m-vision", "smollm2-135m-alpaca")


class Parser(argparse.ArgumentParser):
    """argparse's, with mistakes told in one line that names the command, and no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # A subcommand's parser is called through here; argparse leaves its unknown options to the main one.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown option or word: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def positive_int(text: str) -> int:
    """An option's type: a whole number, 1 or more."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


positive_int.__name__ = "whole number above 0"  # argparse tells it: invalid ... value: '0'


def positive_float(text: str) -> float:
    """An option's type: a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


positive_float.__name__ = "number above 0"


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    """--weights, the folder of names."""
    parser.add_argument("--weights", metavar="DIR", help="folder in which names are looked for")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--base, --weights, --device, --dtype."""
    parser.add_argument(
        "--base",
        help=f"name, folder or hub id of a decoder (default: the adapter's own, else {DEFAULT_BASE})",
    )
    add_weights_option(parser)
    parser.add_argument("--device", help="cpu, cuda or mps (default: the fastest there is)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        metavar="DTYPE",
        help="float32, bfloat16 or float16 (default: what is fast on the device)",
    )


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """--adapter, by default the shipped one that does most."""
    parser.add_argument(
        "--adapter",
        help="name, folder or hub id; none is the bare base (default: the shipped one that does most)",
    )


def load_model(arguments: argparse.Namespace) -> LlamaAdapter:
    """The model that --base, --adapter (where the command has it), --weights, --device and --dtype ask for.

    Without --adapter the best shipped one answers that was trained for the base, else, with a line on
    standard error, the bare base.
    """
    from llama_adapter.model import NO_ADAPTER, LlamaAdapter

    quieten_libraries()
    options = {name: getattr(arguments, name) for name in ("weights", "device", "dtype")}
    adapter = getattr(arguments, "adapter", NO_ADAPTER)
    if adapter is None:
        adapter = _best_shipped(arguments.base, arguments.weights)
    if adapter not in (None, NO_ADAPTER):
        return LlamaAdapter.from_pretrained(adapter, base=arguments.base, **options)
    model = LlamaAdapter.from_base(DEFAULT_BASE if arguments.base is None else arguments.base, **options)
    if adapter is None:
        print(f"no shipped adapter fits base {model.base!r}; the bare base answers", file=sys.stderr)
    return model


def _best_shipped(base: str | None, weights: str | Path | None) -> str | None:
    from llama_adapter.checkpoint import read_config

    there = locations.list_weights("adapter", weights)
    wanted = locations.resolve(DEFAULT_BASE if base is None else base, kind="base", weights=weights)
    for name in SHIPPED_ADAPTERS:
        if name in there:
            own = read_config(there[name]).base
            with suppress(UsageError):  # its base is not here, so it is another one
                if locations.resolve(own, kind="base", weights=weights) == wanted:
                    return name
    return None


def quieten_libraries() -> None:
    """Keep the libraries' warnings and the bar for loading weights off standard error, for commands.

    What goes wrong is told in one line of our own. The bars of downloads from the hub stay.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    bars = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # the hub's as well
    if bars:
        enable_progress_bars()


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Everything in `Sampling`."""
    defaults = Sampling()
    for name, kind, text in (
        ("max_new_tokens", int, "tokens of an answer at most"),
        ("temperature", float, "0 takes the likeliest token, more varies more"),
        ("top_p", float, "draw among the likeliest tokens of this total probability; 1 keeps all"),
        ("top_k", int, "draw among so many of the likeliest tokens; 0 keeps all"),
        ("repetition_penalty", float, "above 1 keeps from repeating"),
        ("seed", int, "makes the answer the same every time"),
    ):
        default = getattr(defaults, name)
        shown = "" if default is None else f" ({default:g})"
        metavar = "N" if kind is int else "X"
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, metavar=metavar, help=text + shown
        )


def sampling_settings(arguments: argparse.Namespace) -> Sampling:
    """The sampling that `add_sampling_options` read."""
    return Sampling(**{name: getattr(arguments, name) for name in Sampling.__dataclass_fields__})


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """--json FILE, which every evaluation has."""
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures as one flat JSON object")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Everything in `TrainingSettings`, and the adapter's sizes."""
    from llama_adapter.training import TrainingSettings

    defaults = TrainingSettings()
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument(
        "--start-from",
        metavar="ADAPTER",
        help="train this one on: name, folder or hub id (default: a new one)",
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
        ("gate_learning_rate", float, "the gates' own peak (default: the prompts')"),
        ("projection_learning_rate", float, "that of the pictures' projection (default: the prompts')"),
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
        ("seed", int, "of the order of the rows and the first prompts"),
    ):
        default = getattr(defaults, name)
        shown = "" if default is None else f" ({default:g})"
        training.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text + shown)
    training.add_argument(
        "--mean-over",
        default=defaults.mean_over,
        help=f"tokens: a long answer weighs more than a short one; rows: all alike ({defaults.mean_over})",
    )
    training.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="compute each layer again in the backward pass: less memory, a third more time",
    )
    training.add_argument("--resume", action="store_true", help="go on with the run in --output")


def training_settings(arguments: argparse.Namespace) -> TrainingSettings:
    """The settings that `add_training_options` read."""
    from llama_adapter.training import TrainingSettings

    names = TrainingSettings.__dataclass_fields__
    return TrainingSettings(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})


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
    from llama_adapter.decoder import checkpoint_activations
    from llama_adapter.processes import running_processes

    processes = running_processes()
    if processes.sharded and arguments.device is None:
        # The whole of it may fit no accelerator: it goes there by shards, when the training begins.
        arguments = argparse.Namespace(**{**vars(arguments), "device": "cpu"})
    sizes = _given(arguments, "prompt_length", "adapted_layers")
    settings = {**sizes, **_given(arguments, "template")}
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
        if settled := [*sizes, *(sight if config.vision is not None else ())]:
            option = settled[0].replace("_", "-")
            raise UsageError(f"--{option} is settled by --start-from {arguments.start_from}; leave it out")
        inherited = {name: getattr(config, name) for name in ("prompt_length", "adapted_layers", "template")}
        settings = {**inherited, "vision": config.vision, **settings}
    features: dict[PictureFile, Tensor] = {}
    if images:
        if settings.get("vision") is None:
            tower, settings["vision"] = _new_sight(arguments, sight, model.decoder.device)
        else:
            tower = model.tower()
        with processes.main_first():  # the others find them in the cache
            features = picture_features(tower, arguments.cache, images)
    if start is not None:
        model.delete_adapter(model.active_adapter)  # its name may be the same
    adapter = model.new_adapter("trained", seed=arguments.seed, **settings)
    if adapter.projection is not None and features:
        adapter.projection.fit(features.values())
    if start is not None:
        adapter.load_state_dict(start.state_dict(), strict=False)  # a new projection stays as it is
    if arguments.gradient_checkpointing:
        checkpoint_activations(model.decoder)
    return model, features


def _new_sight(
    arguments: argparse.Namespace, sight: dict[str, Any], device: torch.device
) -> tuple[VisionTower, VisionConfig]:
    from llama_adapter.config import VisionConfig
    from llama_adapter.vision import load_tower

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


def picture_features(
    tower: VisionTower, cache: Path | None, images: Iterable[PictureFile]
) -> dict[PictureFile, Tensor]:
    """(F,) features of each picture, read from the cache or computed, with progress."""
    from llama_adapter.features import FeatureCache
    from llama_adapter.progress import RowProgress

    images = list(dict.fromkeys(images))
    encoded = FeatureCache(tower, cache).encode(images, progress=RowProgress("pictures", len(images)))
    return dict(zip(images, encoded, strict=True))


def add_picture_scoring_options(parser: argparse.ArgumentParser, *, default_split: str) -> None:
    """What the evaluations with pictures have in common."""
    parser.add_argument(
        "--data",
        required=True,
        help="a folder with captions.json or qa.json beside images/, a file, or easy-vqa",
    )
    parser.add_argument(
        "--split",
        help=f"of rows that name one (with --validation-rows train, else {default_split}); others count",
    )
    parser.add_argument(
        "--image-root", type=Path, help="where names of pictures start (default: by the data)"
    )
    parser.add_argument(
        "--validation-rows",
        type=positive_int,
        metavar="N",
        help="only the rows that train.vqa keeps back with the same number",
    )
    parser.set_defaults(default_split=default_split)
    parser.add_argument("--limit", type=positive_int, help="so many pictures, drawn by --seed (default: all)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the rows that are drawn and the shuffled pictures"
    )
    parser.add_argument("--batch-size", type=positive_int, default=16, help="questions answered at once (16)")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="where features are kept (the user's cache)"
    )
    add_adapter_option(parser)
    add_model_options(parser)


@dataclass(frozen=True)
class ToScore:
    """A model, the rows that it is asked, and (F,) features of each of their pictures, if it sees any."""

    model: LlamaAdapter
    records: list[Record]
    features: dict[PictureFile, Tensor]


def load_records_to_score(arguments: argparse.Namespace) -> ToScore:
    """What `add_picture_scoring_options` asks for. Raises UsageError where no row has a picture."""
    from llama_adapter.data import draw_pictures, read_records, split_records
    from llama_adapter.model import NO_ADAPTER

    split = arguments.split or ("train" if arguments.validation_rows else arguments.default_split)
    records, summary = read_records(arguments.data, image_root=arguments.image_root, split=split)
    print(summary, file=sys.stderr)
    if arguments.validation_rows is not None:  # of all rows, as train.vqa does it
        _, records = split_records(records, validation_rows=arguments.validation_rows)
    records = [record for record in records if record.images]
    if not records:
        raise UsageError(f"{arguments.data}: no row names a picture; score it with eval.alpaca")
    if arguments.limit is not None:
        records = draw_pictures(records, arguments.limit, seed=arguments.seed)
    model = load_model(arguments)
    if model.active_adapter == NO_ADAPTER:
        raise UsageError("there is no adapter to score; name one with --adapter")
    if not model.sees():
        return ToScore(model, records, {})
    images = [image for record in records for image in record.images]
    return ToScore(model, records, picture_features(model.tower(), arguments.cache, images))


def report(figures: dict[str, Any], path: Path | None) -> None:
    """Write an evaluation's figures where --json asks for it ("-" is standard output)."""
    if path is not None and str(path) == "-":
        json.dump(figures, sys.stdout)
        print()
    elif path is not None:
        write_json(path, figures)

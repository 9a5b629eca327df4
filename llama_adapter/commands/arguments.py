"""Options that several commands share, and loading the model that they describe."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import write_json
from llama_adapter.weights.catalogue import DEFAULT_BASE

if TYPE_CHECKING:  # slow to import; --help and mistyped options are answered without torch
    from llama_adapter.model import LlamaAdapter

FORMATS = ("int8", "int4", "nf4")  # for --quantize. formats.py has them too, but imports torch.


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line that names the command. Options can't be abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # A subcommand's parser is called here. argparse would leave its unknown options to the main parser.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown option or word: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


Number = TypeVar("Number", int, float)


def _number_type(
    kind: Callable[[str], Number], fits: Callable[[Number], bool], name: str
) -> Callable[[str], Number]:
    """A type for options: a number of a kind and range.

    For errors, argparse uses `name`: invalid ... value: '0'.
    """

    def read(text: str) -> Number:
        number = kind(text)
        if not fits(number):
            raise ValueError
        return number

    read.__name__ = name
    return read


positive_int = _number_type(int, lambda number: number >= 1, "whole number above 0")
positive_float = _number_type(float, lambda number: 0 < number < math.inf, "number above 0")
seed_number = _number_type(int, lambda number: 0 <= number < 2**32, "seed of 0 to 2**32 - 1")


def add_weights_option(parser: argparse.ArgumentParser) -> None:
    """Add --weights, the folder in which names are looked up."""
    parser.add_argument("--weights", metavar="DIR", help="look up names in this folder")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", help="cpu, cuda or mps (default: the fastest available)")


def add_image_root_option(parser: argparse.ArgumentParser) -> None:
    """Add --image-root."""
    parser.add_argument(
        "--image-root", type=Path, help="folder of pictures with relative names (default: the data's)"
    )


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    """Add --cache."""
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="where features are kept (the user's cache)"
    )


def add_model_options(
    parser: argparse.ArgumentParser, *, answers: bool = False, base: str = DEFAULT_BASE
) -> None:
    """Add --base, --weights, --device, --dtype and --quantize.

    Args:
        answers: the command only answers, so int8 is the default where it is fast.
        base: what the help names as the command's default base.
    """
    parser.add_argument(
        "--base",
        help=f"name, folder, hub id or GGUF file of a decoder (default: the adapter's own, else {base})",
    )
    add_weights_option(parser)
    add_device_option(parser)
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        metavar="DTYPE",
        help="float32, bfloat16 or float16 (default: what is fast on the device)",
    )
    parser.add_argument(
        "--quantize",
        choices=(*FORMATS, "none"),
        default="auto" if answers else None,
        metavar="FORMAT",
        help=f"keep the decoder's weights as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, which takes less "
        f"memory; none keeps them unchanged (default: {'int8 on a CPU, else none' if answers else 'none'})",
    )


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """Add --adapter. The default is "auto"."""
    parser.add_argument(
        "--adapter",
        help="name, folder or hub id; none is the bare base; auto is the base's shipped adapter that sees "
        "where there is a picture, else its shipped text adapter (auto)",
    )


def load_model(arguments: argparse.Namespace) -> LlamaAdapter:
    """Load the model described by --base, --adapter (if the command has it), --weights, --device, --dtype and
    --quantize.

    If no adapter is named and no shipped one fits the base, it is the bare base, with a line on standard
    error.
    """
    from llama_adapter.model import NO_ADAPTER, LlamaAdapter
    from llama_adapter.surface.folders import shipped_adapters
    from llama_adapter.surface.named_adapters import AUTO

    quieten_libraries()
    options = {name: getattr(arguments, name) for name in ("weights", "device", "dtype", "quantize")}
    if options["quantize"] == "auto" and options["dtype"] not in (None, "auto"):
        options["quantize"] = "none"  # a dtype was asked for
    base, adapter = arguments.base, getattr(arguments, "adapter", NO_ADAPTER)
    if adapter is None:
        adapter = AUTO
    none_fits = adapter == AUTO and not shipped_adapters(base, arguments.weights)
    if adapter != NO_ADAPTER and not none_fits:
        return LlamaAdapter.from_pretrained(adapter, base=base, **options)
    base = DEFAULT_BASE if base is None else base
    model = LlamaAdapter.from_base(base, **options)
    if none_fits:  # said once the base is loaded, so that one that can't be is a single line
        print(f"no adapter is shipped for base {base!r}; the bare base answers", file=sys.stderr)
    return model


def quieten_libraries() -> None:
    """Hide the libraries' warnings and their progress bar for loading weights, in commands.

    Errors are reported by our own one-line messages. The bars for downloads from the hub stay.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    warnings.showwarning = _print_warning
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    bars = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # of the hub too
    if bars:
        enable_progress_bars()


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line, without the place in the code that gave it."""
    print(message, file=sys.stderr)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add --json FILE, which every evaluation has."""
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures as one flat JSON object")


def report(figures: dict[str, Any], path: Path | None) -> None:
    """Write an evaluation's figures to the file that --json names ("-" is standard output), if any."""
    if path is not None and str(path) == "-":
        json.dump(figures, sys.stdout)
        print()
    elif path is not None:
        write_json(path, figures)

"""llama-adapter convert, average and merge: other formats, the mean of adapters, one folded into its base."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from llama_adapter.commands.arguments import add_model_options, add_weights_option, load_model
from llama_adapter.common.errors import UsageError
from llama_adapter.weights import locations

if TYPE_CHECKING:
    from llama_adapter.methods.adapter import Adapter

DTYPES = ("float32", "float16")
FORMATS = ("llama-adapter", "peft", "pth")


def add_convert_options(parser: argparse.ArgumentParser) -> None:
    """The options of `convert`."""
    parser.add_argument("source", metavar="FROM", help="a .pth file; or an adapter's name, folder or hub id")
    parser.add_argument("target", metavar="TO", type=Path, help="the folder or the .pth file to write")
    parser.add_argument(
        "--to",
        choices=FORMATS,
        metavar="FORMAT",
        help="llama-adapter or peft, a folder; or pth, the authors' file (default: pth if TO ends with .pth, "
        "else llama-adapter)",
    )
    parser.add_argument(
        "--base",
        help="what a .pth or PEFT's folder was trained for: name, folder or hub id of the decoder",
    )
    parser.add_argument(
        "--raw-gates",
        action="store_true",
        help="the .pth is for code that applies no tanh to the gates, as the authors' inference code; "
        "else (their training code) tanh is applied",
    )
    _add_dtype_option(parser)
    add_weights_option(parser)


def convert(arguments: argparse.Namespace) -> None:
    """llama-adapter convert."""
    from llama_adapter.methods.checkpoint import (
        adapter_folder,
        export_pth,
        import_pth,
        is_peft,
        load_adapter,
    )
    from llama_adapter.methods.decoder import load_shape, load_structure
    from llama_adapter.methods.peft_writing import write_peft

    source, target, weights = arguments.source, arguments.target, arguments.weights
    wanted = arguments.to or ("pth" if target.suffix == ".pth" else "llama-adapter")
    _check_free(target)
    from_pth = source.endswith(".pth") or Path(source).is_file()
    if from_pth:
        folder, given = Path(source), "pth"
    else:
        folder = adapter_folder(locations.resolve(source, kind="adapter", weights=weights))
        given = "peft" if is_peft(folder) else "llama-adapter"
    if arguments.dtype is not None and wanted != "llama-adapter":
        raise UsageError(f"--dtype goes with --to llama-adapter; {wanted} has its own")
    if wanted == given and arguments.dtype is None:
        raise UsageError(
            f"{source} already has the format {given}; choose another one with --to: {', '.join(FORMATS)}"
        )
    if from_pth:
        if arguments.base is None:
            raise UsageError(f"give --base, the decoder that {source} was trained for")
        base = locations.resolve(arguments.base, kind="base", weights=weights)
        base_name = locations.name_of(base, kind="base", weights=weights)
        adapter = import_pth(source, base=base_name, shape=load_shape(base), raw_gates=arguments.raw_gates)
        print(_gates_read(adapter, raw=arguments.raw_gates), file=sys.stderr)
    else:
        if arguments.base is not None and given != "peft":
            raise UsageError("--base goes with a .pth or PEFT's folder; this adapter says what its base is")
        adapter = load_adapter(folder, base=arguments.base, weights=weights)
    if wanted == "pth":
        export_pth(adapter, target, raw_gates=arguments.raw_gates)
    elif wanted == "peft":
        base = locations.resolve(adapter.config.base, kind="base", weights=weights)
        write_peft(adapter, target, load_structure(base))
    else:
        _save(adapter, target, arguments.dtype)
    print(target)


def add_average_options(parser: argparse.ArgumentParser) -> None:
    """The options of `average`."""
    parser.usage = "llama-adapter average ADAPTER ADAPTER [ADAPTER ...] --output FOLDER [options]"
    parser.add_argument(
        "adapters",
        metavar="ADAPTER",
        nargs="+",
        help="two or more names, folders or hub ids; the mean gets the last one's config",
    )
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="X", help="how much each adapter counts (all the same)"
    )
    parser.add_argument(
        "--from-last",
        action="append",
        default=[],
        metavar="PART",
        help="a part to copy from the last adapter unchanged, such as projection; may be repeated",
    )
    _add_dtype_option(parser)
    add_weights_option(parser)


def average(arguments: argparse.Namespace) -> None:
    """llama-adapter average."""
    from llama_adapter.methods.averaging import average
    from llama_adapter.methods.checkpoint import load_adapter

    _check_free(arguments.output)
    adapters = {
        name: load_adapter(locations.resolve(name, kind="adapter", weights=arguments.weights))
        for name in arguments.adapters
    }
    if len(adapters) < len(arguments.adapters):
        raise UsageError("an adapter is given twice; let it count more with --shares")
    mean = average(adapters, arguments.shares, from_last=arguments.from_last)
    _save(mean, arguments.output, arguments.dtype)
    print(arguments.output)


def add_merge_options(parser: argparse.ArgumentParser) -> None:
    """The options of `merge`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="name, folder or hub id")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="the folder to write")
    add_model_options(parser)


def merge(arguments: argparse.Namespace) -> None:
    """llama-adapter merge."""
    output: Path = arguments.output
    _check_free(output)
    if arguments.adapter == "none":
        raise UsageError("there is no adapter to merge: give its name, folder or hub id")
    if arguments.quantize not in (None, "none"):
        raise UsageError(
            f"--quantize {arguments.quantize} given; a quantised base can't be merged into: leave it out"
        )
    model = load_model(arguments)
    template = model.template()
    merged = model.merge()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
        whole = Path(temporary) / "merged"
        merged.save_pretrained(whole)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(whole)
        if output.is_dir():
            output.rmdir()  # it is empty: anything else was refused
        shutil.move(whole, output)
    print(f"ask it in the text format of its training: template {template}", file=sys.stderr)
    print(output)


def _add_dtype_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights in a folder of ours (float32); float16 makes the file half as large",
    )


def _save(adapter: Adapter, folder: Path, dtype: str | None) -> None:
    """Write a folder of ours with what --dtype says."""
    import torch

    from llama_adapter.methods.checkpoint import save_adapter

    save_adapter(adapter, folder, dtype=getattr(torch, dtype or "float32"))


def _check_free(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UsageError(f"{target} is there already; move it away or choose another name")


def _gates_read(adapter: Adapter, *, raw: bool) -> str:
    """How the gates of a .pth file were read, and what the other way would have given for the largest."""
    gate = float(adapter.prompts.gates.detach().abs().max())
    largest = math.tanh(gate)
    if raw:
        return (
            f"largest gate: {largest:.4g} as it is in the file; without --raw-gates, {math.tanh(largest):.4g}"
        )
    other = f"with --raw-gates, {gate:.4g}" if gate < 1 else "too large for --raw-gates"
    return f"largest gate: {largest:.4g}, by tanh of the {gate:.4g} in the file; {other}"

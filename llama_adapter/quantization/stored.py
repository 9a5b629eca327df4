"""Quantised decoders on disk: written at the first start, read at later ones, which then build no float
weights.

There is one safetensors file for a base and a format, in the user's cache folder. It can always be made
again. Quantised modules are stored as ``NAME.numbers``, ``NAME.scales`` and ``NAME.offsets``, everything else
under its own name. The metadata have the formats, and which modules share weights.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    __version__,
)
from transformers.initialization import no_init_weights

from llama_adapter.common.files import write_atomically
from llama_adapter.quantization.formats import Quantized
from llama_adapter.quantization.linear import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from llama_adapter.weights.locations import cache_folder

VERSION = 1  # of the file's layout and of how weights are quantised
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".json")  # the files of a base that identify its version


def stored_file(base: str, config: PreTrainedConfig, format: str) -> Path | None:
    """Where a base's quantised weights are or will be. None if versions of the base can't be told apart.

    Args:
        base: a folder, a GGUF file, or a hub id whose config was loaded.
    """
    folder = Path(base)
    if folder.exists():
        within = folder.iterdir() if folder.is_dir() else [folder]
        files = sorted(path for path in within if path.suffix in _WEIGHTS)
        state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        version = json.dumps(state)
    else:
        version = str(getattr(config, "_commit_hash", None) or "")
    if not version:
        return None
    key = hashlib.sha256(f"{VERSION} {__version__} {_full_name(base)} {version}".encode()).hexdigest()[:12]
    return cache_folder() / "quantized" / f"{folder.name}-{format}-{key}.safetensors"


def store(decoder: PreTrainedModel, path: Path, base: str) -> None:
    """Write a quantised decoder. Files of earlier versions of the base are deleted.

    If that fails, a line on standard error says so. The next start is then as slow as this one.

    Args:
        base: as for `stored_file`.
    """
    tensors: dict[str, Tensor] = {}
    formats: dict[str, str] = {}
    columns: dict[str, int] = {}
    shared: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, module in decoder.named_modules():
        if not isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            continue
        weight = module.quantized
        if (first := names.setdefault(id(weight), name)) != name:
            shared[name] = first
            continue
        stored = weight.rows(slice(None))
        assert stored.scales is not None
        formats[name], columns[name] = stored.format, stored.columns
        tensors |= {f"{name}.numbers": stored.numbers, f"{name}.scales": stored.scales}
        if stored.offsets is not None:
            tensors[f"{name}.offsets"] = stored.offsets
    tensors |= {name: value for name, value in decoder.state_dict().items() if ".quantized." not in name}
    described = {"base": _full_name(base), "formats": formats, "shared": shared, "columns": columns}
    metadata = {name: json.dumps(value) for name, value in described.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as temporary:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata)
        alike = path.name.rpartition("-")[0] + "-"  # another folder of the same name has it too
        for old in path.parent.glob(f"*{path.suffix}"):
            if old != path and old.name.startswith(alike) and _outdated(old, _full_name(base)):
                old.unlink(missing_ok=True)
    except OSError as error:
        print(f"the quantised weights can't be stored ({error}); each start makes new ones", file=sys.stderr)


def _full_name(base: str) -> str:
    """The absolute path of a folder or file; a hub id as it is."""
    return str(Path(base).resolve()) if Path(base).exists() else base


def _outdated(file: Path, base: str) -> bool:
    """Whether a stored file is of this base, or of one that is gone, or can't be read."""
    try:
        with safe_open(str(file), framework="pt") as stored:
            of = json.loads(stored.metadata()["base"])
    except (SafetensorError, KeyError, TypeError, ValueError):
        return True
    return of == base or (Path(of).is_absolute() and not Path(of).exists())


def load_stored(base: str, config: PreTrainedConfig, path: Path) -> PreTrainedModel | None:
    """The decoder with the quantised weights in `path`. None if the file is missing or damaged."""
    if not path.is_file():
        return None
    with no_init_weights():  # memory that is never written takes no space
        decoder: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    try:
        with safe_open(str(path), framework="pt") as file:
            _fill(decoder, file)
    except (SafetensorError, KeyError, ValueError, RuntimeError):  # another version, or incomplete
        return None
    try:
        decoder.generation_config = GenerationConfig.from_pretrained(base)
    except OSError:  # the base has no generation config
        decoder.generation_config = GenerationConfig.from_model_config(config)
    return decoder.eval()


def _fill(decoder: PreTrainedModel, file: Any) -> None:
    metadata = {name: json.loads(text) for name, text in file.metadata().items()}
    names = set(file.keys())
    weights = {}
    for name, format in metadata["formats"].items():
        numbers, scales, offsets = (f"{name}.{part}" for part in ("numbers", "scales", "offsets"))
        tensors = Quantized(
            format,
            metadata["columns"][name],
            file.get_tensor(numbers),
            file.get_tensor(scales),
            file.get_tensor(offsets) if offsets in names else None,
        )
        names -= {numbers, scales, offsets}
        weights[name] = QuantizedWeight(tensors)
    others = {name: file.get_tensor(name) for name in names}
    dtype = next((value.dtype for value in others.values() if value.is_floating_point()), torch.float32)
    for name in [*weights, *metadata["shared"]]:
        module: Any = decoder.get_submodule(name)
        weight = weights[metadata["shared"].get(name, name)]
        replacement: nn.Module
        if isinstance(module, nn.Embedding):
            replacement = QuantizedEmbedding(weight, dtype, module.padding_idx)
        else:
            replacement = QuantizedLinear(weight, dtype, others.get(f"{name}.bias"))
        decoder.set_submodule(name, replacement)
    missing, unexpected = decoder.load_state_dict(others, strict=False, assign=True)
    if unexpected or any(".quantized." not in name for name in missing):
        raise ValueError("the file does not fit the decoder")

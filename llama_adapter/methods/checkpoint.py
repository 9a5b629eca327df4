"""Adapters on disk: as a folder of a few MB, and as the authors' .pth.

A folder has llama_adapter_config.json and adapter_model.safetensors. PEFT's folders can be read too
(`llama_adapter.methods.peft_folders`).

Loading checks every key and every shape, and reads only weights: pickled code is never run.

Other trainers save a model's state dict. It has each adapter's tensors and its config (as a tensor of bytes)
under ``adapters.NAME.``. A folder with such a model.safetensors can be read too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import write_atomically, write_json
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.config import AdapterConfig
from llama_adapter.methods.decoder import load_structure, load_tokenizer
from llama_adapter.methods.peft_folders import peft_base, peft_config, read_peft
from llama_adapter.methods.prompts import Prompts, PromptsConfig
from llama_adapter.methods.shape import DecoderShape
from llama_adapter.weights import locations
from llama_adapter.weights.hub import gated_error

CONFIG_FILE = "llama_adapter_config.json"
FORMER_CONFIG_FILE = "adapter_config.json"  # also PEFT's name for its config, which has a "peft_type"
WEIGHTS_FILE = "adapter_model.safetensors"
STATE_FILE = "model.safetensors"  # written by transformers' Trainer
STATE_PREFIX = "adapters."
# The names of tensors in format version 1. The tensors of a projection have kept their names.
_FORMER_NAMES = {"prompts": "prompts.embeddings", "gates": "prompts.gates", "tuning": "scales.values"}


def save_adapter(
    adapter: Adapter,
    folder: str | Path,
    state: dict[str, Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the adapter's two files, each atomically.

    Args:
        state: the tensors, by their names in the adapter; None takes the adapter's own.
        dtype: of the weights in the file. They are read back as float32.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = (adapter.state_dict() if state is None else state).items()
    kept = {
        name: tensor.detach().to("cpu", _kept_dtype(tensor, dtype)).contiguous() for name, tensor in tensors
    }
    with write_atomically(folder / WEIGHTS_FILE) as path:
        path.write_bytes(save(kept, metadata={"format": "pt"}))  # save_file makes it unreadable for others
    write_json(folder / CONFIG_FILE, adapter.config.to_dict())
    former = folder / FORMER_CONFIG_FILE
    if former.is_file() and "peft_type" not in _read_json(former):
        former.unlink()  # it belongs to the adapter that this one replaces


def encode_config(config: AdapterConfig, *, active: bool) -> Tensor:
    """A config as a tensor of bytes, for a model's state dict. ``active``: it answers by default."""
    text = json.dumps({**config.to_dict(), "active": active}, sort_keys=True)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def adapter_folder(name: str, *, subfolder: str = "", **hub: Any) -> Path:
    """The local folder of an adapter. If ``name`` is a hub id, it is downloaded.

    Args:
        subfolder: the adapter's folder inside ``name``.
        hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

    Raises:
        UsageError: there is no such repository or revision, or it can't be reached.
    """
    if Path(name).is_dir():
        return Path(name) / subfolder
    wanted = [CONFIG_FILE, FORMER_CONFIG_FILE, WEIGHTS_FILE, "README.md"]
    patterns = [f"{subfolder}/{file}" if subfolder else file for file in wanted]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns, **hub)) / subfolder
        if (
            not any((folder / file).is_file() for file in wanted[:2])
            and not subfolder
            and _is_state(name, hub)
        ):
            folder = Path(snapshot_download(name, allow_patterns=[STATE_FILE, "README.md"], **hub))
        return folder
    except GatedRepoError:
        raise gated_error("adapter", name) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(
            f"adapter {name!r} is not a folder here and can't be fetched from the hub ({reason}); "
            "check the name, the network, or `hf auth login` for a private one"
        ) from None


def _is_state(name: str, hub: dict[str, Any]) -> bool:
    """Whether a repository's weights are a state dict with adapters. Only their names are downloaded."""
    options = {option: hub[option] for option in ("revision", "token") if option in hub}
    try:
        metadata = get_safetensors_metadata(name, **options)
    except NotASafetensorsRepoError:
        return False
    return any(tensor.startswith(STATE_PREFIX) for tensor in metadata.weight_map)


def is_peft(folder: str | Path) -> bool:
    """Whether a folder holds an adapter of PEFT and none of ours."""
    return not (Path(folder) / CONFIG_FILE).is_file() and peft_config(folder) is not None


def base_of(folder: str | Path) -> str:
    """The base that the adapter in a folder names. Raises UsageError as `read_config`."""
    values = peft_config(folder) if is_peft(folder) else None
    return read_config(folder).base if values is None else peft_base(values, folder)


def read_config(folder: str | Path, *, weights: str | Path | None = None) -> AdapterConfig:
    """Read the config in an adapter folder.

    Args:
        weights: as in `load_adapter`.

    Raises:
        UsageError: no adapter folder, not JSON, another version, or a missing or unknown key. For PEFT's
            folders, as `load_adapter`.
    """
    folder = Path(folder)
    if is_peft(folder):
        return load_adapter(folder, weights=weights).config
    path = folder / CONFIG_FILE
    if not path.is_file():
        path = folder / FORMER_CONFIG_FILE
    if path.is_file():
        return AdapterConfig.from_dict(_read_json(path), str(path))
    if (folder / STATE_FILE).is_file() and (found := load_state_file(folder / STATE_FILE)):
        return next(iter(found.values())).config
    raise UsageError(
        f"{folder} is not an adapter folder: it has no {CONFIG_FILE}; give one that train.* or "
        "save_pretrained wrote"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}); copy the adapter again") from None
    if not isinstance(values, dict):
        found = type(values).__name__
        raise UsageError(f"{path} holds a {found}, expected an object; copy the adapter again")
    return values


def load_adapter(
    folder: str | Path,
    decoder: PreTrainedModel | None = None,
    *,
    base: str | None = None,
    template: str | None = None,
    weights: str | Path | None = None,
) -> Adapter:
    """Load the adapter in a folder, in float32 on the CPU.

    If a trainer saved several adapters, it is the active one.

    The other arguments are only for PEFT's folders, which do not store the sizes of their base:

    Args:
        decoder: its prepared base; None looks for the base that ``base`` or PEFT's config names.
        base: the name of the decoder.
        template: the text format of turns; None takes the base's chat template, else "alpaca".
        weights: where the base is looked for (see `locations.weights_folders`).

    Raises:
        UsageError: as `read_config`; also a truncated file, a missing or extra key, or a wrong size. For
            PEFT's folders, everything that `read_peft` refuses.
    """
    if is_peft(folder):
        named = base or peft_base(peft_config(folder) or {}, folder)
        if decoder is None:
            found = locations.resolve(named, kind="base", weights=weights)
            decoder, named = load_structure(found), locations.name_of(found, kind="base", weights=weights)
            template = template or template_of(load_tokenizer(found))
        return read_peft(folder, decoder, base=named, template=template or "alpaca")
    config = read_config(folder)
    path = Path(folder) / WEIGHTS_FILE
    state = Path(folder) / STATE_FILE
    if not path.is_file():
        if state.is_file() and not (Path(folder) / CONFIG_FILE).is_file():
            return next(iter(load_state_file(state).values()))
        raise UsageError(f"{folder} has no {WEIGHTS_FILE}; copy the adapter again")
    return _build_adapter(config, _load_tensors(path), str(path))


def template_of(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text format of an adapter that names none: the base's chat template, or "alpaca" if it has none."""
    return "chat" if tokenizer is not None and tokenizer.chat_template else "alpaca"


def load_state_file(path: Path) -> dict[str, Adapter]:
    """The adapters in a model's saved state dict by name, the active one first. Empty if it has none.

    Raises:
        UsageError: as `load_adapter`.
    """
    configs: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _load_tensors(path).items():
        if key.startswith(STATE_PREFIX):
            name, _, rest = key.removeprefix(STATE_PREFIX).partition(".")
            if rest == "config":
                configs[name] = tensor
            else:
                states.setdefault(name, {})[rest] = tensor
    adapters, active = {}, set()
    for name, encoded in configs.items():
        source = f"{path}, adapter {name!r}"
        try:
            values = json.loads(bytes(encoded.tolist()))
            if values.pop("active"):
                active.add(name)
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UsageError(f"{source}: its config cannot be read; copy the adapter again") from None
        adapters[name] = _build_adapter(AdapterConfig.from_dict(values, source), states.get(name, {}), source)
    return {name: adapters[name] for name in sorted(adapters, key=lambda name: name not in active)}


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}); it is cut off or not a safetensors file"
        ) from None


def _build_adapter(config: AdapterConfig, state: dict[str, Tensor], source: str) -> Adapter:
    try:
        with torch.device("meta"):  # allocates nothing for sizes that the file may not have
            adapter = Adapter(config)
    except (TypeError, RuntimeError):  # sizes that no tensor can have
        raise UsageError(f"{source}: its config asks for sizes that no tensor has; copy it again") from None
    state = {_FORMER_NAMES.get(name, name): tensor for name, tensor in state.items()}
    expected = adapter.state_dict()
    for name in sorted(set(expected) | set(state)):
        if name not in state:
            raise UsageError(f"{source}: the tensor {name!r} is missing; expected {', '.join(expected)}")
        if name not in expected:
            raise UsageError(f"{source}: the tensor {name!r} is not one of an adapter: {', '.join(expected)}")
        if state[name].shape != expected[name].shape:
            found, wanted = tuple(state[name].shape), tuple(expected[name].shape)
            raise UsageError(f"{source}: {name!r} has the shape {found}, its config says {wanted}")
        if state[name].is_floating_point() != expected[name].is_floating_point():
            kinds = [str(own[name].dtype).removeprefix("torch.") for own in (state, expected)]
            raise UsageError(f"{source}: {name!r} has numbers of type {kinds[0]}, expected {kinds[1]}")
        if not torch.isfinite(state[name]).all():
            raise UsageError(f"{source}: {name!r} has values that are not finite; train again")
    # Copied: the last digits of products depend on where a tensor starts in memory, and in the file it may be
    # unaligned.
    copies = {name: tensor.to(_kept_dtype(tensor), copy=True) for name, tensor in state.items()}
    adapter.load_state_dict(copies, assign=True)
    return adapter


def _kept_dtype(tensor: Tensor, dtype: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype asked for; but integers keep theirs."""
    return dtype if tensor.is_floating_point() else tensor.dtype


def import_pth(path: str | Path, *, base: str, shape: DecoderShape, raw_gates: bool = False) -> Adapter:
    """Read the authors' layout: ``adapter_query.weight`` (L * K, D) and ``layers.N.attention.gate``.

    Their K is 10 and is not in the file; L follows from it. A layer has one gate for each head or, in their
    first version, one for all heads. Their files also have gates of layers below the adapted ones. Nothing
    uses these, and they are ignored.

    Args:
        base: the decoder that it was trained for: name, folder or hub id.
        shape: that decoder's sizes.
        raw_gates: prompts are multiplied by the file's gates themselves, as in the authors' inference code
            (llama/model.py). False: by tanh of the gates, as in their training code (alpaca_finetuning_v1)
            and here.

    Raises:
        UsageError: no such file, sizes that do not fit the base, or a raw gate that can't be a tanh.
    """
    with open(path, "rb") as file:
        try:
            loaded: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # on bytes that are no pickle the unpickler raises all kinds of errors
            reason = " ".join(str(error).split())[:120]
            raise UsageError(f"{path} cannot be read as weights ({reason}); give the authors' .pth") from None
    found = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    state: dict[str, Any] = found if isinstance(found, dict) else {}
    query = state.get("adapter_query.weight")
    if not isinstance(query, Tensor) or query.ndim != 2:
        raise UsageError(
            f"{path} has no adapter_query.weight; expected the authors' layout (LLaMA-Adapter V1)"
        )
    prompt_length = 10
    if query.shape[1] != shape.hidden_size or query.shape[0] % prompt_length:
        raise UsageError(
            f"{path}: adapter_query.weight is {tuple(query.shape)}; for base {base!r} expected "
            f"(layers * {prompt_length}, {shape.hidden_size})"
        )
    config = AdapterConfig(
        base=base,
        shape=shape,
        adapted_layers=query.shape[0] // prompt_length,
        parts=(PromptsConfig(prompt_length),),
    )
    gates = []
    for layer in range(config.first_layer, shape.num_layers):
        gate = state.get(f"layers.{layer}.attention.gate")
        if not isinstance(gate, Tensor) or gate.numel() not in (1, shape.num_heads):
            size = "missing" if gate is None else f"{getattr(gate, 'shape', gate)}"
            raise UsageError(
                f"{path}: layers.{layer}.attention.gate is {size}; expected {shape.num_heads} values, or one"
            )
        gate = gate.double().reshape(-1).expand(shape.num_heads)
        if raw_gates:
            if (gate.abs() >= 1).any():
                raise UsageError(
                    f"{path}: layers.{layer}.attention.gate has {gate[gate.abs().argmax()]:.4g}; raw gates "
                    "have to lie between -1 and 1, since this project applies tanh; leave --raw-gates out"
                )
            gate = gate.atanh()
        gates.append(gate.float())
    prompts = query.float().reshape(config.adapted_layers, prompt_length, -1)
    return _build_adapter(
        config, {"prompts.embeddings": prompts, "prompts.gates": torch.stack(gates)}, str(path)
    )


def export_pth(adapter: Adapter, path: str | Path, *, raw_gates: bool = False) -> None:
    """Write the authors' layout. As in their files, layers that are not adapted get a gate of zero.

    Args:
        raw_gates: write tanh of the gates, for code that does not apply it; see `import_pth`.

    Raises:
        UsageError: the layout can't represent this adapter.
    """
    config = adapter.config
    prompts = adapter.find(Prompts)
    others = [kind for kind in adapter if kind != Prompts.kind]
    if prompts is None or others:
        raise UsageError(
            f"the authors' layout can hold only prompts; this adapter's method is {config.method}"
            + (" and sees pictures" if config.vision is not None else "")
        )
    if config.prompt_length != 10:
        raise UsageError(
            f"the authors' layout has 10 prompts a layer; this adapter has {config.prompt_length}"
        )
    state = {"adapter_query.weight": prompts.plain().detach().flatten(0, 1).float().cpu().contiguous()}
    for layer in range(config.shape.num_layers):
        index = layer - config.first_layer
        gate = prompts.gates[index] if index >= 0 else torch.zeros(config.shape.num_heads)
        gate = gate.tanh() if raw_gates else gate
        state[f"layers.{layer}.attention.gate"] = gate.detach().float().cpu().reshape(1, -1, 1, 1).clone()
    with write_atomically(Path(path)) as temporary:
        torch.save(state, temporary)

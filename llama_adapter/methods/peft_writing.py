"""Writes adapters as folders of PEFT; `peft_folders` says how they are laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import write_atomically, write_json
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.config import AdapterConfig
from llama_adapter.methods.ia3 import TARGETS
from llama_adapter.methods.lora import LoraConfig
from llama_adapter.methods.peft_folders import (
    PEFT_CONFIG_FILE,
    PEFT_WEIGHTS_FILE,
    PREFIX,
    PROMPT_FAMILIES,
    attention_names,
    up_and_down,
)
from llama_adapter.methods.sites import choose_projections, locate_projections


@dataclass(frozen=True)
class _Written:
    """A part as it is written to PEFT's folder: its config, and its tensors by their names in the decoder."""

    values: dict[str, Any]
    tensors: dict[str, Tensor]


def write_peft(adapter: Adapter, folder: str | Path, decoder: PreTrainedModel) -> None:
    """Write an adapter as a folder of PEFT.

    Args:
        decoder: a prepared decoder of its base. Its weights are not used.

    Raises:
        UsageError: an adapter that PEFT's format can't represent.
    """
    config = adapter.config
    if len(config.parts) != 1 or AdapterConfig.kind_of(config.parts[0]) not in _WRITERS:
        raise UsageError(
            f"PEFT's folders can hold only one of {', '.join(_WRITERS)}; this adapter is {config.method}"
            + (" with a projection of pictures" if config.vision is not None else "")
        )
    kind = AdapterConfig.kind_of(config.parts[0])
    written = _WRITERS[kind](adapter, decoder)
    values = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base,
        "inference_mode": True,
        **written.values,
    }
    kept = {f"{PREFIX}{n}": t.detach().float().cpu().contiguous().clone() for n, t in written.tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / PEFT_WEIGHTS_FILE) as path:
        path.write_bytes(save(kept, metadata={"format": "pt"}))
    write_json(folder / PEFT_CONFIG_FILE, values)


def _write_lora(adapter: Adapter, decoder: PreTrainedModel) -> _Written:
    config = adapter.config
    settings = config.find(LoraConfig)
    assert settings is not None
    tensors, sites = {}, set()
    for name, layer, site in _adapted(adapter, decoder):
        if f"lora.{site}.down" in (state := dict(adapter.named_parameters())):
            sites.add(site)
            tensors[f"{name}.lora_A.weight"] = state[f"lora.{site}.down"][layer]
            tensors[f"{name}.lora_B.weight"] = state[f"lora.{site}.up"][layer]
    layers = range(config.first_layer, config.shape.num_layers)
    values = {
        "peft_type": "LORA",
        "r": settings.rank,
        # A whole number if possible: other programs read it as an int.
        "lora_alpha": int(settings.alpha) if float(settings.alpha).is_integer() else settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "target_modules": _short(sorted(sites), decoder),
        "layers_to_transform": list(layers) if config.first_layer else None,
    }
    return _Written(values, tensors)


def _short(sites: list[str], decoder: PreTrainedModel) -> list[str]:
    """The last part of each site's name, as other programs expect it, if no other module has that name."""
    modules = {tuple(name.split(".")[-2:]) for name, _ in decoder.named_modules()}

    def alone(site: str) -> bool:
        last = site.split(".")[-1]
        return len({module for module in modules if module[-1] == last}) == 1

    return [site.split(".")[-1] if alone(site) else site for site in sites]


def _write_ia3(adapter: Adapter, decoder: PreTrainedModel) -> _Written:
    config = adapter.config
    up, down = up_and_down(choose_projections(config.projections, TARGETS), config.projections)
    if down is None:
        raise UsageError(
            "PEFT's IA3 rescales down_proj's input, ours up_proj's output: in this base they differ"
        )
    state = dict(adapter.named_parameters())
    tensors, targets, feedforward = {}, [], []
    for name, layer, site in _adapted(adapter, decoder):
        if site == down:
            tensors[f"{name}.ia3_l"] = 1 + state[f"ia3.{up}.scale"][layer][None]
            feedforward.append(name)
        elif site != up and f"ia3.{site}.scale" in state:
            tensors[f"{name}.ia3_l"] = 1 + state[f"ia3.{site}.scale"][layer][:, None]
            targets.append(name)
    # By their full names: PEFT's IA3 has no layers_to_transform.
    values = {
        "peft_type": "IA3",
        "target_modules": targets + feedforward,
        "feedforward_modules": feedforward,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_ia3_weights": True,
    }
    return _Written(values, tensors)


def _write_prompts(adapter: Adapter, decoder: PreTrainedModel) -> _Written:
    config = adapter.config
    if config.shape.family not in PROMPT_FAMILIES:
        raise UsageError(
            f"PEFT's AdaptionPrompt is the same as ours only for {' and '.join(PROMPT_FAMILIES)}; this "
            f"adapter is for {config.shape.family}"
        )
    gates = adapter.prompts.gates.detach().double().tanh()
    if float((gates - gates[:, :1]).abs().max()) > 1e-6:
        raise UsageError(
            "PEFT's AdaptionPrompt has one gate a layer; this adapter's heads have gates of their own, "
            "and cannot be written"
        )
    tensors = {}
    names = attention_names(decoder)[config.first_layer :]
    for name, prompts, gate in zip(names, adapter.prompts.plain(), gates, strict=True):
        tensors[f"{name}.adaption_prompt"] = prompts[None]
        tensors[f"{name}.adaption_gate"] = gate[:1]
    values = {
        "peft_type": "ADAPTION_PROMPT",
        "target_modules": names[-1].split(".")[-1],
        "adapter_len": config.prompt_length,
        "adapter_layers": config.adapted_layers,
    }
    return _Written(values, tensors)


def _adapted(adapter: Adapter, decoder: PreTrainedModel) -> Iterable[tuple[str, int, str]]:
    """The projections of the adapted layers: name in the decoder, index among these layers, site."""
    first = adapter.config.first_layer
    for name, (layer, site) in locate_projections(decoder).items():
        if layer >= first:
            yield name, layer - first, site


_WRITERS: dict[str, Callable[[Adapter, PreTrainedModel], _Written]] = {
    "lora": _write_lora,
    "ia3": _write_ia3,
    "prompts": _write_prompts,
}

"""Reads PEFT's folders of LoRA (with rsLoRA), IA3 and AdaptionPrompt. `peft_writing` writes them.

PEFT's folder has adapter_config.json, with a "peft_type", and adapter_model.safetensors. Its config does not
have the sizes of the base, so reading a folder needs a decoder. One on the meta device is enough: its weights
are not used.

PEFT can adapt any layers, this library the topmost L. So all layers from the lowest adapted one upwards count
as adapted. Those that PEFT left out get tensors of zeros, which add nothing.

PEFT's AdaptionPrompt has one gate for each layer, without tanh. Ours has one for each head, with tanh. So a
gate g is read as atanh(g) for all heads, and gates are written only if all heads of a layer have the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.config import AdapterConfig
from llama_adapter.methods.decoder import decoder_shape
from llama_adapter.methods.ia3 import TARGETS, Ia3Config
from llama_adapter.methods.lora import LoraConfig
from llama_adapter.methods.part import PartConfig
from llama_adapter.methods.prepared import attention_layers
from llama_adapter.methods.prompts import PromptsConfig
from llama_adapter.methods.sites import choose_projections, locate_projections, projections_of

PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT writes this before a module's name in the decoder
# The families for which PEFT's AdaptionPrompt computes the same. For GPT-2 it skips the output projection.
PROMPT_FAMILIES = ("llama", "mistral")
# Settings that are read, that follow from the tensors, or that change nothing in a trained adapter. All
# others must be empty: PEFT adds settings with every release, and an unknown one may change everything.
_HARMLESS = frozenset(
    {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    | {"inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    | {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
    | {"fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying"}
    | {"feedforward_modules", "init_ia3_weights", "adapter_len", "adapter_layers", "runtime_config"}
)
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base's own weights
_Located = Mapping[str, tuple[int, str]]
_Found = tuple[PartConfig, int, dict[str, Tensor]]  # settings, L, the part's tensors


def peft_config(folder: str | Path) -> dict[str, Any] | None:
    """The config of PEFT's adapter in a folder, or None if the folder has none."""
    path = Path(folder) / PEFT_CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return None
    return values if isinstance(values, dict) and "peft_type" in values else None


def peft_base(values: Mapping[str, Any], source: str | Path) -> str:
    """The base that a config of PEFT names. Raises UsageError if it names none."""
    base = values.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UsageError(f"{source}: PEFT's config does not say what its base is; give it with --base")
    return base


def read_peft(folder: str | Path, decoder: PreTrainedModel, *, base: str, template: str) -> Adapter:
    """Read PEFT's adapter in a folder as one of ours, in float32 on the CPU. The logits stay the same.

    Args:
        decoder: a prepared decoder like the one that it was trained for. Its weights are not used.
        base: the name of that decoder.
        template: the text format of turns, which PEFT's config does not have.

    Raises:
        UsageError: another method of PEFT, a setting that this library does not have, or tensors that do not
            fit the decoder.
    """
    folder = Path(folder)
    source = str(folder / PEFT_CONFIG_FILE)
    values = peft_config(folder)
    assert values is not None
    kind = str(values["peft_type"])
    if kind not in _READERS:
        raise UsageError(f"{source}: a {kind} of PEFT's; of its adapters {', '.join(_READERS)} can be read")
    _check_settings(values, source)
    path = folder / PEFT_WEIGHTS_FILE
    if not path.is_file():
        raise UsageError(
            f"{folder} has no {PEFT_WEIGHTS_FILE}; save it with PEFT again (a .bin is pickled code, and "
            "not read)"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}); it is cut off or not a safetensors file"
        ) from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UsageError(f"{path}: {name!r} has values that are not finite; train again")
    own = {name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items()}
    part, layers, state = _READERS[kind](values, own, decoder, str(path))
    config = AdapterConfig(
        base=base,
        shape=decoder_shape(decoder.config),
        adapted_layers=layers,
        parts=(part,),
        template=template,
        projections={} if isinstance(part, PromptsConfig) else projections_of(decoder, layers),
        training={"library": f"PEFT {values.get('peft_version') or ''}".strip()},
    )
    adapter = Adapter(config)
    prefix = AdapterConfig.kind_of(part)
    adapter.load_state_dict({f"{prefix}.{name}": tensor for name, tensor in state.items()})
    return adapter


def _check_settings(values: Mapping[str, Any], source: str) -> None:
    for name, value in values.items():
        if name == "init_lora_weights":
            if value not in _INITIALISATIONS:
                raise UsageError(
                    f"{source}: init_lora_weights is {value!r}, which changes the base's own weights; let "
                    "PEFT save it as plain LoRA (path_initial_model_for_weight_conversion)"
                )
        elif name not in _HARMLESS and value not in (None, False, "none", {}, [], ""):
            raise UsageError(
                f"{source}: {name} is {str(value)[:60]!r}, which cannot be read; merge it with PEFT, or "
                "train without it"
            )


def _located(
    tensors: Mapping[str, Tensor], endings: Iterable[str], located: _Located, source: str
) -> dict[tuple[int, str], dict[str, Tensor]]:
    """The tensors by layer and site, each under its ending."""
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        ending = next((ending for ending in endings if name.endswith(f".{ending}")), None)
        module = name.removesuffix(f".{ending}")
        if ending is None or module not in located:
            raise UsageError(
                f"{source}: the tensor {name!r} belongs to no linear projection of this base's layers; "
                "give the base that it was trained for (adapters of other modules can't be read)"
            )
        found.setdefault(located[module], {})[ending] = tensor
    if not found:
        raise UsageError(f"{source} has no tensors; copy the adapter again")
    return found


def _wrong_size(source: str, site: str, tensor: Tensor, expected: object) -> UsageError:
    return UsageError(
        f"{source}: {site} has a tensor of {tuple(tensor.shape)}, this base has {expected}; give its own base"
    )


def _read_lora(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], decoder: PreTrainedModel, source: str
) -> _Found:
    located = locate_projections(decoder)
    down_name, up_name = "lora_A.weight", "lora_B.weight"
    found = _located(tensors, (down_name, up_name), located, source)
    layers = decoder_shape(decoder.config).num_layers - min(layer for layer, _ in found)
    first = decoder_shape(decoder.config).num_layers - layers
    projections = projections_of(decoder, layers)
    names = {place: name for name, place in located.items()}
    ranks = {place: own[down_name].shape[0] for place, own in found.items() if down_name in own}
    rank = max(ranks.values(), default=0)
    try:
        alpha, dropout = float(values.get("lora_alpha", 8)), float(values.get("lora_dropout", 0.0))
        alphas = {str(name): float(own) for name, own in (values.get("alpha_pattern") or {}).items()}
    except (TypeError, ValueError, AttributeError):
        raise UsageError(f"{source}: lora_alpha, lora_dropout and alpha_pattern have to be numbers") from None
    sites = [name for name in projections if any(site == name for _, site in found)]
    config = LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=() if len(sites) == len(projections) else tuple(sites),
        rslora=bool(values.get("use_rslora")),
        dropout=dropout,
    )
    state = {}
    for site in sites:
        inside, outside = projections[site]
        state[f"{site}.down"] = torch.zeros(layers, rank, inside)
        state[f"{site}.up"] = torch.zeros(layers, outside, rank)
    for (layer, site), own in found.items():
        inside, outside = projections[site]
        if len(own) != 2:
            missing = down_name if down_name not in own else up_name
            raise UsageError(f"{source}: {site} of layer {layer} lacks its {missing}; copy the adapter again")
        r = ranks[layer, site]
        for tensor, expected in ((own[down_name], (r, inside)), (own[up_name], (outside, r))):
            if tuple(tensor.shape) != expected:
                raise _wrong_size(source, site, tensor, expected)
        # A smaller rank is padded with zeros. If a projection has a scale of its own, it is multiplied into
        # B.
        alpha_here = _of_pattern(alphas, names[layer, site], alpha)
        scale = alpha_here / (math.sqrt(r) if config.rslora else r)
        state[f"{site}.down"][layer - first, :r] = own[down_name]
        own_scale = own[up_name] if scale == config.scale else own[up_name] * (scale / config.scale)
        state[f"{site}.up"][layer - first, :, :r] = own_scale
    return config, layers, state


def _of_pattern(pattern: Mapping[str, float], module: str, otherwise: float) -> float:
    """A module's value in one of PEFT's patterns. Their keys are ends of names or regular expressions."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error:
            raise UsageError(f"alpha_pattern: {key!r} is not a regular expression") from None
    return otherwise


def _read_ia3(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], decoder: PreTrainedModel, source: str
) -> _Found:
    located = locate_projections(decoder)
    found = _located(tensors, ("ia3_l",), located, source)
    layers = decoder_shape(decoder.config).num_layers - min(layer for layer, _ in found)
    first = decoder_shape(decoder.config).num_layers - layers
    projections = projections_of(decoder, layers)
    sites = choose_projections(projections, TARGETS)
    up, down = up_and_down(sites, projections)
    state = {f"{site}.scale": torch.zeros(layers, outside) for site, (_, outside) in sites.items()}
    for (layer, site), own in found.items():
        factors = own["ia3_l"]
        # One line of numbers rescales a projection's input, one column its output.
        of_input = len(factors) == 1 and site == down and len(factors.flatten()) == projections[site][0]
        target = up if of_input else site
        if target not in sites or (factors.shape[-1] != 1 and not of_input):
            raise UsageError(
                f"{source}: IA3 on {site}; it can be read on k_proj, v_proj and, in a gated MLP, on what "
                "down_proj reads"
            )
        scale = state[f"{target}.scale"]
        if factors.numel() != scale.shape[1]:
            raise _wrong_size(source, site, factors, (scale.shape[1], 1))
        scale[layer - first] = factors.flatten() - 1
    return Ia3Config(), layers, state


def up_and_down(sites: Iterable[str], projections: Mapping[str, tuple[int, int]]) -> tuple[str, str | None]:
    """The MLP's up projection and its down projection.

    The down projection is None unless the MLP is down(act(gate(x)) * up(x)). Only there is it the same to
    rescale the output of up or the input of down.
    """
    up = next(site for site in sites if site.endswith("up_proj"))
    gate, down = (up.removesuffix("up_proj") + name for name in ("gate_proj", "down_proj"))
    gated = gate in projections and down in projections and projections[down][0] == projections[up][1]
    return up, down if gated else None


def _read_prompts(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor], decoder: PreTrainedModel, source: str
) -> _Found:
    shape = decoder_shape(decoder.config)
    if shape.family not in PROMPT_FAMILIES:
        raise UsageError(
            f"{source}: an AdaptionPrompt of the family {shape.family!r}; it can be read for "
            f"{' and '.join(PROMPT_FAMILIES)}"
        )
    names = attention_names(decoder)
    embeddings: list[Tensor] = []
    gates: list[Tensor] = []
    for name in names:
        prompts, gate = (tensors.get(f"{name}.{own}") for own in ("adaption_prompt", "adaption_gate"))
        if prompts is None and gate is None and not gates:
            continue  # a layer below the adapted ones
        if prompts is None or gate is None:
            raise UsageError(f"{source}: {name} lacks its prompts or its gate; copy the adapter again")
        if prompts.ndim != 3 or prompts.shape[0] != 1 or prompts.shape[2] != shape.hidden_size:
            raise _wrong_size(source, name, prompts, f"(1, prompts, {shape.hidden_size})")
        if gate.numel() != 1:
            raise _wrong_size(source, name, gate, "one gate a layer")
        if abs(float(gate)) >= 1:
            raise UsageError(
                f"{source}: the gate of {name} is {float(gate):.4g}; it has to lie between -1 and 1, since "
                "this project applies tanh"
            )
        embeddings.append(prompts[0])
        gates.append(gate.double().atanh().float().reshape(1).expand(shape.num_heads))
    unknown = set(tensors) - {f"{n}.{own}" for n in names for own in ("adaption_prompt", "adaption_gate")}
    if unknown or not gates or len({len(prompts) for prompts in embeddings}) > 1:
        what = (
            f"the tensor {min(unknown)!r} is unknown"
            if unknown
            else "the layers' prompts do not fit together"
        )
        raise UsageError(f"{source}: {what}; give the base that it was trained for")
    state = {"embeddings": torch.stack(embeddings), "gates": torch.stack(gates)}
    return PromptsConfig(prompt_length=len(embeddings[0])), len(gates), state


def attention_names(decoder: PreTrainedModel) -> list[str]:
    """The name of each layer's attention in the decoder."""
    names = {module: name for name, module in decoder.named_modules()}
    return [names[attention] for attention in attention_layers(decoder)]


_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor], PreTrainedModel, str], _Found]] = {
    "LORA": _read_lora,
    "IA3": _read_ia3,
    "ADAPTION_PROMPT": _read_prompts,
}

"""Folds an adapter into a decoder's own weights. The result is a plain decoder with the same logits.

This is possible for parts that act at projections and are linear in their outputs: scales and biases, IA3,
BitFit and LoRA. Parts that change weights have done it already. Prompts, pictures and bottleneck adapters
compute something else and can't be folded.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.attention import PREFIX
from llama_adapter.methods.own_weights import WeightsPart, copy_decoder
from llama_adapter.methods.sites import SitePart, detach_sites, locate_projections
from llama_adapter.methods.table import PARTS

# The names of the config setting, in some families, that gives a decoder biases.
BIAS_SWITCHES = ("attention_bias", "mlp_bias", "use_bias")


@torch.no_grad()
def merge_adapter(decoder: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A decoder with an adapter folded in. Weights that do not change are shared with ``decoder``.

    Sums are computed in float32 or better and stored in the dtype of each weight. If the adapter adds biases
    that the decoder does not have, they are added if the family's config has a setting for them, which is
    then switched on.

    Raises:
        UsageError: a part that can't be folded, by name; quantised weights; or biases that the family can't
            have.
    """
    if (owner := adapter.find(WeightsPart)) is not None:
        return _plain(copy_decoder(owner.decoder(), owner.config.weights).requires_grad_(False))
    lasting = [part.kind for part in adapter.parts if not (isinstance(part, SitePart) and part.foldable)]
    if lasting:
        foldable = [k for k, part in PARTS.items() if issubclass(part, SitePart) and part.foldable]
        raise UsageError(
            f"{' and '.join(lasting)} cannot be merged into weights, only {', '.join(foldable)}; "
            "serve it as an adapter"
        )
    state = adapter.state()
    folded: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, (layer, site) in locate_projections(decoder).items():
        module = decoder.get_submodule(name)
        for part, own in (state.sites_of(layer) or {}).get(site, ()):
            weight, bias = folded.get(name) or _read(name, module)
            exact = {key: tensor.to(weight) for key, tensor in own.items()}
            folded[name] = part.fold(exact, weight, bias)
    merged = copy_decoder(decoder, {f"{name}.{own}" for name in folded for own in ("weight", "bias")})
    _add_biases(merged, {name: bias for name, (_, bias) in folded.items() if bias is not None})
    for name, (weight, bias) in folded.items():
        module = merged.get_submodule(name)
        module.weight.data.copy_(weight.T if isinstance(module, Conv1D) else weight)  # type: ignore[operator]
        if bias is not None:
            module.bias.data.copy_(bias)  # type: ignore[operator]
    return _plain(merged)


def _plain(decoder: PreTrainedModel) -> PreTrainedModel:
    """A copy of a prepared decoder, made a plain one again, in place."""
    detach_sites(decoder)
    attention = str(decoder.config.get_text_config()._attn_implementation)
    decoder.set_attn_implementation(attention.removeprefix(PREFIX))
    return decoder


def _read(name: str, module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """A projection's weight, (out, in), and bias, in float32 or better."""
    weight, bias = module.weight, getattr(module, "bias", None)
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise UsageError(f"{name} is quantised; load the base without quantisation to merge into it")
    exact = torch.promote_types(weight.dtype, torch.float32)
    weight = weight.detach().to(exact)
    return weight.T if isinstance(module, Conv1D) else weight, None if bias is None else bias.detach().to(
        exact
    )


def _add_biases(decoder: PreTrainedModel, biases: dict[str, Tensor]) -> None:
    """Give a decoder the biases that it lacks, as its family's config would.

    Raises:
        UsageError: the config has no setting for them.
    """
    missing = {name for name in biases if getattr(decoder.get_submodule(name), "bias", None) is None}
    for switch in BIAS_SWITCHES:
        if not missing or getattr(decoder.config, switch, None) is not False:
            continue
        config = copy.deepcopy(decoder.config)
        setattr(config, switch, True)
        gained = _biases_of(config) - _biases_of(decoder.config)
        if not gained & missing:
            continue
        for name in gained:
            module: Any = decoder.get_submodule(name)
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features), requires_grad=False)
        decoder.config = config
        missing -= gained
    if missing:
        family = decoder.config.get_text_config().model_type
        raise UsageError(
            f"decoders of the family {family!r} have no bias at {min(missing)}, which this adapter adds; "
            "serve it as an adapter"
        )


def _biases_of(config: PreTrainedConfig) -> set[str]:
    """The names of the modules that have a bias in a decoder with this config."""
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(config)
    return {name.removesuffix(".bias") for name, _ in decoder.named_parameters() if name.endswith(".bias")}

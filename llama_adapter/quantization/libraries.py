"""Quantised weights of other libraries, through transformers' own quantizers.

On CUDA, int8 is bitsandbytes' and int4 is torchao's; on a CPU, our kernels compute both. nf4 is always
bitsandbytes'.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from llama_adapter.common.errors import UsageError
from llama_adapter.quantization.formats import INT4, INT8, NF4
from llama_adapter.quantization.linear import format_of

GROUP = 32  # weights that share a scale and a zero point in torchao's int4, as in our blocks


def library_config(format: str, device: torch.device, dtype: torch.dtype) -> Any:
    """What transformers' ``from_pretrained`` takes as ``quantization_config`` for a format.

    Args:
        dtype: in which products are computed.

    Raises:
        UsageError: the library is not installed, or does not run there.
    """
    library = "torchao" if format == INT4 else "bitsandbytes"
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"quantize: {format} does not run on {device.type!r}; choose device cpu or cuda")
    if importlib.util.find_spec(library) is None:
        raise UsageError(f"quantize: {format} needs {library} here; pip install {library}")
    if format == INT8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if format == NF4:
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=NF4, bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Int4WeightOnlyConfig

    return TorchAoConfig(Int4WeightOnlyConfig(group_size=GROUP))


def keep_gradients(decoder: PreTrainedModel) -> None:
    """Leave bitsandbytes' 4-bit weights in the form that gradients go through.

    Where a CPU has AVX-512 with bfloat16, bitsandbytes packs them at the first pass in evaluation mode. The
    products with packed weights have no backward pass: what lies below them would not be trained, in silence.

    Raises:
        UsageError: the weights are packed already.
    """
    for name, module in decoder.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UsageError(
                f"{name}: its 4-bit weights were packed by bitsandbytes when the decoder was first used, and "
                "gradients do not go through them; load the decoder again, and hand it over unused"
            )
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def precision_of(decoder: PreTrainedModel) -> str | None:
    """What a decoder's weights are quantised to, by us or by a library; None if they are not.

    One of our names where it has one, else the quantizer's own, such as "gptq".
    """
    if (ours := format_of(decoder)) is not None:
        return ours
    config: Any = getattr(decoder.config, "quantization_config", None)
    if config is None:
        return None
    settings = config if isinstance(config, dict) else config.to_dict()
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type"))
    if settings.get("load_in_8bit"):
        return INT8
    kind = type(getattr(config, "quant_type", None)).__name__
    named = {"Int4WeightOnlyConfig": INT4, "Int8WeightOnlyConfig": INT8}
    method: Any = settings.get("quant_method")
    return named.get(kind) or str(getattr(method, "value", method))

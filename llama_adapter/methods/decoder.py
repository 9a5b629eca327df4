"""Loads a decoder of transformers with its tokenizer, on a device and in a dtype."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.hub import cached_file

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.probe import prepare_decoder
from llama_adapter.methods.shape import DecoderShape
from llama_adapter.quantization.formats import AUTO, CHOICES, FORMATS, INT8, check_format
from llama_adapter.quantization.gguf_files import load_gguf
from llama_adapter.quantization.kernels import find_compiler
from llama_adapter.quantization.libraries import library_config
from llama_adapter.quantization.linear import quantize_decoder
from llama_adapter.quantization.stored import load_stored, store, stored_file
from llama_adapter.weights.hub import gated_error
from llama_adapter.weights.locations import gguf_in


def choose_device(device: str | None) -> torch.device:
    """The named device. By default the first available of CUDA, MPS and the CPU."""
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is not known; choose cpu, cuda or mps") from None
    try:
        torch.zeros(1, device=chosen).item()  # also fails on "meta", which can't compute
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used here ({reason}); try cpu, cuda or mps") from None
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The named dtype. By default bfloat16 on CUDA (if it is fast there) and float32 elsewhere."""
    dtype = None if dtype is None else str(dtype).removeprefix("torch.")
    if dtype is None or dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in choices:
        raise UsageError(f"dtype {dtype!r} is not known; choose one of {', '.join(choices)}, auto")
    return choices[dtype]


def load_tokenizer(base: str, *, gguf_file: str | None = None, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a hub id or a GGUF file. A missing padding token becomes the end token.

    The tokenizer in a GGUF file is incomplete. One in files beside it is preferred.

    Args:
        gguf_file: as in `load_decoder`.
        options: those of transformers' ``from_pretrained``, such as ``revision`` and ``token``.
    """
    with _clear_errors(base):
        file = _find_gguf(base, gguf_file, options)
        if file is not None and any((file.parent / name).is_file() for name in _TOKENIZERS):
            tokenizer = AutoTokenizer.from_pretrained(file.parent)
        else:
            place, named = _source(base, file)
            tokenizer = AutoTokenizer.from_pretrained(place, **named, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
HUB_OPTIONS = frozenset(  # of transformers' from_pretrained, for config, tokenizer and weights
    {"cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "token"}
    | {"subfolder", "trust_remote_code"}
)


def load_decoder(
    base: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None = None,
    gguf_file: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a causal decoder, frozen and ready for adapters, from a folder, a hub id or a GGUF file.

    On a CPU a GGUF file's blocks are kept as they are, unless ``quantize`` or a ``quantization_config`` is
    given. On other devices they are dequantised, and a line on standard error says so.

    Args:
        device: where the decoder is loaded to, unless ``options`` has a ``device_map``.
        quantize: the format for its weights (`quantization.formats`). On a CPU int8 and int4 are ours; the
            others are those of transformers' quantizers. "auto" is int8 on a CPU. None and "none" keep the
            weights as they are.
        gguf_file: the name of a GGUF file in the folder or the hub's repository.
        options: all else that transformers' ``from_pretrained`` takes.

    Raises:
        UsageError: not found, gated, no decoder, of a family that can't be adapted, or a format that is
            unknown, not available on the device, or of a library that is not installed.
    """
    on_cpu = device.type == "cpu" and options.get("device_map") is None
    by_default = not options
    if quantize not in (None, *CHOICES):
        check_format(str(quantize))
        if options.get("quantization_config") is not None:
            raise UsageError(f"quantize: {quantize} and quantization_config given; give one of them")
        if not on_cpu or quantize not in FORMATS:
            options["quantization_config"] = library_config(str(quantize), device, dtype)
            quantize = None
    if options.get("quantization_config") is not None and options.get("device_map") is None:
        options["device_map"] = {"": device}  # quantised on the device where they stay
    hub = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    decoder: Any
    with _clear_errors(base):
        file = _find_gguf(base, gguf_file, hub)
        place, named = _source(base, file)
        # Before all else, so that an unreachable hub is waited for only once.
        config = AutoConfig.from_pretrained(place, **named, **hub)
        if quantize in CHOICES:
            fast = quantize == AUTO and on_cpu and file is None
            quantize = _fast_format(config, options) if fast else None
        as_it_is = file is not None and quantize is None and options.get("quantization_config") is None
        if file is not None and as_it_is and on_cpu:
            return prepare_decoder(load_gguf(file, config, dtype))
        if file is not None:
            # Otherwise transformers would treat the dequantised weights as quantised.
            options.setdefault("quantization_config", GgufConfig(dequantize=True))
        if as_it_is:
            kind = str(dtype).removeprefix("torch.")
            print(
                f"{base}: its weights become {kind}; blocks of GGUF are kept on a CPU only", file=sys.stderr
            )
        if quantize is None:
            decoder = AutoModelForCausalLM.from_pretrained(
                place, config=config, dtype=dtype, **named, **options
            )
        else:
            whole = str(file or base)
            path = stored_file(whole, config, quantize) if by_default else None
            decoder = _load_quantized(whole, place, config, quantize, path, {**named, **options})
    placed = options.get("device_map") is not None
    return prepare_decoder(decoder if placed else decoder.to(device, dtype))


def _fast_format(config: PreTrainedConfig, options: dict[str, Any]) -> str | None:
    """int8 if our kernels compute with it and the base is not quantised already."""
    given = options.get("quantization_config") or getattr(config, "quantization_config", None)
    return None if given or find_compiler() is None else INT8


def _load_quantized(
    base: str,
    place: str,
    config: PreTrainedConfig,
    format: str,
    path: Path | None,
    options: dict[str, Any],
) -> PreTrainedModel:
    """The decoder stored in `path`, or one that is quantised now and stored there (None: not stored).

    Args:
        base: its folder, GGUF file or hub id.
        place: where transformers loads it from.
    """
    decoder: Any = None if path is None else load_stored(place, config, path)
    if decoder is None:
        # In the file's dtype, often 16 bits: quantising converts one weight at a time to float32.
        decoder = AutoModelForCausalLM.from_pretrained(place, config=config, dtype="auto", **options)
        quantize_decoder(decoder, format)
        if path is not None:
            store(decoder, path, base)
            # From the file, which is mapped into memory: what quantising took is freed.
            decoder = load_stored(place, config, path) or decoder
    return decoder


def _find_gguf(base: str, gguf_file: str | None, hub: dict[str, Any]) -> Path | None:
    """The GGUF file that a base is or contains, or that was asked for; None if there is none."""
    return gguf_in(base) if gguf_file is None else Path(str(cached_file(base, gguf_file, **hub)))


def _source(base: str, file: Path | None) -> tuple[str, dict[str, str]]:
    """The arguments of transformers' ``from_pretrained`` for a base: the first one, and keywords."""
    return (base, {}) if file is None else (str(file.parent), {"gguf_file": file.name})


class _clear_errors:
    """Turns the many errors of loading a model into one line that says what to do."""

    def __init__(self, base: str) -> None:
        self.base = base

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        causes = []
        while error is not None and error not in causes:
            causes.append(error)
            error = error.__cause__ or error.__context__
        if not causes or isinstance(causes[0], UsageError):
            return
        if any(isinstance(cause, GatedRepoError) or "gated repo" in str(cause) for cause in causes):
            raise gated_error("base", self.base) from None
        hub = (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError)
        damaged = (OSError, ValueError, RuntimeError, SafetensorError)  # RuntimeError: sizes that do not fit
        if isinstance(causes[0], (*damaged, *hub)):
            reason = " ".join(str(causes[0]).split())[:200]
            raise UsageError(
                f"base {self.base!r} cannot be loaded ({reason}); give a folder with a transformers decoder, "
                "a hub id that can be reached, or a name that `llama-adapter fetch` knows"
            ) from None


def checkpoint_activations(decoder: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass, instead of keeping its intermediate results.

    Raises:
        UsageError: a family whose layers can't do this.
    """
    if not decoder.supports_gradient_checkpointing:
        family = decoder.config.get_text_config().model_type
        raise UsageError(f"family {family!r} does not support gradient checkpointing; leave it out")
    # transformers has renamed this method.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = getattr(decoder, next(name for name in names if hasattr(decoder, name)))
    enable({"use_reentrant": False})
    decoder.disable_input_require_grads()  # otherwise gradients would be computed down to the embeddings
    for module in decoder.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # only this module's flag, which it checks: dropouts inside stay off


def decoder_shape(config: PreTrainedConfig) -> DecoderShape:
    """The sizes that an adapter has to fit, from a decoder's config."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    return DecoderShape(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
    )


def load_shape(base: str) -> DecoderShape:
    """The sizes of the decoder in a folder or of a hub id. Its weights are not read."""
    with _clear_errors(base):
        return decoder_shape(_load_config(base))


def load_structure(base: str) -> PreTrainedModel:
    """The decoder of a folder or hub id without its weights (on the meta device), prepared."""
    with _clear_errors(base), torch.device("meta"):
        return prepare_decoder(AutoModelForCausalLM.from_config(_load_config(base)))


def _load_config(base: str) -> PreTrainedConfig:
    place, named = _source(base, gguf_in(base))
    config: PreTrainedConfig = AutoConfig.from_pretrained(place, **named)
    return config

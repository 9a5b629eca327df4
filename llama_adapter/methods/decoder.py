"""Load a decoder of transformers: where to, in which dtype, with which tokenizer."""

from __future__ import annotations

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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.probe import prepare_decoder
from llama_adapter.methods.shape import DecoderShape
from llama_adapter.quantization.formats import check_format
from llama_adapter.quantization.linear import quantize_decoder
from llama_adapter.quantization.stored import load_stored, store, stored_file
from llama_adapter.weights.hub import gated_error


def choose_device(device: str | None) -> torch.device:
    """The named device; by default CUDA, then MPS, then the CPU, whichever is there."""
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is not known; choose cpu, cuda or mps") from None
    try:
        torch.zeros(1, device=chosen).item()  # fails on "meta" as well, which cannot compute
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {device!r} cannot be used here ({reason}); try cpu, cuda or mps") from None
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The named dtype; by default bfloat16 on CUDA (where it is fast) and float32 elsewhere."""
    dtype = None if dtype is None else str(dtype).removeprefix("torch.")
    if dtype is None or dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in choices:
        raise UsageError(f"dtype {dtype!r} is not known; choose one of {', '.join(choices)}, auto")
    return choices[dtype]


def load_tokenizer(base: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; a missing padding token becomes the end token.

    ``options`` are those of transformers' ``from_pretrained``, as ``revision`` and ``token``.
    """
    with _clear_errors(base):
        tokenizer = AutoTokenizer.from_pretrained(base, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


HUB_OPTIONS = frozenset(  # of transformers' from_pretrained, for config, tokenizer and weights alike
    {"cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "token"}
    | {"subfolder", "trust_remote_code"}
)


def load_decoder(
    base: str, *, device: torch.device, dtype: torch.dtype, quantize: str | None = None, **options: Any
) -> PreTrainedModel:
    """Load a causal decoder from a folder or hub id, frozen and ready for adapters.

    Args:
        device: where it goes, unless ``options`` has a ``device_map``.
        quantize: the format that its weights are kept in (`quantization.formats`); None: as they are.
        options: whatever transformers' ``from_pretrained`` takes.

    Raises:
        UsageError: not found, gated, no decoder, of a family that cannot be adapted, or a format that is not
            known or not for the device.
    """
    if quantize is not None:
        check_format(quantize)
        if device.type != "cpu" or options.get("device_map") is not None:
            place = options.get("device_map") or device.type
            raise UsageError(f"quantize: {quantize} runs on a CPU only, not on {place!r}; choose device cpu")
    if options.get("quantization_config") is not None and options.get("device_map") is None:
        options["device_map"] = {"": device}  # quantised where they will stay
    hub = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    decoder: Any
    with _clear_errors(base):
        # First, so that a hub out of reach is waited for once.
        config = AutoConfig.from_pretrained(base, **hub)
        if quantize is None:
            decoder = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=dtype, **options)
        else:
            decoder = _load_quantized(base, config, quantize, options)
    placed = options.get("device_map") is not None
    return prepare_decoder(decoder if placed else decoder.to(device, dtype))


def _load_quantized(
    base: str, config: PreTrainedConfig, format: str, options: dict[str, Any]
) -> PreTrainedModel:
    """A decoder as it was quantised before, or quantised now and kept for the next time."""
    path = None if options else stored_file(base, config, format)
    decoder: Any = None if path is None else load_stored(base, config, path)
    if decoder is None:
        # As the file has them, often in 16 bits: quantising makes float32 of one weight at a time.
        decoder = AutoModelForCausalLM.from_pretrained(base, config=config, dtype="auto", **options)
        quantize_decoder(decoder, format)
        if path is not None:
            store(decoder, path)
    return decoder


class _clear_errors:
    """Turns the many ways in which a model can fail to load into one line that says what to do."""

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
    """Let the backward pass compute each layer again instead of keeping what is within it.

    Raises:
        UsageError: a family whose layers cannot.
    """
    if not decoder.supports_gradient_checkpointing:
        family = decoder.config.get_text_config().model_type
        raise UsageError(f"decoders of the family {family!r} know no gradient checkpointing; leave it out")
    # transformers renames it.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = getattr(decoder, next(name for name in names if hasattr(decoder, name)))
    enable({"use_reentrant": False})
    decoder.disable_input_require_grads()  # or gradients would go down to the embeddings
    for module in decoder.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # its own flag alone: it asks for that, and nothing in it may drop out


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
    """The sizes of the decoder in a folder or of a hub id; its weights are not read."""
    with _clear_errors(base):
        return decoder_shape(AutoConfig.from_pretrained(base))


def load_structure(base: str) -> PreTrainedModel:
    """The decoder in a folder or of a hub id without its weights (on the meta device), prepared."""
    with _clear_errors(base), torch.device("meta"):
        return prepare_decoder(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)))

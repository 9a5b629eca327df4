"""Load, freeze, switch and probe a decoder of transformers.

Shapes: B rows, T tokens, K prompts, d head width, D hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from torch import Tensor, nn
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
from llama_adapter.methods.attention import (
    PREFIX,
    STOCK,
    compute_dtype,
    layer_index,
    project_prompts,
    register,
)
from llama_adapter.methods.config import DecoderShape
from llama_adapter.methods.packed_attention import Segment, mask_of_segments, segment_positions
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


def choose_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The named dtype; by default bfloat16 on CUDA (where it is fast) and float32 elsewhere."""
    if dtype is None or dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in choices:
        raise UsageError(f"dtype {dtype!r} is not known; choose one of {', '.join(choices)}, auto")
    return choices[dtype]


def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; a missing padding token becomes the end token."""
    with _clear_errors(base):
        tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_decoder(base: str, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal decoder from a folder or hub id, frozen and ready for adapters.

    Raises:
        UsageError: not found, gated, no decoder, or of a family that cannot be adapted.
    """
    with _clear_errors(base):
        config = AutoConfig.from_pretrained(base)  # first, so that a hub out of reach is waited for once
        decoder = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=dtype)
    return prepare_decoder(decoder.to(device))  # type: ignore[arg-type]


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


def prepare_decoder(decoder: PreTrainedModel) -> PreTrainedModel:
    """Freeze a decoder, switch it to the gated attention and probe that every layer can be adapted.

    Without prompts the switched decoder computes exactly what it did, so one that is shared stays usable.

    Raises:
        UsageError: a family that cannot be adapted, with the reason; the decoder is then as it was.
    """
    text_config = decoder.config.get_text_config()
    current = str(text_config._attn_implementation)
    if not current.startswith(PREFIX):
        if current not in STOCK:
            raise UsageError(
                f"attention {current!r} cannot be adapted; load the decoder with attn_implementation='sdpa'"
            )
        _refuse(decoder, *_missing_parts(decoder))
        was_training = decoder.training
        decoder.set_attn_implementation(register(current))
        try:
            _refuse(decoder, *_probe(decoder.eval()))
        except BaseException:
            decoder.set_attn_implementation(current)
            decoder.train(was_training)
            raise
    decoder.requires_grad_(False)
    return decoder.eval()


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


def attention_layers(decoder: PreTrainedModel) -> list[nn.Module]:
    """The decoder's self-attention modules, by layer index."""
    found = [m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "k_proj")]
    return sorted(found, key=layer_index)


def attention_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states, (B, T, D), among what an attention is called with."""
    found: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return found


@torch.no_grad()
def input_sizes(decoder: PreTrainedModel) -> list[float]:
    """Root mean square of what each attention reads, by layer index, from 32 random tokens.

    1 where the weights are only shapes (the meta device).
    """
    layers = attention_layers(decoder)
    if decoder.device.type == "meta":
        return [1.0] * len(layers)
    vocabulary = decoder.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (1, 32), generator=torch.Generator().manual_seed(0))
    with _noting_inputs(layers) as read:
        decoder(tokens.to(decoder.device), use_cache=False)
    # The first token is left out: many decoders park attention there, and its states are unlike others.
    return [float(read[layer_index(layer)][:, 1:].float().square().mean().sqrt()) for layer in layers]


@contextmanager
def _noting_inputs(layers: list[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """What each attention reads in a forward pass within, by layer index."""
    read: dict[int, Tensor] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read[layer_index(layer)] = attention_input(args, kwargs)

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()


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


def _refuse(decoder: PreTrainedModel, *reasons: str) -> None:
    if reasons:
        family = decoder.config.get_text_config().model_type
        raise UsageError(f"decoders of the family {family!r} cannot be adapted: {reasons[0]}")


def _missing_parts(decoder: PreTrainedModel) -> list[str]:
    """What a look at the modules shows, before anything is run."""
    config = decoder.config.get_text_config()
    if config.is_encoder_decoder:
        return ["it has an encoder; this method adapts decoders"]
    layers = attention_layers(decoder)
    if not layers:
        return ["its attention layers have no k_proj and v_proj of their own (fused, or named otherwise)"]
    if [layer_index(layer) for layer in layers] != list(range(config.num_hidden_layers)):
        return [f"it has {config.num_hidden_layers} layers but {len(layers)} attentions of the usual form"]
    for layer in layers:
        sizes = [getattr(getattr(layer, name, None), "out_features", None) for name in ("k_proj", "v_proj")]
        if sizes[0] != sizes[1] or sizes != [layers[0].k_proj.out_features] * 2:  # type: ignore[union-attr]
            return [f"layer {layer_index(layer)}'s keys and values differ in size from the others'"]
        if not hasattr(layer, "head_dim") or layer.k_proj.in_features != config.hidden_size:  # type: ignore[union-attr]
            return [f"layer {layer_index(layer)}'s keys are not computed from its hidden states"]
    return []


class _Probe:
    """Stands in for prompts in one forward pass of one token, and notes what each layer does with them.

    At position 0 rotary embedding changes nothing, so the key and value that a layer computes for a token
    must be those that ``project_prompts`` computes for the same hidden state taken as a prompt. A family that
    drops the keyword, normalises in a way of its own or fuses its projections shows itself here.
    """

    mask = None
    first_layer = 0

    def __init__(self, hidden: dict[int, Tensor]) -> None:
        self.calls: Counter[int] = Counter()
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.hidden = hidden

    def of_layer(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        index = layer_index(layer)
        hidden = self.hidden[index]
        heads = int(layer.config.num_attention_heads)  # type: ignore[union-attr,arg-type]
        full_gate = torch.full((heads,), 20.0, device=hidden.device)  # tanh = 1
        keys, values = project_prompts(layer, hidden, full_gate)
        self.calls[index] += 1
        self.prompts[index] = keys, values
        return keys, torch.zeros_like(values)

    def tuning_of_layer(self, index: int) -> None:
        return None


def _probe(decoder: PreTrainedModel) -> list[str]:
    """What running it shows."""
    if decoder.device.type == "meta":
        return []  # nothing to compute with: a shape is being looked at
    return _probe_prompts(decoder) or _probe_packed(decoder)


@torch.no_grad()
def _probe_prompts(decoder: PreTrainedModel) -> list[str]:
    layers = attention_layers(decoder)
    token = _random_embeddings(decoder, 1, 1)
    with _noting_inputs(layers) as hidden:
        probe = _Probe(hidden)
        try:
            cache = decoder(inputs_embeds=token, prompts=probe, use_cache=True).past_key_values
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            return [f"it does not run with prompts ({' '.join(str(error).split())[:120]})"]
    unseen = [layer_index(layer) for layer in layers if layer_index(layer) not in probe.prompts]
    if unseen:
        return [
            f"its layer {unseen[0]} never received the prompts (it drops keywords or has its own attention)"
        ]
    several = [index for index, calls in probe.calls.items() if calls > 1]
    if several:
        return [f"its layer {several[0]} attends more than once, over values of its own making"]
    # YaRN and LongRoPE scale the rotated keys; the prompts are not rotated, so not scaled either.
    scaling = next((m.attention_scaling for m in decoder.modules() if hasattr(m, "attention_scaling")), 1.0)
    for layer in layers:
        index = layer_index(layer)
        cached = cache.layers[index]
        keys, values = probe.prompts[index]
        tolerance = 3e-2 if compute_dtype(layer).itemsize < 4 else 1e-4
        for ours, theirs, name in ((keys, cached.keys / scaling, "keys"), (values, cached.values, "values")):
            theirs = theirs.repeat_interleave(ours.shape[1] // theirs.shape[1], dim=1)
            scale = theirs.abs().max().clamp_min(1e-6)
            if ours.shape != theirs.shape or not ((ours - theirs).abs().max() / scale) <= tolerance:
                return [f"layer {index} computes its {name} in a way of its own"]
    return []


@torch.no_grad()
def _probe_packed(decoder: PreTrainedModel) -> list[str]:
    """Two rows in one sequence must come out as they do apart.

    They do not where tokens meet elsewhere than in attention (convolutions, state spaces), or where a family
    has a mask of its own.
    """
    rows = _random_embeddings(decoder, 2, 3)
    segments = (Segment(0, 3), Segment(3, 6))
    apart = decoder(inputs_embeds=rows, use_cache=False).logits
    try:
        packed = decoder(
            inputs_embeds=rows.flatten(0, 1)[None],
            attention_mask=mask_of_segments(decoder.device),
            position_ids=segment_positions(segments).to(decoder.device),
            segments=segments,
            use_cache=False,
        ).logits.view(apart.shape)
    except UsageError:
        return []  # such a decoder answers, and says as much when rows are packed to train it
    tolerance = 1e-1 if apart.dtype.itemsize < 4 else 1e-3
    if not ((packed - apart).abs().max() / apart.abs().max()) <= tolerance:
        return ["its tokens meet elsewhere than in its attention, or it has a mask of its own"]
    return []


def _random_embeddings(decoder: PreTrainedModel, rows: int, tokens: int) -> Tensor:
    """(B, T, D). No real tokens: the one that pads has an embedding of zeros, and all comparisons hold."""
    embeddings: Any = decoder.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, tokens, embeddings.shape[-1], generator=generator).to(embeddings)

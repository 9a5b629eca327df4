"""Prepares a decoder for adapters: freezes it, switches its attention, and finds out whether it can be
adapted.

A table of model types would be out of date with every release of transformers, so nothing here asks for the
type. Three short forward passes find out what matters:

1. Single tokens at position 0, where rotary embedding changes nothing. They show which modules and columns
   of a layer give its keys and values, so that prompts can be treated the same way (`keys_and_values`).
2. Two tokens after a long past that the cache only claims to have. They show how far back each layer's mask
   lets them see.
3. Two rows packed into one sequence. They show whether packed rows give the same results as separate ones.

Shapes: B rows, T tokens, D hidden size, H heads, G key-value heads, d head width, N columns of a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import FORM, PREFIX, STOCK, AttentionForm, attention_form, register
from llama_adapter.methods.decoding_step import attach_decoding_step
from llama_adapter.methods.keys_and_values import usual_form
from llama_adapter.methods.layer_forms import find_forms
from llama_adapter.methods.packed_trial import probe_packed
from llama_adapter.methods.prepared import computing_device
from llama_adapter.methods.trial_pass import refuse, switch_attention
from llama_adapter.quantization.libraries import keep_gradients


def prepare_decoder(decoder: PreTrainedModel) -> PreTrainedModel:
    """Freeze a decoder, switch it to the gated attention, and check that every layer can be adapted.

    Without prompts the decoder computes exactly what it did before, so other users of it are not affected.
    Only a decoder with softcapping (Gemma 2) is changed from sdpa, which leaves softcapping out, to eager.

    Raises:
        UsageError: a family that can't be adapted, with the reason. The decoder is then unchanged.
    """
    text_config = decoder.config.get_text_config()
    current = str(text_config._attn_implementation)
    if not current.startswith(PREFIX):
        if current not in STOCK:
            raise UsageError(
                f"attention {current!r} cannot be adapted; load the decoder with attn_implementation='sdpa'"
            )
        if text_config.is_encoder_decoder:
            refuse(decoder, "it has an encoder; this method adapts decoders")
        keep_gradients(decoder)
        with _restoring_on_failure(decoder):
            if current == "sdpa" and getattr(text_config, "attn_logit_softcapping", None) is not None:
                current = "eager"  # sdpa leaves softcapping out; transformers 5.20 does so in silence
                switch_attention(decoder, current)
            decoder.eval()
            if computing_device(decoder).type == "meta":
                _suppose_usual_forms(decoder)  # on the meta device there are no weights to compute with
                switch_attention(decoder, register(current))
            else:
                unknown = find_forms(decoder, current)
                switch_attention(decoder, register(current))
                probe_packed(decoder)
                reason = "how far back its layers see could not be found out"
                for layer in unknown:
                    setattr(layer, FORM, replace(attention_form(layer), unpackable=reason))
                attach_decoding_step(decoder)
    decoder.requires_grad_(False)
    return decoder.eval()


@contextmanager
def _restoring_on_failure(decoder: PreTrainedModel) -> Iterator[None]:
    """Restore the decoder if anything inside fails. An error of the decoder itself becomes a refusal."""
    training = {module: module.training for module in decoder.modules()}
    configs = {id(m.config): m.config for m in decoder.modules() if isinstance(m, PreTrainedModel)}
    for config in list(configs.values()):
        for name in config.sub_configs:
            if (nested := getattr(config, name, None)) is not None:
                configs.setdefault(id(nested), nested)
    implementations = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        yield
    except BaseException as error:
        for config, implementation in implementations:
            config._attn_implementation_internal = implementation
        for module, flag in training.items():
            module.training = flag
            if hasattr(module, FORM):
                delattr(module, FORM)
        if isinstance(error, UsageError) or not isinstance(error, Exception):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        family = decoder.config.get_text_config().model_type
        raise UsageError(
            f"decoders of the family {family!r} cannot be adapted: a trial run with prompts failed ({said})"
        ) from error


def _suppose_usual_forms(decoder: PreTrainedModel) -> None:
    """Assume the usual form for layers that look like it, without weights to compute with."""
    count = decoder.config.get_text_config().num_hidden_layers
    layers = [m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "k_proj")]
    forms = [usual_form(layer) for layer in layers]
    if len(layers) != count or None in forms:
        refuse(decoder, "without its weights, only layers with k_proj and v_proj are understood")
    for layer, form in zip(layers, forms, strict=True):
        assert form is not None
        setattr(layer, FORM, AttentionForm(form))

"""Which attributes of its decoder a model passes on, and which names of transformers and PEFT it refuses.

Nothing is passed on by accident. Data and submodules are; a method is only if it is listed here. A method
that acts on the decoder alone could silently leave the adapters out.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.surface.carried import carry

# Methods of the decoder that mean the same for the whole model.
PASSED_METHODS = frozenset(
    {"can_generate", "get_correct_attn_implementation", "get_experts_implementation", "is_backend_compatible"}
    | {"is_custom_code", "is_remote_code", "loss_function", "warn_if_padding_and_no_attention_mask"}
    | {"activation_checkpointing_disable", "gradient_checkpointing_disable"}
    | {"disable_input_require_grads", "enable_input_require_grads"}
    | {"get_input_embeddings", "get_output_embeddings", "get_position_embeddings"}
    | {
        "set_experts_implementation",
        "set_input_embeddings",
        "set_output_embeddings",
        "resize_token_embeddings",
    }
    | {"tie_weights", "get_expanded_tied_weights_keys"}
    | {"_default_compile_config"}  # needed by transformers' get_compiled_call, which compiles our forward
)

_MERGING = "the base stays as it is here; merge() gives a decoder of its own with the adapter folded in"
_SETTINGS = "an adapter's settings are in model.get_adapter(name).config"
_MIXING = (
    "adapters cannot be added up; give each row its own with adapter=, train one adapter on all data, or "
    "write the mean of several with `llama-adapter average`"
)
_NEW_BASE = "this would change the frozen base; change model.decoder before an adapter is made"

# Names that users of transformers and PEFT call, and that make no sense here.
REFUSED = {
    "merge_adapter": _MERGING,
    "unmerge_adapter": _MERGING,
    "add_weighted_adapter": _MIXING,
    "peft_config": _SETTINGS,
    "active_peft_config": _SETTINGS,
    "peft_type": _SETTINGS,
    "modules_to_save": "an adapter has no copies of the base's modules",
    "get_prompt": "prompts are not tokens; model.get_adapter(name).prompts has those of each layer",
    "get_prompt_embedding_to_save": "save the adapter with save_pretrained",
    "get_layer_status": "see model.adapters and model.active_adapters",
    "get_model_status": "see model.adapters and model.active_adapters",
    "create_or_update_model_card": "push_to_hub writes a card",
    "inject_adapter": "use new_adapter",
    "enable_peft_hotswap": "load both adapters and choose by set_adapter, which copies nothing",
    "set_decoder": _NEW_BASE,
    "set_encoder": _NEW_BASE,
    "init_weights": _NEW_BASE,
    "initialize_weights": _NEW_BASE,
    "post_init": _NEW_BASE,
    "dequantize": _NEW_BASE,
    "resize_position_embeddings": _NEW_BASE,
    "set_use_kernels": "the adapter lives in transformers' own attention, which kernels would replace",
    "register_for_auto_class": "an adapter folder has no code; LlamaAdapter.from_pretrained loads it",
}


class NameRefused(UsageError, AttributeError):
    """A name that is refused with a reason. `hasattr` gives False for it."""


class PassedOn(nn.Module):
    """Looks up on the decoder what `LlamaAdapter` does not define itself."""

    decoder: PreTrainedModel

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "decoder" or (name.startswith("__") and name.endswith("__")):
                raise
        if name in REFUSED:
            raise NameRefused(f"a LlamaAdapter has no {name!r}: {REFUSED[name]}")
        try:
            value = getattr(self.decoder, name)
        except AttributeError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None
        if isinstance(value, PreTrainedModel):
            return carry(self, value)
        if inspect.isroutine(value) and name not in PASSED_METHODS:
            raise NameRefused(
                f"a LlamaAdapter has no {name!r}: it is its decoder's alone; if you mean that, "
                f"call model.decoder.{name}"
            )
        return value

"""What `LlamaAdapter` can do under the names of PEFT and of transformers' models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import PREFIX, STOCK, register
from llama_adapter.surface.carried import carry
from llama_adapter.surface.making import Making


class PeftNames(Making):
    """The part of `LlamaAdapter` that users of PEFT and of transformers expect."""

    def unload(self) -> PreTrainedModel:
        """Delete all adapters. Returns the bare decoder."""
        for name in list(self.adapters):
            self.delete_adapter(name)
        return self.decoder

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> PreTrainedModel:
        """As `merge`, and then delete all adapters of this model. Returns the merged decoder, as in PEFT.

        Args:
            adapter_names: one name, to merge that adapter instead of the active one.
        """
        if adapter_names is not None and len(adapter_names) != 1:
            raise UsageError(f"{len(adapter_names)} adapters given; one is merged, so give one name")
        merged = self.merge(None if adapter_names is None else adapter_names[0])
        self.unload()
        return merged

    def get_base_model(self) -> nn.Module:
        """The decoder, with the active adapter in its forward as in PEFT. ``decoder`` is the bare one."""
        return carry(self, self.decoder)

    def get_decoder(self) -> nn.Module:
        """The decoder's backbone, with the active adapter in its forward."""
        return carry(self, self.decoder.get_decoder())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many parameters the base and the adapters have together. Shared ones are counted once."""
        embeddings = [m.weight for m in self.modules() if isinstance(m, nn.Embedding)]
        left_out = {id(weight) for weight in embeddings} if exclude_embeddings else set()
        return sum(
            _count(parameter)
            for parameter in self.parameters()
            if id(parameter) not in left_out and (parameter.requires_grad or not only_trainable)
        )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The number of trainable parameters, and of all parameters."""
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the base and the adapters."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nelement() * tensor.element_size() for tensor in tensors)

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], **_: Any) -> None:
        """Change the attention implementation that the prompts are added to: ``"sdpa"`` or ``"eager"``.

        Raises:
            UsageError: an implementation that the prompts can't be added to.
        """
        given = attn_implementation
        if isinstance(given, dict):
            if len(set(given.values())) != 1:
                raise UsageError(f"attention {given!r} given; give one for the whole decoder, sdpa or eager")
            given = next(iter(given.values()))
        stock = given.removeprefix(PREFIX)
        if stock not in STOCK:
            raise UsageError(f"attention {given!r} cannot be adapted; choose {' or '.join(STOCK)}")
        self.decoder.set_attn_implementation(register(stock))

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute each layer in the backward pass, instead of keeping its intermediate results.

        Raises:
            UsageError: reentrant checkpointing. Its first pass gives an adapter no gradients.
        """
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise UsageError(
                "use_reentrant=True gives an adapter no gradients; leave it out, or give use_reentrant=False"
            )
        settings = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        # transformers has renamed this method.
        name = "activation_checkpointing_enable"
        enable = getattr(self.decoder, name, None) or self.decoder.gradient_checkpointing_enable
        enable(settings, **options)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """As `activation_checkpointing_enable`, under its name in older versions of transformers."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)


def _count(parameter: nn.Parameter) -> int:
    # bitsandbytes packs two 4-bit numbers into a byte.
    packed = type(parameter).__name__ == "Params4bit"
    return parameter.numel() * 2 * parameter.element_size() if packed else parameter.numel()

"""LlamaAdapter: a frozen decoder and its adapters, as one object that behaves like a transformers model.

Shapes: B rows, T tokens, L adapted layers, H heads, K prompts, d head width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import is_sharded
from llama_adapter.methods.own_weights import counterpart
from llama_adapter.methods.packed_attention import Segment, mask_of_segments, segment_positions
from llama_adapter.methods.prepared import attention_layers
from llama_adapter.methods.probe import prepare_decoder
from llama_adapter.methods.state import AdapterState
from llama_adapter.surface.adapter_dict import AdapterDict
from llama_adapter.surface.answers import Answers
from llama_adapter.surface.effect import Readers, check_gradient, check_offloading, check_settings
from llama_adapter.surface.folders import Folders
from llama_adapter.surface.named_adapters import NO_ADAPTER
from llama_adapter.surface.peft_names import PeftNames

_PROJECTED_WITH_PICTURES = (
    "pictures are part of what project() gives; give them to it, or give an adapter's name"
)


class LlamaAdapter(Folders, Answers, PeftNames, GenerationMixin):
    """A frozen decoder with adapters that can be added, chosen, switched off and deleted by name.

    Every call takes ``adapter=NAME``, so several threads can use different adapters at once. ``"none"`` is
    the bare base. ``"auto"`` is the adapter that sees where there is a picture, else the text adapter.
    Without a name, the adapter chosen by `set_adapter` is used. Attributes that this class does not define
    are looked up on the decoder, or refused with a reason (see `surface.passing`).

    Attributes:
        decoder: the frozen transformers model.
        tokenizer: the base's tokenizer, or None.
        adapters: the loaded adapters by name.
        active_adapter: the name of the adapter that is used by default.
        base: name, folder or hub id of the decoder. Saved adapters name their base so.
    """

    main_input_name = "input_ids"
    get_compiled_call = (
        PreTrainedModel.get_compiled_call
    )  # compiles our forward; the decoder's method would compile its own
    _is_stateful = False

    def __init__(
        self,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        base: str | None = None,
        weights: str | Path | None = None,
    ) -> None:
        """Wrap a decoder that is already loaded.

        Args:
            base: the name of the base in adapters that are saved from here.
            weights: where names of vision towers are looked for (see `locations.weights_folders`).

        Raises:
            UsageError: a decoder whose family can't be adapted, with the reason.
        """
        super().__init__()
        self.decoder = prepare_decoder(decoder)
        self._readers = Readers(self.decoder)
        self.tokenizer = tokenizer
        self.base = base or str(decoder.config._name_or_path)
        self.weights = weights
        self._towers = {}
        self._precisions_told = set()
        self.adapters = AdapterDict()
        self.active_adapter = NO_ADAPTER
        self.config = decoder.config
        self.generation_config = decoder.generation_config
        self._keep_base_out_of_state()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        adapter: str | AdapterState | None = None,
        image_features: Tensor | None = None,
        image_owners: Tensor | None = None,
        segments: tuple[Segment, ...] | None = None,
        part: nn.Module | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The decoder's own forward, with an adapter's prompts in its attention.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), with padding on either side. Zeros elsewhere hide a token, which keeps its
                position.
            position_ids: (B, T). By default positions are counted from the end of the padding on the left (or
                as the segments say): the prompts' term depends on the position that a query is rotated to.
            labels: (B, T), -100 where there is no loss. The output then has ``loss``.
            adapter: the adapter's name, or the result of `project`. None uses the active one.
            image_features: (I, F) from `encode_images`, for the pictures of all rows. None: no pictures.
            image_owners: (I,) for each picture the row that it belongs to (in a packed sequence the prompt
                set). None gives each row one picture.
            segments: the rows of a packed sequence (B = 1). Rows do not see each other.
            part: the part of the decoder to run, with the same prompts (see `surface.carried`). None is the
                whole decoder. A part without the head takes no ``labels``.
            **kwargs: all else that the decoder's forward takes.
        """
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            tokens = input_ids if input_ids is not None else inputs_embeds
            assert tokens is not None
            cached = attention_mask.shape[1] > tokens.shape[1]
            position_ids = _positions(attention_mask, cached=cached)[:, -tokens.shape[1] :]
        if labels is not None and attention_mask is not None and attention_mask.ndim == 2:
            # Padding predicts nothing. On the left it would have to guess a row's first token.
            behind_padding = F.pad(_padding(attention_mask)[:, :-1], (1, 0))
            labels = labels.masked_fill(behind_padding, -100)
        if segments is not None and position_ids is None:
            position_ids = segment_positions(segments).to(self.device)
        if segments is not None:
            attention_mask = mask_of_segments(self.device)
        tokens = input_ids if input_ids is not None else inputs_embeds
        assert tokens is not None
        sets = len(tokens) if segments is None else 1 + max(segment.prompts for segment in segments)
        state = self._state(adapter, image_features, image_owners, sets)
        if segments is not None:
            state.check_packed()
        if state.parts:
            check_settings(self.decoder)
            self._readers.check(self.decoder)
        if part is None or part is self.decoder:
            kwargs |= {"labels": labels, "logits_to_keep": logits_to_keep}
        computing: Any = self.decoder if part is None else part.forward
        if state.decoder is not None:
            computing = state.decoder if part is None else counterpart(part, self.decoder, state.decoder)
        output: CausalLMOutputWithPast = computing(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            adapter=state if state.parts else None,
            segments=segments,
            **kwargs,
        )
        check_gradient(state, output)
        return output

    def _state(
        self, adapter: str | AdapterState | None, features: Tensor | None, owners: Tensor | None, rows: int
    ) -> AdapterState:
        if "_hf_hook" in vars(self):
            check_offloading(self.decoder, self.adapters)
        if features is not None and len(features) == 0:
            features = None
        if isinstance(adapter, AdapterState):
            if features is not None:
                raise UsageError(_PROJECTED_WITH_PICTURES)
            return adapter
        name = self.answering_adapter(adapter, pictured=features is not None)
        if features is not None:
            self.vision_config(name)
            if len(features) != (rows if owners is None else len(owners)):
                raise UsageError(
                    f"{len(features)} pictures for {rows} rows; give image_owners, a row for each"
                )
            features = features.to(self.device)
            owners = (torch.arange(rows) if owners is None else owners).to(features.device)
        if name == NO_ADAPTER:
            return AdapterState(self.shape.num_layers, {})
        return self.get_adapter(name).state(features, owners, rows)

    @torch.no_grad()
    def project(
        self,
        adapter: str | None = None,
        *,
        image_features: Tensor | None = None,
        image_owners: Tensor | None = None,
        rows: int = 1,
    ) -> AdapterState:
        """What an adapter adds to forward passes, computed once for many of them. Give it to `forward` as
        ``adapter``.

        It carries no gradient and the caller keeps it, so it can't leak into a later training step.

        Args:
            image_features, image_owners: as in `forward`.
            rows: B of the forward passes. It matters only with pictures.
        """
        live = self._state(adapter, image_features, image_owners, rows)
        attentions = attention_layers(self.decoder)
        return live.precompute(attentions)

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        adapter: str | AdapterState | None = None,
        image_features: Tensor | None = None,
        image_owners: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate`` with ``adapter``; all decoding methods work.

        ``image_features`` and ``image_owners`` are those of `forward`.
        An answer ends at the end tokens of the adapter's template, as in `chat`, unless ``eos_token_id`` is
        given here or in a ``generation_config``.
        On a sharded decoder every process must call this. All compute until the last row of any is complete.
        """
        if kwargs.get("synced_gpus") is None and is_sharded(self.decoder):
            kwargs["synced_gpus"] = True  # transformers sets this only for decoders that it sharded itself
        if not isinstance(adapter, AdapterState):
            name = self.answering_adapter(
                adapter, pictured=image_features is not None and len(image_features) > 0
            )
            if name != NO_ADAPTER and not _ends_given(*args, **kwargs) and self.tokenizer is not None:
                kwargs["eos_token_id"] = self.end_ids(name)
            given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            rows = next((len(tokens) for tokens in given if tokens is not None), 1)
            pictures = {"image_features": image_features, "image_owners": image_owners}
            adapter = self.project(name, rows=rows, **pictures)
        elif image_features is not None:
            raise UsageError(_PROJECTED_WITH_PICTURES)
        return super().generate(inputs, *args, adapter=adapter, **kwargs)  # type: ignore[misc]

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, *args: Any, adapter: AdapterState | None = None, **kwargs: Any
    ) -> Any:
        # transformers does this for tensors only.
        if adapter is not None:
            kwargs["adapter"] = adapter.repeat(expand_size)
        return super()._expand_inputs_for_generation(expand_size, *args, **kwargs)  # type: ignore[misc]

    def _get_candidate_generator(  # type: ignore[override]
        self, *, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        # An assistant model makes its guesses without our prompts: they would not fit its shape.
        theirs = {name: value for name, value in model_kwargs.items() if name != "adapter"}
        return super()._get_candidate_generator(model_kwargs=theirs, **kwargs)  # type: ignore[misc]


def _ends_given(generation_config: Any = None, *_: Any, **options: Any) -> bool:
    """Whether the caller of ``generate`` chose the end tokens."""
    return "eos_token_id" in options or getattr(generation_config, "eos_token_id", None) is not None


def _positions(mask: Tensor, *, cached: bool) -> Tensor:
    """Each token's position, (B, T), counted from the end of the padding on the left. A hidden token counts
    too.

    With a cache, a hidden token is padding at the end of what was read before, and does not count, as in
    `generate`.
    """
    real = mask != 0
    if not cached:
        in_front = real.cumsum(-1) == 0
        real = ~in_front | in_front.all(-1, keepdim=True)
    return (real.cumsum(-1) - 1).clamp_min(0)


def _padding(mask: Tensor) -> Tensor:
    """(B, T), True for padding at either end. A hidden token inside a row is not padding."""
    real = mask != 0
    return (real.cumsum(-1) == 0) | (real.flip(-1).cumsum(-1).flip(-1) == 0)


# A pipeline looks up the name of a model's class, and prints a long warning if it does not know it.
SUPPORTED_PEFT_TASKS["text-generation"].append(LlamaAdapter.__name__)

"""New adapters on a model, and new models and plain decoders from its adapters.

Shapes: L adapted layers, N layers of the decoder.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.data.chat_template import writes_date
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.config import AdapterConfig
from llama_adapter.methods.merging import merge_adapter
from llama_adapter.methods.part import PartConfig
from llama_adapter.methods.prepared import input_sizes
from llama_adapter.methods.projection import VisionConfig
from llama_adapter.methods.shape import default_adapted_layers
from llama_adapter.methods.sites import SitePart, projections_of
from llama_adapter.methods.table import PARTS, build_configs
from llama_adapter.quantization.libraries import precision_of
from llama_adapter.surface.effect import check_offloading
from llama_adapter.surface.named_adapters import NO_ADAPTER, NamedAdapters

if TYPE_CHECKING:
    from typing_extensions import Self


class Making(NamedAdapters):
    """The part of `LlamaAdapter` that makes new adapters, and models of its own from them."""

    def new_adapter(
        self,
        name: str,
        *,
        method: str = "prompts",
        adapted_layers: int | None = None,
        template: str = "alpaca",
        vision: VisionConfig | None = None,
        seed: int | None = None,
        template_date: str | None = None,
        **options: Any,
    ) -> Adapter:
        """Add an untrained adapter and choose it. It leaves the base's answers unchanged.

        Its prompts start as noise of the size that each layer's attention reads from tokens. The paper's
        N(0, 1) is larger where norms make that size small (three times in SmolLM2). The softmax over such
        large keys settles on one prompt, and the others get little gradient. The projection of pictures
        starts at the same size.

        Args:
            method: the parts of the adapter, joined by + ("prompts+scales"). `llama_adapter.methods.table`
                lists them.
            adapted_layers: L, how many layers are adapted, counted from the top. None takes N - N // 16 of N.
            template: the text format of its turns.
            vision: how it sees pictures; None makes an adapter for text only.
            seed: makes the random start reproducible, on one device in one dtype.
            template_date: the day that the tokenizer's chat template writes in training and in answering,
                such as 2026-11-28. None takes today if the template writes a date.
            **options: settings of its parts by name, such as ``prompt_length``.

        Raises:
            UsageError: an unknown method or option, or a value out of its range.
        """
        self._check_name(name)
        if "_hf_hook" in vars(self):
            check_offloading(self.decoder, self.adapters)
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise UsageError(f"seed: {seed} given; expected a whole number below 2**64")
        config = self._adapter_config(
            build_configs(method, options, vision), adapted_layers, template, template_date
        )
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        adapter = Adapter(config, generator)
        with torch.no_grad():
            sizes = torch.tensor(input_sizes(self.decoder)[-config.adapted_layers :])
            for part in adapter.parts:
                part.initialise(self.decoder, sizes)
        self.add_adapter(name, adapter)
        return adapter

    def _adapter_config(
        self,
        parts: Sequence[PartConfig],
        adapted_layers: int | None,
        template: str,
        template_date: str | None,
    ) -> AdapterConfig:
        """The config of a new adapter for this decoder. None is replaced by what it stands for."""
        kinds = [PARTS[AdapterConfig.kind_of(part)] for part in parts]
        completed = tuple(kind.complete(part, self.decoder) for kind, part in zip(kinds, parts, strict=True))
        for kind, part in zip(kinds, completed, strict=True):
            if (settled := kind.adapts(part, self.shape.num_layers)) is not None:
                if adapted_layers not in (None, settled):
                    raise UsageError(
                        f"adapted layers: {adapted_layers} given; {kind.kind} says itself which it changes "
                        f"({settled} here), so leave it out"
                    )
                adapted_layers = settled
        if adapted_layers is None:
            adapted_layers = default_adapted_layers(self.shape.num_layers)
        at_sites = any(issubclass(kind, SitePart) for kind in kinds)
        dated = template == "chat" and self.tokenizer is not None and writes_date(self.tokenizer)
        return AdapterConfig(
            base=self.base,
            shape=self.shape,
            adapted_layers=adapted_layers,
            parts=completed,
            template=template,
            projections=projections_of(self.decoder, adapted_layers) if at_sites else {},
            template_date=(template_date or datetime.date.today().isoformat()) if dated else None,
            quantization=precision_of(self.decoder),
        )

    def merge(self, adapter: str | None = None) -> PreTrainedModel:
        """A plain decoder with an adapter (by default the active one) folded into its weights.

        This model does not change. The two share all weights that are the same.

        Raises:
            UsageError: an adapter that can't be folded into weights, with the reason.
        """
        name = self.answering_adapter(adapter)
        if name == NO_ADAPTER:
            raise UsageError("there is no adapter to merge; add one, or choose one with set_adapter")
        return merge_adapter(self.decoder, self.get_adapter(name))

    def reference_model(self, adapter: str | None = None) -> Self:
        """A model on the same decoder, with a frozen copy of an adapter (by default the active one) as it is
        now.

        It serves as the reference in preference training, without a second base in memory:
        ``DPOTrainer(model, ref_model=model.reference_model(), ...)``. ``"none"`` gives the bare base.
        """
        name = self.answering_adapter(adapter)
        model = type(self)(self.decoder, self.tokenizer, base=self.base, weights=self.weights)
        if name != NO_ADAPTER:
            model.add_adapter(name, copy.deepcopy(self.get_adapter(name)).requires_grad_(False))
        return model

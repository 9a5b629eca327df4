"""Adapters by name on one decoder: add, choose, switch off, delete. PEFT's names for this work too.

Shapes: L adapted layers, N layers of the decoder.
"""

from __future__ import annotations

import copy
import datetime
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_adapter.common.errors import UsageError
from llama_adapter.data.chat_template import writes_date
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.attention import PREFIX, STOCK, register
from llama_adapter.methods.config import AdapterConfig
from llama_adapter.methods.decoder import decoder_shape
from llama_adapter.methods.merging import merge_adapter
from llama_adapter.methods.prepared import computing_device, input_sizes
from llama_adapter.methods.projection import VisionConfig
from llama_adapter.methods.shape import DecoderShape, default_adapted_layers
from llama_adapter.methods.sites import SitePart, projections_of
from llama_adapter.methods.table import PARTS, build_configs
from llama_adapter.quantization.libraries import precision_of
from llama_adapter.surface.adapter_dict import AdapterDict, module_name
from llama_adapter.surface.carried import carry
from llama_adapter.surface.effect import check_offloading
from llama_adapter.surface.passing import PassedOn
from llama_adapter.weights.catalogue import SHIPPED

if TYPE_CHECKING:
    from typing_extensions import Self

NO_ADAPTER = "none"  # the name of the bare base
AUTO = "auto"  # stands for the adapter that sees where there is a picture, else for the text adapter
_NOT_NAMES = {NO_ADAPTER, AUTO, "", *dir(AdapterDict())}  # names that the container of modules uses itself


class NamedAdapters(PassedOn):
    """The adapters of `LlamaAdapter`. Its docstring describes the attributes."""

    tokenizer: PreTrainedTokenizerBase | None
    adapters: nn.ModuleDict
    active_adapter: str
    base: str
    weights: str | Path | None
    _switched_off: str | None = None  # the adapter that `enable_adapters` switches on again, if any
    _precisions_told: set[str]  # those of adapters for which it was said that the base has another

    @property
    def shape(self) -> DecoderShape:
        """The decoder's sizes now: the vocabulary may have been resized."""
        return decoder_shape(self.decoder.config)

    @property
    def device(self) -> torch.device:
        """The device that the decoder computes on."""
        return computing_device(self.decoder)

    # --- adding and dropping --------------------------------------------------------------------------------

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
        shape = self.shape
        dated = template == "chat" and self.tokenizer is not None and writes_date(self.tokenizer)
        if dated and template_date is None:
            template_date = datetime.date.today().isoformat()
        parts = tuple(
            PARTS[AdapterConfig.kind_of(part)].complete(part, self.decoder)
            for part in build_configs(method, options, vision)
        )
        kinds = [PARTS[AdapterConfig.kind_of(part)] for part in parts]
        for kind, part in zip(kinds, parts, strict=True):
            if (settled := kind.adapts(part, shape.num_layers)) is not None:
                if adapted_layers not in (None, settled):
                    raise UsageError(
                        f"adapted layers: {adapted_layers} given; {kind.kind} says itself which it changes "
                        f"({settled} here), so leave it out"
                    )
                adapted_layers = settled
        if adapted_layers is None:
            adapted_layers = default_adapted_layers(shape.num_layers)
        at_sites = any(issubclass(kind, SitePart) for kind in kinds)
        config = AdapterConfig(
            base=self.base,
            shape=shape,
            adapted_layers=adapted_layers,
            parts=parts,
            template=template,
            projections=projections_of(self.decoder, adapted_layers) if at_sites else {},
            template_date=template_date if dated else None,
            quantization=precision_of(self.decoder),
        )
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        adapter = Adapter(config, generator)
        with torch.no_grad():
            sizes = torch.tensor(input_sizes(self.decoder)[-adapted_layers:])
            for part in adapter.parts:
                part.initialise(self.decoder, sizes)
        self.add_adapter(name, adapter)
        return adapter

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Add an adapter under a name and choose it.

        Raises:
            UsageError: a name that is taken or not allowed, or an adapter of another base.
        """
        given: tuple[Any, Any] = (name, adapter)
        if not isinstance(given[0], str) or not isinstance(given[1], Adapter):
            kinds = " and ".join(type(value).__name__ for value in given)
            raise UsageError(
                f"add_adapter takes a name and an Adapter, given {kinds}; new_adapter(name) makes a new one, "
                "load_adapter(folder) loads one"
            )
        self._check_name(name)
        shape = self.shape
        # No tensor of an adapter depends on the vocabulary, so added tokens do not make an adapter useless.
        if replace(adapter.config.shape, vocab_size=shape.vocab_size) != shape:
            raise UsageError(
                f"adapter {name!r} was trained for base {adapter.config.base!r} ({adapter.config.shape}); "
                f"{self.base!r} is {shape}; give its own base"
            )
        if adapter.config.shape != shape:
            trained = adapter.config.shape.vocab_size
            what_to_do = (
                "it works if tokens were only added since"
                if trained < shape.vocab_size
                else f"if it uses the others, call resize_token_embeddings({trained}) and load theirs"
            )
            warnings.warn(
                f"adapter {name!r} was trained with {trained} tokens, {self.base!r} has {shape.vocab_size}; "
                f"{what_to_do}",
                stacklevel=3,
            )
        here, then = (found or "none" for found in (precision_of(self.decoder), adapter.config.quantization))
        if here != then and then not in self._precisions_told:
            self._precisions_told.add(then)  # once is enough: a page loads several adapters
            warnings.warn(
                f"adapter {name!r} was trained with quantization {then}; {self.base!r} has {here} here, so "
                "answers may differ a little",
                stacklevel=3,
            )
        if any(isinstance(part, SitePart) for part in adapter.parts):
            adapter.use_projections(projections_of(self.decoder, adapter.config.adapted_layers))
        for part in adapter.parts:
            part.attach(self.decoder)
        self.adapters[name] = adapter.to(self.device)
        self._choose(name)

    def _check_name(self, name: str) -> None:
        if name in self.adapters:
            raise UsageError(f"adapter name {name!r} is taken; delete that one first")
        if module_name(name) in _NOT_NAMES:
            raise UsageError(f"adapter name {name!r} is reserved; choose another")

    def delete_adapter(self, name: str) -> None:
        """Delete an adapter. If it was the active one, the bare base answers from then on."""
        self.get_adapter(name)
        del self.adapters[name]
        if self.active_adapter == name or not self.adapters:
            self.active_adapter = NO_ADAPTER
        if self._switched_off == name:
            self._switched_off = None

    def unload(self) -> PreTrainedModel:
        """Delete all adapters. Returns the bare decoder."""
        for name in list(self.adapters):
            self.delete_adapter(name)
        return self.decoder

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

    # --- choosing -------------------------------------------------------------------------------------------

    def set_adapter(self, name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the adapter that answers by default. ``"none"`` is the bare base, ``"auto"`` the right
        adapter for each question (see `answering_adapter`).

        This ends a `disable_adapters`. The choice also stays when the ``with`` block of one ends.
        ``inference_mode`` freezes the adapter.
        """
        if not isinstance(name, str):
            if len(name) != 1:
                raise UsageError(
                    f"{len(name)} adapters given ({', '.join(name)}); choose one, or call with adapter="
                )
            (name,) = name
        self._choose(name if name == AUTO else self.answering_adapter(name))
        if inference_mode:
            self.set_requires_grad(self.active_adapters, False)

    def _choose(self, name: str) -> None:
        self.active_adapter = name
        self._switched_off = None

    def disable_adapters(self) -> SwitchedOff:
        """Let the bare base answer: inside a ``with`` block, or else until `enable_adapters`."""
        return SwitchedOff(self)

    disable_adapter = disable_adapters  # PEFT's name

    def enable_adapters(self) -> None:
        """Let the adapter that `disable_adapters` switched off answer again."""
        if self._switched_off is not None:
            self._choose(self._switched_off)

    @property
    def active_adapters(self) -> ActiveAdapters:
        """The names of the adapters that answer by default: one or none, or two where ``"auto"`` is chosen.

        PEFT uses this as an attribute, transformers as a method; both work.
        """
        names = dict.fromkeys(self.answering_adapter(pictured=pictured) for pictured in (False, True))
        return ActiveAdapters(name for name in names if name != NO_ADAPTER)

    def answering_adapter(self, adapter: str | None = None, *, pictured: bool = False) -> str:
        """The name of the adapter that answers when this one (by default the active one) is asked.

        It is the same name, unless that is ``"auto"``. With a picture, ``"auto"`` stands for the shipped
        vision adapter, or else the first loaded one that sees. Without a picture, or where none sees, it
        stands for the shipped text adapter, or else the first loaded one that does not see. An adapter for
        ScienceQA is only taken where there is no other. Where there is none at all, the bare base answers.

        Args:
            pictured: whether there is a picture.
        """
        name = self.active_adapter if adapter is None else adapter
        if name == AUTO:
            name = self._automatic(pictured)
        if name != NO_ADAPTER:
            self.get_adapter(name)
        return name

    def _automatic(self, pictured: bool) -> str:
        def is_for(name: str) -> bool:
            return (self.get_adapter(name).config.vision is not None) == pictured

        def wish(name: str) -> tuple[bool, bool]:  # the least comes first
            shipped = any(name == (own.vision if pictured else own.text) for own in SHIPPED.values())
            return not shipped, self.get_adapter(name).config.scienceqa is not None

        found = min(filter(is_for, self.adapters), key=wish, default=NO_ADAPTER)
        return self._automatic(pictured=False) if pictured and found == NO_ADAPTER else found

    def get_adapter(self, name: str) -> Adapter:
        """A loaded adapter by name. For an unknown name, raises a UsageError that lists those loaded."""
        if name not in self.adapters:
            there = ", ".join([*self.adapters, NO_ADAPTER, *([AUTO] if self.adapters else [])])
            raise UsageError(f"no adapter {name!r} is loaded; there are {there}")
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

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

    # --- names of PEFT and transformers ---------------------------------------------------------------------

    def get_base_model(self) -> nn.Module:
        """The decoder, with the active adapter in its forward as in PEFT. ``decoder`` is the bare one."""
        return carry(self, self.decoder)

    def get_decoder(self) -> nn.Module:
        """The decoder's backbone, with the active adapter in its forward."""
        return carry(self, self.decoder.get_decoder())

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze adapters or make them trainable. The base stays frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for adapter in [self.get_adapter(name) for name in names]:
            adapter.requires_grad_(requires_grad)

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


class SwitchedOff:
    """Adapters that are switched off, from the creation of this object to the end of its ``with`` block."""

    def __init__(self, model: NamedAdapters) -> None:
        self._model = model
        self._outermost = model._switched_off is None
        if self._outermost:
            model._switched_off, model.active_adapter = model.active_adapter, NO_ADAPTER

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        if self._outermost:
            self._model.enable_adapters()


class ActiveAdapters(list[str]):
    """A list of names that can also be called, and then returns itself."""

    def __call__(self) -> list[str]:
        return list(self)


def _count(parameter: nn.Parameter) -> int:
    # bitsandbytes packs two 4-bit numbers into a byte.
    packed = type(parameter).__name__ == "Params4bit"
    return parameter.numel() * 2 * parameter.element_size() if packed else parameter.numel()


def default_name(adapter: str | Path) -> str:
    """An adapter's default name: that of its folder, changed where it is reserved."""
    name = Path(str(adapter)).resolve().name
    return f"{name}_" if module_name(name) in _NOT_NAMES else name

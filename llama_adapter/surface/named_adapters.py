"""Adapters by name on one decoder: add, choose, switch off, delete."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.decoder import decoder_shape
from llama_adapter.methods.prepared import computing_device
from llama_adapter.methods.shape import DecoderShape
from llama_adapter.methods.sites import SitePart, projections_of
from llama_adapter.quantization.libraries import precision_of
from llama_adapter.surface.adapter_dict import AdapterDict, module_name
from llama_adapter.surface.passing import PassedOn
from llama_adapter.weights.catalogue import SHIPPED

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

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze adapters or make them trainable. The base stays frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for adapter in [self.get_adapter(name) for name in names]:
            adapter.requires_grad_(requires_grad)


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


def default_name(adapter: str | Path) -> str:
    """An adapter's default name: that of its folder, changed where it is reserved."""
    name = Path(str(adapter)).resolve().name
    return f"{name}_" if module_name(name) in _NOT_NAMES else name

"""Adapters by name on one decoder: added, chosen, switched off, dropped.

Shapes: L adapted layers, K prompts.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_adapter.common.errors import UsageError
from llama_adapter.data.chat_template import writes_date
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.config import AdapterConfig, DecoderShape, VisionConfig, default_adapted_layers
from llama_adapter.methods.probe import input_sizes
from llama_adapter.methods.tuning import listen, tuning_width

NO_ADAPTER = "none"  # the name that stands for the bare base
_NOT_NAMES = {NO_ADAPTER, "", *dir(nn.ModuleDict())}  # what torch's container of modules calls its own


class NamedAdapters(nn.Module):
    """The adapters of `LlamaAdapter`; its docstring describes the attributes."""

    decoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    adapters: nn.ModuleDict
    active_adapter: str
    base: str
    shape: DecoderShape
    weights: str | Path | None

    def new_adapter(
        self,
        name: str,
        *,
        prompt_length: int = 10,
        adapted_layers: int | None = None,
        template: str = "alpaca",
        vision: VisionConfig | None = None,
        bias_tuning: bool = False,
        seed: int | None = None,
        template_date: str | None = None,
    ) -> Adapter:
        """Add an untrained adapter, which leaves the base's answers as they are, and choose it.

        Its prompts start as noise of the size that each layer's attention reads from tokens. The paper's
        N(0, 1) is larger where norms make that small (three times in SmolLM2), and the softmax over such keys
        settles on one prompt, which leaves the others with little gradient. Image tokens start so, too.

        Args:
            prompt_length: K, prompts in each adapted layer.
            adapted_layers: L, the topmost ones; None takes N - N // 16 of N.
            template: how turns are written for it.
            vision: how it sees; None makes an adapter for text alone.
            bias_tuning: train a scale and a bias of each linear projection as well (LLaMA-Adapter V2, see
                `llama_adapter.methods.tuning`).
            seed: makes the prompts the same every time, on one device in one dtype.
            template_date: the day that the tokenizer's chat template writes in training and in answering, as
                2026-11-28; None takes today's for a template that writes one.
        """
        if adapted_layers is None:
            adapted_layers = default_adapted_layers(self.shape.num_layers)
        dated = template == "chat" and self.tokenizer is not None and writes_date(self.tokenizer)
        if dated and template_date is None:
            template_date = datetime.date.today().isoformat()
        config = AdapterConfig(
            base=self.base,
            shape=self.shape,
            adapted_layers=adapted_layers,
            prompt_length=prompt_length,
            template=template,
            vision=vision,
            tuning_width=tuning_width(self.decoder) if bias_tuning else 0,
            template_date=template_date if dated else None,
        )
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        adapter = Adapter(config, generator)
        with torch.no_grad():
            sizes = torch.tensor(input_sizes(self.decoder)[-adapted_layers:])
            adapter.prompts.mul_(sizes[:, None, None])
            if adapter.projection is not None and adapter.projection.sizes is not None:
                adapter.projection.sizes.mul_(sizes[:, None])
        self.add_adapter(name, adapter)
        return adapter

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Add an adapter under a name and choose it.

        Raises:
            UsageError: a name that is taken or cannot be one, or an adapter of another base.
        """
        if name in self.adapters:
            raise UsageError(f"adapter name {name!r} is taken; delete that one first")
        if name in _NOT_NAMES or "." in name:
            raise UsageError(f"adapter name {name!r} cannot be used; choose another, without dots")
        if adapter.config.shape != self.shape:
            raise UsageError(
                f"adapter {name!r} was trained for base {adapter.config.base!r} ({adapter.config.shape}); "
                f"{self.base!r} is {self.shape}; give its own base"
            )
        if adapter.tuning is not None:
            if adapter.config.tuning_width != (width := tuning_width(self.decoder)):
                raise UsageError(
                    f"adapter {name!r} has {adapter.config.tuning_width} scales and biases a layer; "
                    f"{self.base!r} has room for {width}; give its own base"
                )
            listen(self.decoder)
        self.adapters[name] = adapter.to(self.decoder.device)
        self.active_adapter = name

    def set_adapter(self, name: str) -> None:
        """Choose the adapter that answers by default; ``"none"`` is the bare base."""
        self.active_adapter = self._name(name)

    def delete_adapter(self, name: str) -> None:
        """Drop an adapter; where it was the active one, the bare base answers."""
        self.get_adapter(name)
        del self.adapters[name]
        if self.active_adapter == name:
            self.active_adapter = NO_ADAPTER

    @contextmanager
    def disable_adapters(self) -> Iterator[None]:
        """Within it, the bare base answers."""
        before, self.active_adapter = self.active_adapter, NO_ADAPTER
        try:
            yield
        finally:
            self.active_adapter = before

    def _name(self, name: str | None) -> str:
        name = self.active_adapter if name is None else name
        if name != NO_ADAPTER:
            self.get_adapter(name)
        return name

    def get_adapter(self, name: str) -> Adapter:
        """A loaded adapter by name. Raises UsageError, naming what there is, for any other."""
        if name not in self.adapters:
            there = ", ".join([*self.adapters, NO_ADAPTER])
            raise UsageError(f"no adapter {name!r} is loaded; there are {there}")
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter


def default_name(adapter: str | Path) -> str:
    """The name that an adapter gets by default: its folder's, made fit for one."""
    name = Path(str(adapter)).resolve().name.replace(".", "_")
    return f"{name}_" if name in _NOT_NAMES else name

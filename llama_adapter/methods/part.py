"""The base class of methods: a part of an adapter, with settings, tensors and its effect on a forward pass.

An adapter is a list of parts. A part owns parameters, and `Part.add_state` turns them into the tensors that
one forward pass reads. These tensors travel as one object (`llama_adapter.methods.state.AdapterState`), a
keyword of the decoder's forward, and never as state on modules. State would break with two threads, beams,
mixed batches, and recomputation in the backward pass.

The tensors of a state are batch-first, (R, L, ...). R is 1 if all rows share them, else the number of rows. L
is the number of layers that the part adapts, counted from the top. Tensors of zeros add nothing.

Shapes: R sets of a part's tensors, L adapted layers; N pictures, F features of one picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from llama_adapter.common.processes import Processes
from llama_adapter.common.typed import STRICT
from llama_adapter.methods.attention import compute_dtype
from llama_adapter.methods.shape import Layout

State = dict[str, Tensor]  # a part's tensors by name


@dataclass(frozen=True)
class PartConfig:
    """A part's settings, stored with the adapter. Each part has a subclass with its own fields.

    Fields are options that users set by name, except those with ``metadata={"derived": True}``. A field that
    was added after a part's first release is marked ``"later": True``. It is written only if it differs from
    its default, so that other adapters' folders do not change.
    """

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Inputs:
    """What a forward pass gives to the parts.

    Attributes:
        features: (N, F), of all pictures of all rows; None without pictures.
        owners: (N,), the row that each picture belongs to.
        rows: how many rows there are.
    """

    features: Tensor | None = None
    owners: Tensor | None = None
    rows: int = 1


class Part(nn.Module):
    """One method's part of an adapter.

    Attributes:
        kind: the part's name: in method strings, in the adapter's config, and before the names of its
            tensors.
        Config: the class of its settings.
        learning_rate: the peak rate at which the method is usually trained. A comparison starts from it.
        size: the option that makes the part larger or smaller; None if it has only one size.
        layout: what it was built for.
        differs_in_packs: whether rows of one packed sequence may have different tensors of this part.
        alone: whether it has to be the only part of an adapter.
    """

    kind: ClassVar[str]
    differs_in_packs: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    Config: ClassVar[type[PartConfig]]
    learning_rate: ClassVar[float] = 1e-3
    size: ClassVar[str | None] = None
    layout: Layout

    def __init__(self, config: Any, layout: Layout, generator: torch.Generator | None = None) -> None:
        """Build the part with all its parameters. Random values are drawn from ``generator``."""
        super().__init__()
        self.config = config
        self.layout = layout

    @classmethod
    def sized(cls, size: int) -> dict[str, Any]:
        """The options for a size, from 1; the parameters grow in proportion.

        Empty if it has only one size.
        """
        return {} if cls.size is None else {cls.size: size}

    @classmethod
    def complete(cls, config: Any, decoder: PreTrainedModel) -> Any:
        """The settings of a new part, with what only its decoder tells. By default they are not changed."""
        return config

    @classmethod
    def adapts(cls, config: Any, num_layers: int) -> int | None:
        """How many of the topmost layers it adapts, if its settings decide that. None: any number."""
        return None

    def initialise(self, decoder: PreTrainedModel, input_sizes: Tensor) -> None:
        """Fit a new part to the decoder that it will adapt. Does nothing by default.

        Args:
            input_sizes: (L,), the root mean square of the input of each adapted layer's attention.
        """

    def take_over(self, other: Part) -> None:
        """Copy the values of another part of this kind, from which a training starts."""
        self.load_state_dict(other.state_dict())

    def attach(self, decoder: PreTrainedModel) -> None:
        """Register what the part needs on the decoder that it adapts. Does nothing by default.

        Raises:
            UsageError: the part can't be used with this decoder.
        """

    def add_state(self, states: dict[type[Part], State], inputs: Inputs) -> None:
        """Add the tensors that a forward pass reads, with gradients, to those of the parts before.

        By default these are the part's parameters: each one, (L, ...), as (1, L, ...).
        """
        states[type(self)] = {name: value[None] for name, value in self.named_parameters()}

    @classmethod
    def precompute(cls, state: State, attentions: Sequence[nn.Module]) -> State:
        """A copy of the state in the form that is best for many forward passes without gradients.

        Args:
            attentions: those of the part's L layers.
        """
        dtype = compute_dtype(attentions[0])
        return {name: value.detach().to(dtype, copy=True) for name, value in state.items()}

    @classmethod
    def prompts_of(cls, state: State, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """What a layer reads from its prompts. None by default: the part has no prompts.

        Args:
            state: the tensors of the layer, (R, ...) each.

        Returns:
            keys and gated values, (R, H, K, d) each, and a mask, (R, K), False at padding, or None.
        """
        return None

    @classmethod
    def keys_of(cls, state: State, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys and values before those of a layer's tokens. None by default: the part has none.

        Args:
            state: the tensors of the layer, (R, ...) each.

        Returns:
            keys and values, (R, G, K, d) each, with the layer's own G, and a mask, (R, K), False at padding,
            or None.
        """
        return None

    @classmethod
    def merge(cls, states: Sequence[State | None]) -> State:
        """Merge the states of several rows, (1, L, ...) each, into that of one batch, (B, L, ...).

        By default tensors are padded with zeros: for layers below the topmost, at the end of all other
        dimensions, and for whole tensors that a row does not have. A part that zeros do not switch off needs
        its own method.

        Args:
            states: that of each row; None if its adapter does not have this part.

        Raises:
            UsageError: the part can't differ from row to row; the message names it.
        """
        merged = {}
        for name in dict.fromkeys(name for state in states for name in state or {}):
            own = [state.get(name) if state else None for state in states]
            like = next(value for value in own if value is not None)
            sizes = [max(value.shape[dim] for value in own if value is not None) for dim in range(like.ndim)]
            merged[name] = torch.cat([_filled(like[:, :0] if v is None else v, sizes) for v in own])
        return merged

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters, by the names of groups that can have a learning rate of their own."""
        return {self.kind: list(self.parameters())}

    def rate_factors(self) -> dict[str, float]:
        """Factors for the learning rates of groups.

        They do not apply to a group that was given its own rate.
        """
        return {}

    def begin(self, rows: int, backward: Callable[[int], object], processes: Processes) -> None:
        """Called by a training before its first step, but not by a resumed one. Does nothing by default.

        Args:
            rows: how many rows there are to train on.
            backward: adds the gradient of a row's mean loss. It takes the row's number, from 0.
            processes: those of the run. Each has all rows, and all must get the same result.
        """

    def penalty(self) -> Tensor | None:
        """A term that training adds to the loss of a step, with a gradient. None by default."""
        return None

    def after_step(self, step: int, total: int) -> None:
        """Called by a training after each step of the optimiser, while gradients are there. Does nothing by
        default.

        Args:
            step: its number, from 1.
            total: how many steps the training has.
        """

    def training_state(self) -> dict[str, Tensor]:
        """What a resumed training needs beside parameters and buffers. Nothing by default.

        It is stored in checkpoints, not in the adapter's folder.
        """
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `training_state`."""


def _filled(value: Tensor, sizes: Sequence[int]) -> Tensor:
    """A tensor (1, L, ...) padded with zeros to ``sizes``: layers at the front, all else at the end."""
    missing = [size - own for size, own in zip(sizes, value.shape, strict=True)][1:]
    padding = [(missing[0], 0), *((0, behind) for behind in missing[1:])]
    return F.pad(value, [count for pair in reversed(padding) for count in pair])


def by_site(state: Mapping[str, Tensor]) -> dict[str, State]:
    """A layer's tensors by the site in their name: "mlp.up_proj.scale" is "scale" of "mlp.up_proj"."""
    sites: dict[str, State] = {}
    for name, value in state.items():
        site, _, own = name.rpartition(".")
        sites.setdefault(site, {})[own] = value
    return sites

"""What every method is: a part of an adapter, with settings, tensors and what it adds to a forward pass.

An adapter is a list of parts. A part owns parameters; `Part.add_state` turns them into the tensors that
one forward pass reads. These tensors travel as one object (`llama_adapter.methods.state.AdapterState`), a
keyword of the decoder's forward, and never as state on modules: two threads, beams, mixed batches and
recomputation in the backward pass would break on it.

The tensors of a state are batch-first, (R, L, ...): R is 1 where all rows share them, else the number of
rows; L is the number of layers that the part adapts, the topmost ones. Filled with zeros they add nothing.

Shapes: R sets of a part's tensors, L adapted layers; N pictures, F features of one.
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
from llama_adapter.methods.attention import compute_dtype
from llama_adapter.methods.shape import Layout

State = dict[str, Tensor]  # a part's tensors by name


@dataclass(frozen=True)
class PartConfig:
    """A part's settings, stored with the adapter. Each part has a subclass with its own fields.

    Fields are options that users set by name, all but those with ``metadata={"derived": True}``. One that
    a part got after its first release is marked ``"later": True``: folders name it only where it is not the
    default, so that adapters without it stay what they were.
    """


@dataclass(frozen=True)
class Inputs:
    """What a forward pass gives to the parts.

    Attributes:
        features: (N, F), of all pictures of all rows; None where there is none.
        owners: (N,), the row that each picture belongs to.
        rows: how many rows there are.
    """

    features: Tensor | None = None
    owners: Tensor | None = None
    rows: int = 1


class Part(nn.Module):
    """One method's share of an adapter.

    Attributes:
        kind: the part's name: in method strings, in the adapter's config, before its tensors' names.
        Config: the class of its settings.
        learning_rate: the peak at which the method is usually trained; a comparison starts from it.
        size: the option that makes the part larger or smaller; None where it has only one size.
        layout: what it was built for.
        differs_in_packs: whether the rows of one packed sequence may have different ones.
        alone: whether it is the only part of an adapter.
    """

    kind: ClassVar[str]
    differs_in_packs: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    Config: ClassVar[type[PartConfig]]
    learning_rate: ClassVar[float] = 1e-3
    size: ClassVar[str | None] = None
    layout: Layout

    def __init__(self, config: Any, layout: Layout, generator: torch.Generator | None = None) -> None:
        """Build the part with all its parameters, drawn from ``generator`` where they are random."""
        super().__init__()
        self.config = config
        self.layout = layout

    @classmethod
    def sized(cls, size: int) -> dict[str, Any]:
        """The options of a size from 1, with which its parameters grow alike; none where it has only one."""
        return {} if cls.size is None else {cls.size: size}

    @classmethod
    def complete(cls, config: Any, decoder: PreTrainedModel) -> Any:
        """The settings of a new part with what only its decoder tells; as they are by default."""
        return config

    @classmethod
    def adapts(cls, config: Any, num_layers: int) -> int | None:
        """How many of the topmost layers it changes, where it says so itself; None: any number."""
        return None

    def initialise(self, decoder: PreTrainedModel, input_sizes: Tensor) -> None:
        """Fit a new part to the decoder that it will adapt; does nothing by default.

        Args:
            input_sizes: (L,), the root mean square of what each adapted layer's attention reads.
        """

    def attach(self, decoder: PreTrainedModel) -> None:
        """Register what the part needs on the decoder that it adapts; does nothing by default.

        Raises:
            UsageError: it is not for this decoder.
        """

    def add_state(self, states: dict[type[Part], State], inputs: Inputs) -> None:
        """Add the tensors that a forward pass reads to those of the parts before, with gradients.

        By default the part's parameters, (L, ...) each, as (1, L, ...).
        """
        states[type(self)] = {name: value[None] for name, value in self.named_parameters()}

    @classmethod
    def precompute(cls, state: State, attentions: Sequence[nn.Module]) -> State:
        """The state as it is best kept for many forward passes without gradients; a copy.

        Args:
            attentions: of the part's L layers.
        """
        dtype = compute_dtype(attentions[0])
        return {name: value.detach().to(dtype, copy=True) for name, value in state.items()}

    @classmethod
    def prompts_of(cls, state: State, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """What a layer reads from its prompts; None by default: the part has none.

        Args:
            state: the tensors of the layer, (R, ...) each.

        Returns:
            keys and gated values, (R, H, K, d) each, and a mask, (R, K), False at padding, or None.
        """
        return None

    @classmethod
    def keys_of(cls, state: State, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys and values that a layer reads in front of its tokens'; None by default: the part has none.

        Args:
            state: the tensors of the layer, (R, ...) each.

        Returns:
            keys and values, (R, G, K, d) each, G as the layer has them, and a mask, (R, K), False at padding,
            or None.
        """
        return None

    @classmethod
    def merge(cls, states: Sequence[State | None]) -> State:
        """The states of several rows, (1, L, ...) each, as that of one batch, (B, L, ...).

        By default tensors are filled up with zeros: layers below the topmost, entries at the end of all other
        dimensions, whole tensors where a row has none. A part that zeros do not switch off has its own.

        Args:
            states: of each row; None where its adapter lacks this part.

        Raises:
            UsageError: the part cannot differ from row to row; the message names it.
        """
        merged = {}
        for name in dict.fromkeys(name for state in states for name in state or {}):
            own = [state.get(name) if state else None for state in states]
            like = next(value for value in own if value is not None)
            sizes = [max(value.shape[dim] for value in own if value is not None) for dim in range(like.ndim)]
            merged[name] = torch.cat([_filled(like[:, :0] if v is None else v, sizes) for v in own])
        return merged

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters by the name of the group that has a learning rate of its own."""
        return {self.kind: list(self.parameters())}

    def rate_factors(self) -> dict[str, float]:
        """What the learning rate of a group is multiplied by, for groups that have no rate of their own."""
        return {}

    def begin(self, rows: int, backward: Callable[[int], object], processes: Processes) -> None:
        """What training does before its first step; nothing by default. A run that is resumed does without.

        Args:
            rows: how many there are to train on.
            backward: adds the gradient of the mean loss of one of them, by its number from 0.
            processes: of the run. Each has all rows, and all must end up with the same.
        """

    def penalty(self) -> Tensor | None:
        """What training adds to the loss of a step, with a gradient; None by default: nothing."""
        return None

    def after_step(self, step: int, total: int) -> None:
        """What training does after a step of the optimiser, with its gradients; nothing by default.

        Args:
            step: its number, from 1. total: how many steps the training has.
        """

    def training_state(self) -> dict[str, Tensor]:
        """What a training needs to go on, beside parameters and buffers; nothing by default.

        It is kept in checkpoints, not in the adapter's folder.
        """
        return {}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `training_state` gave."""


def _filled(value: Tensor, sizes: Sequence[int]) -> Tensor:
    """A tensor (1, L, ...) filled up to ``sizes`` with zeros: layers in front, all else behind."""
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

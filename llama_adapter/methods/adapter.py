"""An adapter: a list of parts, and the only module that is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.config import AdapterConfig
from llama_adapter.methods.own_weights import WeightsPart
from llama_adapter.methods.part import Inputs, Part, State
from llama_adapter.methods.projection import Projection
from llama_adapter.methods.prompts import Prompts
from llama_adapter.methods.scales import Scales, ScalesConfig
from llama_adapter.methods.state import AdapterState
from llama_adapter.methods.table import PARTS

P = TypeVar("P", bound=Part)


class Adapter(nn.ModuleDict):
    """The parts of an adapter by kind. A parameter's name is the part's kind, a dot, and its own name.

    Attributes:
        config: what the adapter is made of, and the base that it belongs to.
        prompts, projection, scales: the parts of these kinds, if it has them. `find` gives any part.
    """

    prompts: Prompts
    projection: Projection
    scales: Scales

    def __init__(self, config: AdapterConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        for part in config.parts:
            kind = config.kind_of(part)
            self[kind] = PARTS[kind](part, config.layout, generator)

    @property
    def parts(self) -> list[Part]:
        """Its parts, in the order in which they act."""
        return list(self.values())  # type: ignore[arg-type]

    def find(self, part: type[P]) -> P | None:
        """The part of a class, or None."""
        return next((own for own in self.parts if isinstance(own, part)), None)

    def state(
        self, features: Tensor | None = None, owners: Tensor | None = None, rows: int = 1
    ) -> AdapterState:
        """Everything that the adapter adds to a forward pass, with gradients.

        Args:
            features: (N, F), of all pictures of all rows; None without pictures.
            owners: (N,), the row that each picture belongs to.
            rows: how many rows there are. It matters only with pictures.
        """
        states: dict[type[Part], State] = {}
        for part in self.parts:
            part.add_state(states, Inputs(features, owners, rows))
        owner = self.find(WeightsPart)
        return AdapterState(self.config.shape.num_layers, states, None if owner is None else owner.decoder())

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters, by the names of groups that can have a learning rate of their own."""
        groups: dict[str, list[nn.Parameter]] = {}
        for part in self.parts:
            groups |= part.parameter_groups()
        return groups

    def rate_factors(self) -> dict[str, float]:
        """Factors for the learning rates of groups; see `Part.rate_factors`."""
        return {name: factor for part in self.parts for name, factor in part.rate_factors().items()}

    def use_projections(self, projections: Mapping[str, tuple[int, int]]) -> None:
        """Check that the parts fit the projections of a decoder's layers. Stores the projections' names if
        missing.

        Raises:
            UsageError: the decoder has other projections.
        """
        config = self.config
        scales = config.find(ScalesConfig)
        width = 2 * sum(out for _, out in projections.values())
        if config.projections and dict(config.projections) != dict(projections):
            raise UsageError(
                f"the adapter was trained for base {config.base!r}, whose layers have other projections; "
                "give its own base"
            )
        if scales is not None and scales.width not in (0, width):
            raise UsageError(
                f"the adapter has {scales.width} scales and biases a layer; this base has room for {width}; "
                "give its own base"
            )
        parts = tuple(ScalesConfig() if part is scales else part for part in config.parts)
        self.config = dataclasses.replace(config, projections=dict(projections), parts=parts)
        for part in self.parts:
            part.layout = self.config.layout

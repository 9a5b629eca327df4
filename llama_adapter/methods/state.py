"""Everything that adapters add to one forward pass, as one object that the decoder passes on as a keyword.

It holds tensors and never changes. So several threads may read it, many forward passes may use it, and a
layer that is recomputed in the backward pass finds the same values.

Shapes: R rows, or 1 if all rows share; L layers that a part adapts, counted from the top; K prompts, H heads,
d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import layer_index
from llama_adapter.methods.part import Part, State, by_site
from llama_adapter.methods.sites import Acting, SitePart
from llama_adapter.methods.table import PARTS


@dataclass(frozen=True, eq=False)
class AdapterState:
    """The tensors of one or several rows' adapters, by part.

    Attributes:
        num_layers: the number of layers of the decoder.
        parts: each part's tensors, (R, L, ...), by name, in the order in which the parts act. Empty for the
            bare base.
        decoder: the decoder that computes, if it is not the base (`llama_adapter.methods.own_weights`).
    """

    num_layers: int
    parts: Mapping[type[Part], Mapping[str, Tensor]]
    decoder: PreTrainedModel | None = None
    if TYPE_CHECKING:  # not fields: fully sharded layers copy the state with `dataclasses.replace`
        # By layer of the decoder, split once: the gradient of each single slice would be as large as all
        # layers.
        _layers: tuple[dict[type[Part], State], ...] = field(init=False, repr=False)
        _sites: tuple[dict[str, Acting], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        layers: list[dict[type[Part], State]] = [{} for _ in range(self.num_layers)]
        for part, tensors in self.parts.items():
            for name, tensor in tensors.items():
                for layer, piece in zip(layers[-tensor.shape[1] :], tensor.unbind(1), strict=True):
                    layer.setdefault(part, {})[name] = piece
        sites = []
        for layer in layers:
            acting: dict[str, list[tuple[type[SitePart], State]]] = {}
            for part, state in layer.items():
                if issubclass(part, SitePart):
                    for site, own in by_site(state).items():
                        acting.setdefault(site, []).append((part, own))
            sites.append(acting)
        object.__setattr__(self, "_layers", tuple(layers))
        object.__setattr__(self, "_sites", tuple(sites))

    @property
    def kinds(self) -> set[str]:
        """The kinds of its parts."""
        return {part.kind for part in self.parts}

    def prompts_of(self, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """What a layer reads from its prompts; see `Part.prompts_of`."""
        for part, state in self._layers[layer_index(attention)].items():
            if (found := part.prompts_of(state, attention)) is not None:
                return found
        return None

    def keys_of(self, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys and values before those of a layer's tokens; see `Part.keys_of`."""
        for part, state in self._layers[layer_index(attention)].items():
            if (found := part.keys_of(state, attention)) is not None:
                return found
        return None

    def sites_of(self, layer: int) -> Mapping[str, Acting] | None:
        """The parts that act at each site of a layer; None if none does."""
        return self._sites[layer] or None

    def precompute(self, attentions: Sequence[nn.Module]) -> AdapterState:
        """A copy without gradients, in the form that is best for many forward passes.

        Args:
            attentions: all attention layers of the decoder, in order.
        """
        parts = {}
        for part, tensors in self.parts.items():
            layers = max((tensor.shape[1] for tensor in tensors.values()), default=0)
            parts[part] = part.precompute(dict(tensors), attentions[-layers:]) if layers else dict(tensors)
        return AdapterState(self.num_layers, parts, self.decoder)

    def of_row(self, row: int) -> AdapterState:
        """The state of a single row, with R = 1."""
        return self._with(lambda tensor: tensor if len(tensor) == 1 else tensor[row : row + 1])

    def repeat(self, times: int) -> AdapterState:
        """Each row ``times`` times in succession, in the order of beam search."""
        return self._with(
            lambda tensor: tensor if len(tensor) == 1 else tensor.repeat_interleave(times, dim=0)
        )

    def _with(self, change: Callable[[Tensor], Tensor]) -> AdapterState:
        return AdapterState(
            self.num_layers,
            {part: {name: change(t) for name, t in tensors.items()} for part, tensors in self.parts.items()},
            self.decoder,
        )

    def check_packed(self) -> None:
        """Raise UsageError if rows of a packed sequence differ in a part that has to be the same."""
        for part, tensors in self.parts.items():
            sets = max(map(len, tensors.values()), default=1)
            if sets > 1 and not part.differs_in_packs:
                raise UsageError(f"{sets} sets of {part.kind} for a packed sequence; give one")


def merge_states(states: Sequence[AdapterState]) -> AdapterState:
    """Merge the states of several rows, R = 1 each, into that of one batch. If all rows have the same state,
    it is kept as it is.

    Raises:
        UsageError: a part that can't differ from row to row.
    """
    first = states[0]
    if all(state is first for state in states):
        return first
    if not share_a_decoder(states):
        kinds = sorted({kind for state in states if state.decoder is not None for kind in state.kinds})
        raise UsageError(
            f"an adapter of {' or '.join(kinds)} has a decoder of its own, so its rows cannot share a batch "
            "with others; ask for them separately"
        )
    present = dict.fromkeys(part for state in states for part in state.parts)
    kinds = list(PARTS)
    ordered = sorted(present, key=lambda part: kinds.index(part.kind) if part.kind in kinds else len(kinds))
    merged = {}
    for part in ordered:
        rows = [state.parts.get(part) for state in states]
        merged[part] = part.merge([None if row is None else dict(row) for row in rows])
    return AdapterState(first.num_layers, merged, first.decoder)


def share_a_decoder(states: Sequence[AdapterState]) -> bool:
    """Whether the same decoder computes all of these, so that they can be the rows of one batch."""
    return all(state.decoder is states[0].decoder for state in states)

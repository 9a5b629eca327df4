"""Selective fine-tuning: trains a share of the layers' weights, W_i = W0_i + d_i for chosen i, d = 0 at the
start.

They are chosen before the first step, by a score of each weight on a sample of the training rows:

    fisher      sum over rows of (dL/dW_i)^2, the FISH mask (Sung et al., arXiv 2111.09839, eq. 4)
    gradient    |sum over rows of dL/dW_i|

where L is the mean loss of a row. The weights with the highest scores in all layers together are trained; the
others are frozen. The choice is saved with the adapter.

Shapes: n chosen weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.common.processes import Processes
from llama_adapter.methods.own_weights import WeightsConfig, WeightsPart
from llama_adapter.methods.part import Inputs, Part, State
from llama_adapter.methods.shape import Layout
from llama_adapter.methods.sites import locate_layer_weights

SCORES = ("fisher", "gradient")
_MILLIONTH = 1e-6


@dataclass(frozen=True)
class SelectedConfig(WeightsConfig):
    """The settings of selective fine-tuning."""

    share: float = 0.01  # the share of the layers' weights that is trained
    score: str = "fisher"  # the score that chooses them: fisher or gradient
    sample_rows: int = 32  # how many training rows the score is computed on

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"share: {self.share} given; choose a number above 0, 1 at most")
        if self.score not in SCORES:
            raise UsageError(f"score: {self.score!r} given; choose {' or '.join(SCORES)}")
        if self.sample_rows < 1:
            raise UsageError(f"sample rows: {self.sample_rows} given; choose 1 or more")


class Selected(WeightsPart):
    """Single weights of the layers.

    Attributes:
        changes: (n,), zero at the start.
        places: (n,), the index of each chosen weight if all weights are laid end to end, in rising order; -1
            before the choice.
    """

    kind = "selected"
    Config = SelectedConfig
    size = "share"
    learning_rate = 3e-4
    config: SelectedConfig
    places: Tensor

    def __init__(
        self, config: SelectedConfig, layout: Layout, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, layout, generator)
        sizes = {name: math.prod(shape) for name, shape in config.weights.items()}
        total = sum(sizes.values())
        count = max(1, round(config.share * total))
        self.changes = nn.Parameter(torch.zeros(count))
        small = total < 2**31
        self.register_buffer("places", torch.full((count,), -1, dtype=torch.int32 if small else torch.int64))
        ends = torch.tensor(list(sizes.values()), device="cpu").cumsum(0).tolist() if sizes else []
        self._ranges = dict(zip(sizes, zip([0, *ends], ends, strict=False), strict=True))
        self._scores: dict[str, Tensor] | None = None  # only while weights are scored
        self._found: tuple[tuple[int, int], dict[str, tuple[slice, Tensor]]] | None = None
        self._unlike: set[str] = set()  # weights with values from an earlier choice that are to be reset

    @classmethod
    def adapts(cls, config: SelectedConfig, num_layers: int) -> int:
        return num_layers

    @classmethod
    def sized(cls, size: int) -> dict[str, float]:
        """A size is a millionth of the weights."""
        return {"share": round(size * _MILLIONTH, 6)}

    @classmethod
    def choose_weights(cls, config: SelectedConfig, decoder: PreTrainedModel) -> list[str]:
        return list(locate_layer_weights(decoder))

    def attach(self, decoder: PreTrainedModel) -> None:
        super().attach(decoder)
        end = max(last for _, last in self._ranges.values())
        rising = bool((self.places.diff() > 0).all()) and self.places[0] >= 0 and self.places[-1] < end
        if not rising and bool((self.places != -1).any()):
            raise UsageError(
                "selected: its file has positions that the base's weights do not have; copy the adapter again"
            )

    @property
    def chosen(self) -> bool:
        """Whether its weights have been chosen."""
        return bool(self.places[-1] >= 0)

    def add_state(self, states: dict[type[Part], State], inputs: Inputs) -> None:
        training = torch.is_grad_enabled() and self.changes.requires_grad
        if training and self._scores is None and not self.chosen:
            raise UsageError(
                "selected has not chosen its weights yet, which needs training rows; train it with "
                "llama_adapter.train or a training script"
            )
        super().add_state(states, inputs)

    # --- choosing -------------------------------------------------------------------------------------------

    def begin(self, rows: int, backward: Callable[[int], object], processes: Processes) -> None:
        """Score the weights on rows spread evenly over all, and choose those with the highest scores."""
        if self.chosen:
            return
        sampled = min(rows, self.config.sample_rows)
        sample = [number * rows // sampled for number in range(sampled)]
        device = self.changes.device
        self._scores = {
            name: torch.zeros(end - start, device=device) for name, (start, end) in self._ranges.items()
        }
        try:
            for number in sample[processes.index :: processes.count]:
                backward(number)
            scores = [processes.sum(score) for score in self._scores.values()]
        finally:
            self._scores = None
        self.choose(torch.cat(scores).abs_())

    @torch.no_grad()
    def choose(self, scores: Tensor) -> None:
        """Choose the n weights with the highest scores. Among equal scores the first are chosen.

        Args:
            scores: of all weights, laid end to end in the order of the config.
        """
        count = len(self.changes)
        threshold = numpy.partition(scores.cpu().numpy(), len(scores) - count)[len(scores) - count]
        above = (scores > float(threshold)).nonzero().flatten()
        equal = (scores == float(threshold)).nonzero().flatten()[: count - len(above)]
        self.places.copy_(torch.cat([above, equal]).sort().values)

    # --- computing ------------------------------------------------------------------------------------------

    def write(self, name: str, weight: Tensor, base: Tensor) -> None:
        own, places = self._of(name)
        if name in self._unlike:
            weight.copy_(base)
            self._unlike.remove(name)
        weight.put_(places, (base.take(places) + self.changes[own]).to(weight.dtype))

    def take_gradient(self, name: str, gradient: Tensor) -> None:
        if self._scores is not None:
            self._scores[name].add_(gradient.flatten() ** (2 if self.config.score == "fisher" else 1))
            return
        own, places = self._of(name)
        if self.changes.grad is None:
            self.changes.grad = torch.zeros_like(self.changes)
        self.changes.grad[own] += gradient.take(places).to(self.changes.dtype)

    def _of(self, name: str) -> tuple[slice, Tensor]:
        """The changes that belong to a weight, as a slice, and their indices in that weight."""
        version = (id(self.places), self.places._version)
        if self._found is None or self._found[0] != version:
            places, found = self.places.long(), {}
            for key, (start, end) in self._ranges.items():
                bounds = torch.tensor([start, end], device=places.device)
                first, last = torch.searchsorted(places, bounds).tolist()
                found[key] = (slice(first, last), places[first:last] - start)
            self._found = (version, found)
            self._unlike = set(found)
        return self._found[1][name]

"""AdaLoRA: gives ranks to the projections that need them (Zhang et al., arXiv 2303.10512).

A projection's product y = W x becomes

    y + s P diag(e) Q x                    s = alpha / the initial rank          (eq. 3)

A penalty on the loss keeps P and Q nearly orthogonal (eq. 4). It is the mean of the Frobenius norms |P^T P -
I| and |Q Q^T - I| over all matrices. The paper adds up their squares; its authors' code and PEFT use this
mean.

A triplet is one number of e with its column of P and its row of Q. Its importance follows from its numbers w
(eq. 7-11):

    I(w) = |w dL/dw|                       sensitivity of the loss to w, in one step
    J(w) = 0.85 J(w) + 0.15 I(w)           smoothed
    U(w) = 0.85 U(w) + 0.15 |I(w) - J(w)|  how far single steps are from that
    S    = J(e) U(e) + mean of J U over the row of Q + mean of J U over the column of P

The budget is the number of triplets of all projections together. Between two steps it falls from the initial
rank to the target, with the cube of the time that is left (eq. 12). Every few steps the least important
triplets beyond the budget get e = 0. They may grow again. At the second of the two steps the choice becomes
final.

Shapes: L adapted layers, R sets of a part's tensors, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.lora import Lora, add_low_rank
from llama_adapter.methods.part import Inputs, Part, PartConfig, State, by_site
from llama_adapter.methods.shape import Layout
from llama_adapter.methods.sites import SitePart, choose_projections, register_parameters
from llama_adapter.methods.terms import Term

SMOOTHING = 0.85  # beta 1 and beta 2 of the paper
_DRAWN = 0.02  # the standard deviation of new P and Q, as in the authors' code
_PARTS = ("right", "values", "left")  # Q, e, P


@dataclass(frozen=True)
class AdaLoraConfig(PartConfig):
    """The settings of AdaLoRA."""

    target_rank: int = 8  # mean rank of a projection after training
    init_rank: int = 12  # rank of each projection before training
    alpha: float = 16.0  # the product is scaled by alpha / init_rank
    targets: tuple[str, ...] = ()  # projections by name, such as q_proj,v_proj (default: all)
    prune_from: float = 0.1  # ranks are taken away after this share of the steps
    prune_until: float = 0.7  # ranks are final after this share of the steps
    prune_every: int = 10  # steps between two choices of ranks
    orthogonality: float = 0.1  # weight of the penalty on matrices that are not orthogonal

    def __post_init__(self) -> None:
        if not 1 <= self.target_rank <= self.init_rank:
            raise UsageError(
                f"target rank: {self.target_rank} given with a first rank of {self.init_rank}; choose 1 to "
                "that one"
            )
        if not self.alpha > 0:
            raise UsageError(f"alpha: {self.alpha} given; choose a number above 0")
        if not 0 <= self.prune_from < self.prune_until <= 1:
            raise UsageError(
                f"ranks are taken away from {self.prune_from} to {self.prune_until} of the steps; choose two "
                "shares between 0 and 1, the smaller one first"
            )
        if self.prune_every < 1:
            raise UsageError(f"prune every: {self.prune_every} steps given; choose 1 or more")
        if self.orthogonality < 0:
            raise UsageError(f"orthogonality: {self.orthogonality} given; choose a number, 0 or more")


class AdaLora(SitePart):
    """Three tensors for each projection.

    Attributes:
        NAME.right: Q, (L, r, in), and NAME.left: P, (L, out, r), drawn from N(0, 0.02^2).
        NAME.values: e, (L, r). It is zero at the start, so an untrained adapter leaves the decoder unchanged.
            It is also zero where a rank was taken away.
    """

    kind = "adalora"
    foldable = True
    Config = AdaLoraConfig
    size = "init_rank"
    config: AdaLoraConfig

    def __init__(
        self, config: AdaLoraConfig, layout: Layout, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, layout, generator)
        layers, rank = layout.adapted_layers, config.init_rank
        self.sites = choose_projections(layout.projections, config.targets)
        for name, (inside, outside) in self.sites.items():
            own = {
                "right": torch.empty(layers, rank, inside).normal_(std=_DRAWN, generator=generator),
                "values": torch.zeros(layers, rank),
                "left": torch.empty(layers, outside, rank).normal_(std=_DRAWN, generator=generator),
            }
            register_parameters(self, {f"{name}.{part}": value for part, value in own.items()})
        # J and U of the parameters by name; and for each site the final choice of triplets, (L, r). They are
        # not buffers, since they belong to a training and not to the adapter.
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}

    @classmethod
    def sized(cls, size: int) -> dict[str, Any]:
        """Keep the ratio of the default ranks: two of three remain in the end."""
        return {"init_rank": size, "target_rank": max(1, round(2 * size / 3))}

    def add_state(self, states: dict[type[Part], State], inputs: Inputs) -> None:
        state, scale = {}, self.config.alpha / self.config.init_rank
        for site in self.sites:
            right, values, left = self._tensors(site)
            state[f"{site}.down"] = right[None]
            state[f"{site}.up"] = (left * (values * scale)[:, None])[None]
        states[AdaLora] = state

    @staticmethod
    def act(own: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return add_low_rank(y, x, own["down"], own["up"])

    @staticmethod
    def terms(own: Mapping[str, Tensor]) -> Sequence[Term] | None:
        return Lora.terms(own)

    @staticmethod
    def fold(own: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return Lora.fold(own, weight, bias)

    @classmethod
    def precompute(cls, state: State, attentions: Sequence[nn.Module]) -> State:
        """Leave out the ranks of a projection that were taken away in all layers."""
        kept: State = {}
        for site, own in by_site(super().precompute(state, attentions)).items():
            down, up = own["down"], own["up"]
            there = up.any(dim=-2)
            count = max(1, int(there.sum(-1).max()))
            order = there.byte().argsort(dim=-1, descending=True, stable=True)[..., :count]
            kept[f"{site}.down"] = down.take_along_dim(order[..., None], dim=-2)
            kept[f"{site}.up"] = up.take_along_dim(order[..., None, :], dim=-1)
        return kept

    def _tensors(self, site: str) -> list[Tensor]:
        """Q, e and P of a site."""
        return [self.get_parameter(f"{site}.{part}") for part in _PARTS]

    # --- training -------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor | None:
        if not self.config.orthogonality:
            return None
        unit = torch.eye(self.config.init_rank, device=next(self.parameters()).device)
        norms = []
        for site in self.sites:
            right, _, left = self._tensors(site)
            for product in (right @ right.mT, left.mT @ left):
                norms.append(torch.linalg.matrix_norm(product - unit.to(product.dtype)))
        return self.config.orthogonality * torch.cat(norms).mean()

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Measure the importance of the triplets, and take away those beyond the budget.

        As in the authors' code, a step's gradients are multiplied with the parameters after that step.
        """
        first, last = round(self.config.prune_from * total), round(self.config.prune_until * total)
        if step < last or not (self._sensitivity or self._kept):
            self._measure()
        if step < last:
            if step > first and step % self.config.prune_every == 0:
                self._prune(self.budget(step, first, last))
        elif not self._kept:
            self._kept = self._prune(self.budget(last, first, last))
            self._sensitivity, self._uncertainty = {}, {}
        else:
            self._zero(self._kept)

    def budget(self, step: int, first: int, last: int) -> int:
        """The number of triplets of all projections after a step between ``first`` and ``last``."""
        matrices = len(self.sites) * self.layout.adapted_layers
        start, target = self.config.init_rank * matrices, self.config.target_rank * matrices
        left = 1 - (step - first) / max(1, last - first)
        return int((start - target) * max(0.0, left) ** 3 + target)

    def _measure(self) -> None:
        for name, parameter in self.named_parameters():
            assert parameter.grad is not None
            now = (parameter * parameter.grad).abs()
            before = self._sensitivity.get(name, torch.zeros_like(now))
            self._sensitivity[name] = smoothed = SMOOTHING * before + (1 - SMOOTHING) * now
            before = self._uncertainty.get(name, torch.zeros_like(now))
            self._uncertainty[name] = SMOOTHING * before + (1 - SMOOTHING) * (now - smoothed).abs()

    def _prune(self, budget: int) -> dict[str, Tensor]:
        """Set e of the least important triplets to zero. Returns which are kept, (L, r) for each site."""
        scores = {site: self._importance(site) for site in self.sites}
        every = torch.cat([score.flatten() for score in scores.values()])
        if (less := len(every) - budget) <= 0:
            return {site: torch.ones_like(score, dtype=torch.bool) for site, score in scores.items()}
        threshold = every.kthvalue(less).values
        kept = {site: score > threshold for site, score in scores.items()}
        self._zero(kept)
        return kept

    def _importance(self, site: str) -> Tensor:
        """S of a site's triplets, (L, r)."""
        names = [f"{site}.{part}" for part in _PARTS]
        right, values, left = (self._sensitivity[name] * self._uncertainty[name] for name in names)
        return values + right.mean(2) + left.mean(1)

    def _zero(self, kept: Mapping[str, Tensor]) -> None:
        for site, there in kept.items():
            self.get_parameter(f"{site}.values").masked_fill_(~there, 0)

    def training_state(self) -> dict[str, Tensor]:
        groups = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty, "kept": self._kept}
        return {f"{group}/{name}": value for group, own in groups.items() for name, value in own.items()}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        groups = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty, "kept": self._kept}
        device = next(self.parameters()).device
        for key, value in state.items():
            group, name = key.split("/", 1)
            groups[group][name] = value.to(device)

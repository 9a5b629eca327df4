"""How to train: epochs, learning rates, batches, and when to validate and save."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from llama_adapter.common.errors import UsageError
from llama_adapter.training.schedule import warmup_cosine

MEANS = ("tokens", "rows")


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. The defaults are the paper's (section 4.1 and the authors' script).

    The paper chose them for larger initial prompts than those of `LlamaAdapter.new_adapter`. The scripts make
    their options from these fields and their "help".
    """

    epochs: int = field(default=5, metadata={"help": "passes over the rows"})
    warmup_epochs: float = field(default=2.0, metadata={"help": "passes in which the learning rate rises"})
    batch_size: int = field(
        default=64, metadata={"help": "rows an optimiser step, of all processes together"}
    )
    base_learning_rate: float = field(default=9e-3, metadata={"help": "the peak is this * batch size / 256"})
    learning_rate: float | None = field(
        default=None, metadata={"help": "the peak itself, in place of that rule"}
    )
    rates: Mapping[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "a peak of its own for a group of parameters: prompts, gates, projection, scales ...; "
            "can be given several times (default: --learning-rate for all)"
        },
    )
    weight_decay: float = field(default=0.02, metadata={"help": "AdamW's"})
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "scale gradients down to this norm (default: leave them)"}
    )
    max_steps: int | None = field(
        default=None, metadata={"help": "end the run, and its schedule, after so many steps"}
    )
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "end the run, and its schedule, after so many minutes, if its steps would take longer"
        },
    )
    validate_every: int | None = field(
        default=None,
        metadata={
            "help": "steps between validations; the best adapter is kept (default: ten validations, at least "
            "one an epoch)"
        },
    )
    checkpoint_every: int = field(default=50, metadata={"help": "steps between checkpoints"})
    max_tokens: int = field(
        default=1024,
        metadata={
            "help": "tokens through the decoder at once, in each process; a larger batch is accumulated, "
            "with equal gradients"
        },
    )
    mean_over: str = field(
        default="tokens",
        metadata={
            "help": "tokens: a long answer weighs more than a short one; rows: all alike, which makes "
            "answers shorter"
        },
    )
    seed: int = field(default=0, metadata={"help": "of the order of the rows and of what starts at random"})

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_steps", "validate_every", "checkpoint_every", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; expected 1 or more")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise UsageError(
                f"--warmup-epochs is {self.warmup_epochs}; expected 0 to {self.epochs}, the epochs"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"--weight-decay is {self.weight_decay}; expected a number, 0 or more")
        if self.mean_over not in MEANS:
            raise UsageError(f"--mean-over is {self.mean_over!r}; expected {' or '.join(MEANS)}")
        numbers = ("base_learning_rate", "learning_rate", "max_grad_norm", "max_minutes")
        named = {name.replace("_", "-"): getattr(self, name) for name in numbers}
        named |= {f"rate {group}": rate for group, rate in self.rates.items()}
        for name, value in named.items():
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"--{name} is {value}; expected a number above 0")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed is {self.seed}; expected 0 to 2**32 - 1")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.learning_rate or self.base_learning_rate * self.batch_size / 256

    def total_steps(self, rows: int) -> int:
        """The number of optimiser steps of the whole run on this many rows."""
        steps = math.ceil(rows / self.batch_size) * self.epochs
        return min(steps, self.max_steps or steps)

    def schedule(self, step: float, total: int) -> float:
        """A share of the peak rates: a linear warm-up, then half a cosine to zero. ``step`` counts from 0."""
        return warmup_cosine(step, total, total * self.warmup_epochs / self.epochs)

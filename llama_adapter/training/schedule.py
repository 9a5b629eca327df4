"""The schedule of the learning rate: a linear warm-up, then half a cosine."""

from __future__ import annotations

import math


def warmup_cosine(step: float, total: int, warmup: float) -> float:
    """The learning rate of a step as a share of its peak: a linear warm-up, then half a cosine to zero.

    Args:
        step: counted from 0; it need not be a whole number.
        total: steps of the whole run.
        warmup: steps of the warm-up; it need not be a whole number.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))

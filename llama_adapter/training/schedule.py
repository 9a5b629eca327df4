"""How the learning rate goes: up in a line, then down by half a cosine."""

from __future__ import annotations

import math


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """The share of the peak learning rate in a step: a linear warm-up, then half a cosine to zero.

    Args:
        step: counts from 0.
        total: steps of the whole run.
        warmup: steps of the warm-up; a fraction of a step counts.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))

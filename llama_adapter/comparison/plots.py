"""Plots of a comparison, as PNG and SVG: loss against cost with the Pareto front, and loss curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llama_adapter.common.files import write_atomically
from llama_adapter.comparison.results import COSTS, front, mean_of

LABELS = dict(
    zip(COSTS, ("trainable parameters", "peak memory, MB", "forgetting, nats a token"), strict=True)
)


def draw_fronts(results: Mapping[str, Any], folder: Path) -> None:
    """Draw loss-vs-cost.png and .svg, with a panel for each cost."""
    figure = Figure(figsize=(5 * len(COSTS), 4.5), layout="constrained")
    for axes, cost in zip(figure.subplots(1, len(COSTS)), COSTS, strict=True):
        _front(axes, results, cost)
    _save(figure, folder / "loss-vs-cost")


def _front(axes: Axes, results: Mapping[str, Any], cost: str) -> None:
    best = results["best"]
    measured = {method: mean_of(results["runs"], method, cost) for method in best}
    points = {
        method: (value, best[method]["validation_loss_mean"])
        for method, value in measured.items()
        if value is not None
    }
    for method, (value, loss) in points.items():
        spread = [
            [max(0.0, loss - best[method]["validation_loss_low"])],
            [max(0.0, best[method]["validation_loss_high"] - loss)],
        ]
        axes.errorbar([value], [loss], yerr=spread, fmt="o", capsize=3)
        axes.annotate(method, (value, loss), xytext=(5, 5), textcoords="offset points", fontsize=8)
    line = [points[method] for method in front(points)]
    axes.plot(*zip(*line, strict=True), "--", color="grey", linewidth=1, label="Pareto front")
    values = [value for value, _ in points.values()]
    if cost == "parameters" and max(values) > 10 * min(values):
        axes.set_xscale("log")
    axes.margins(0.15)  # leaves room for the names
    axes.set_xlabel(LABELS[cost])
    axes.set_ylabel("validation loss, nats a token")
    axes.legend(fontsize=8)


def draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]], folder: Path) -> None:
    """Draw curves.png and .svg: the validation loss of each method at its best rate, over the steps.

    Args:
        curves: by method, its (step, loss) in order.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=method)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats a token")
    axes.legend(fontsize=8)
    _save(figure, folder / "curves")


def _save(figure: Figure, path: Path) -> None:
    for form in ("png", "svg"):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=form, dpi=120)
        with write_atomically(path.with_suffix(f".{form}")) as temporary:
            temporary.write_bytes(drawn.getvalue())

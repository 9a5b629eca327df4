"""Summarises a comparison: each method's best rate, its interval over seeds, and the Pareto front."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
COSTS = ("parameters", "peak_mb", "forgetting")  # compared with the loss; less is better

_HOW_TO_READ = (
    "Loss: nats a response token on the rows kept back, at the best validation of a run; the mean over seeds "
    "with its 95 % interval by Student's t. Rate: the best of the sweep with the first seed, chosen on the "
    "same rows. Forgetting: how much the loss, in nats a token, of the base's own greedy answers rises, to "
    "questions that no row asks. Token time: the time to decode a token, divided by the bare base's. Front: "
    "no other method is at least as good in loss, parameters, peak memory and forgetting, and better in one."
)

Result = Mapping[str, Any]  # one of "runs" in results.json


def rate_grid(rate: float, count: int) -> list[float]:
    """``count`` learning rates around ``rate``, each sqrt(10) times the last, rounded to three digits."""
    exponents = [(place - (count - 1) / 2) / 2 for place in range(count)]
    return [float(f"{rate * 10**exponent:.3g}") for exponent in exponents]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean by Student's t. For a single value, that value twice."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, mean
    freedom = len(values) - 1
    quantile = _T[freedom - 1] if freedom <= len(_T) else NormalDist().inv_cdf(0.975)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def done(runs: Sequence[Result], method: str) -> list[Result]:
    """The runs of a method that gave a loss."""
    return [own for own in runs if own["method"] == method and own["status"] == "done"]


def best_rate(runs: Sequence[Result], method: str, *, seed: int = 0) -> float | None:
    """The rate with the lowest validation loss with the first seed. None if no run is done."""
    swept = [own for own in done(runs, method) if own["seed"] == seed]
    return min(swept, key=lambda own: own["validation_loss"])["rate"] if swept else None


def summarise(runs: Sequence[Result], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The entry ``best`` of results.json: each method at its best rate, over its seeds."""
    best: dict[str, dict[str, Any]] = {}
    for method in methods:
        rate = best_rate(runs, method)
        if rate is None:
            continue
        losses = [own["validation_loss"] for own in at_best(runs, method)]
        low, high = interval(losses)
        best[method] = {
            "rate": rate,
            "seeds": len(losses),
            "validation_loss_mean": statistics.fmean(losses),
            "validation_loss_low": low,
            "validation_loss_high": high,
        }
    places = {method: (own["validation_loss_mean"], *costs(runs, method)) for method, own in best.items()}
    for method, own in best.items():
        own["on_front"] = not any(_beats(places[other], places[method]) for other in best if other != method)
    return best


def at_best(runs: Sequence[Result], method: str) -> list[Result]:
    """The runs of a method at its best rate, with all seeds."""
    rate = best_rate(runs, method)
    return [own for own in done(runs, method) if own["rate"] == rate]


def mean_of(runs: Sequence[Result], method: str, name: str) -> float | None:
    """The mean of a figure over the seeds at the best rate. None if it was not measured."""
    values = [own[name] for own in at_best(runs, method) if own[name] is not None]
    return statistics.fmean(values) if values else None


def costs(runs: Sequence[Result], method: str) -> tuple[float | None, ...]:
    """The costs of a method, in the order of `COSTS`."""
    return tuple(mean_of(runs, method, name) for name in COSTS)


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of the points (cost, loss) that no other point beats, by rising cost."""
    names = [
        name
        for name, point in points.items()
        if not any(_beats(other, point) for key, other in points.items() if key != name)
    ]
    return sorted(names, key=lambda name: points[name])


def _beats(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    """Whether one is nowhere worse and somewhere better. Figures that were not measured are ignored."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


# --- the table ----------------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any], *, about: str) -> str:
    """The comparison as a Markdown page: a table by rising loss, the failed runs, and how to read it."""
    runs, best = results["runs"], results["best"]
    head = [
        *("method", "rate", "seeds", "validation loss", "95 % interval", "task score", "forgetting"),
        *("parameters", "file, MB", "rows/s", "peak, MB", "token time", "front"),
    ]
    lines = [about, "", _row(head), _row(["---"] * len(head))]
    for method in sorted(best, key=lambda name: best[name]["validation_loss_mean"]):
        own = best[method]
        low, high, several = own["validation_loss_low"], own["validation_loss_high"], own["seeds"] > 1
        lines.append(
            _row(
                [
                    method,
                    f"{own['rate']:g}",
                    str(own["seeds"]),
                    f"{own['validation_loss_mean']:.4f}",
                    f"{low:.4f} to {high:.4f}" if several else "one seed",
                    _number(mean_of(runs, method, "task_score"), ".1%"),
                    _number(mean_of(runs, method, "forgetting"), "+.4f"),
                    _number(mean_of(runs, method, "parameters"), ",.0f"),
                    _number(mean_of(runs, method, "bytes"), ",.2f", 1e-6),
                    _number(mean_of(runs, method, "rows_per_second"), ".2f"),
                    _number(mean_of(runs, method, "peak_mb"), ",.0f"),
                    _number(mean_of(runs, method, "decode_vs_base"), ".3f"),
                    "yes" if own["on_front"] else "",
                ]
            )
        )
    tasks = dict.fromkeys(own["task"] for own in runs if own["status"] == "done" and own["task"])
    lines += [
        "",
        _HOW_TO_READ + (f" Task score: {', '.join(tasks)}." if tasks else ""),
    ]
    failed = [own for own in runs if own["status"] == "failed"]
    lines += [""] * bool(failed)
    lines += [
        f"- {own['method']}, rate {own['rate']:g}, seed {own['seed']} failed: {own['error']}"
        for own in failed
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "" if value is None else format(value * factor, form)

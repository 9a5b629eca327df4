"""The best rate, the interval over seeds and the Pareto front of a comparison."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from llama_adapter.comparison.results import front, interval, markdown, rate_grid, summarise


def run(method: str, rate: float, seed: int, loss: float | None, **costs: Any) -> dict[str, Any]:
    own = {"task": None, "task_score": None, "bytes": 10, "rows_per_second": 1.0, "decode_vs_base": 1.0}
    own |= {"parameters": 100, "peak_mb": 5.0, "forgetting": 0.1, **costs}
    status = {"status": "failed", "error": "no"} if loss is None else {"status": "done", "error": None}
    return {"method": method, "rate": rate, "seed": seed, "validation_loss": loss, **status, **own}


def test_rates_lie_around_the_usual_one() -> None:
    assert rate_grid(0.01, 1) == [0.01]
    assert rate_grid(0.01, 3) == [0.00316, 0.01, 0.0316]
    assert rate_grid(0.01, 2) == [0.00562, 0.0178]


@pytest.mark.parametrize("count", [2, 3, 11, 31])
def test_the_interval_is_students(count: int) -> None:
    values = [1 + 0.1 * (number % 5) + 0.01 * number for number in range(count)]
    low, high = interval(values)
    mean, freedom = statistics.fmean(values), count - 1
    quantile = (high - mean) / (statistics.stdev(values) / math.sqrt(count))
    assert mean - low == pytest.approx(high - mean)
    # 95 % of Student's density lies within the interval: Simpson's rule from 0 to the quantile, doubled.
    scale = math.exp(math.lgamma(count / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = [scale * (1 + (quantile * n / 2000) ** 2 / freedom) ** (-count / 2) for n in range(2001)]
    area = density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2])
    assert 2 * area * quantile / 6000 == pytest.approx(0.95, abs=1e-4)


def test_one_seed_has_no_interval() -> None:
    assert interval([1.5]) == (1.5, 1.5)


def test_the_best_rate_is_that_of_the_first_seed_and_its_seeds_are_averaged() -> None:
    runs = [run("a", 0.1, 0, 2.0), run("a", 1.0, 0, 1.0), run("a", 10.0, 0, None), run("b", 0.1, 0, None)]
    runs += [run("a", 1.0, 1, 2.0), run("a", 1.0, 2, None)]
    best = summarise(runs, ["a", "b"])
    assert list(best) == ["a"], "a method without a result has no best"
    assert (best["a"]["rate"], best["a"]["seeds"], best["a"]["validation_loss_mean"]) == (1.0, 2, 1.5)
    assert best["a"]["validation_loss_low"] < 1.5 < best["a"]["validation_loss_high"]


@pytest.mark.parametrize(
    ("costs", "on_front"),
    [
        ({}, False),
        ({"parameters": 99}, True),
        ({"peak_mb": 4.0}, True),
        ({"forgetting": 0.0}, True),
        ({"parameters": 101}, False),
    ],
)
def test_a_worse_method_is_on_the_front_only_by_a_lower_cost(costs: dict[str, Any], on_front: bool) -> None:
    best = summarise([run("a", 0.1, 0, 1.0), run("b", 0.1, 0, 2.0, **costs)], ["a", "b"])
    assert best["a"]["on_front"] and best["b"]["on_front"] == on_front


def test_the_front_of_points_rises_in_cost() -> None:
    assert front({"a": (3, 1), "b": (1, 3), "c": (2, 3), "d": (2, 2)}) == ["b", "d", "a"]


def test_the_table_has_every_method_by_loss_and_what_failed() -> None:
    runs = [run("a", 0.1, 0, 2.0), run("b", 0.1, 0, 1.0, forgetting=None), run("c", 0.1, 0, None)]
    text = markdown({"runs": runs, "best": summarise(runs, ["a", "b", "c"])}, about="About.")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split()[1] for row in rows] == ["method", "---", "b", "a"]
    assert len({row.count("|") for row in rows}) == 1
    assert "- c, rate 0.1, seed 0 failed: no" in text

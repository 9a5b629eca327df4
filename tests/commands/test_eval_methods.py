"""eval.methods from the command line, on a tiny base."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.commands.eval_methods import main
from llama_adapter.common.errors import UsageError
from tests.conftest import CHECKOUT
from tests.science import build_problems, write_official
from tests.tiny_models import build_tiny_base, build_tiny_tower_folder

DATA = CHECKOUT / "examples" / "instructions.jsonl"
FIELDS = {
    *("method", "seed", "rate", "status", "error", "validation_loss", "task", "task_score", "forgetting"),
    *("parameters", "bytes", "rows_per_second", "peak_mb", "decode_vs_base"),
}
BEST = {"rate", "seeds", "validation_loss_mean", "validation_loss_low", "validation_loss_high", "on_front"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    build_tiny_base(folder / "tiny")
    build_tiny_tower_folder(folder / "clip-mini")
    return folder


def options(weights: Path, output: Path, *more: str, **changed: object) -> list[str]:
    given: dict[str, object] = {"data": DATA, "output": output, "base": "tiny", "weights": weights}
    given |= {"methods": "prompts,lora", "seeds": 1, "rates": 1, "rows": 8, "validation-rows": 4}
    given |= {"batch-size": 4, "max-length": 512, "device": "cpu", **changed}
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)] + list(more)


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def test_two_methods_rates_and_seeds(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(options(weights, tmp_path / "out", seeds=2, rates=2, parameters=3000))
    found = results(tmp_path / "out")
    assert set(found) == {"base", "rows", "validation_rows", "runs", "best"}
    assert (found["base"], found["rows"], found["validation_rows"]) == ("tiny", 8, 4)
    assert all(set(run) == FIELDS for run in found["runs"])
    made = [(run["method"], run["rate"], run["seed"]) for run in found["runs"]]
    assert made[:4] == [
        ("prompts", 0.00562, 0),
        ("prompts", 0.0178, 0),
        ("lora", 0.000562, 0),
        ("lora", 0.00178, 0),
    ]
    for method in ("prompts", "lora"):
        own = found["best"][method]
        assert set(own) == BEST and own["seeds"] == 2
        swept = [run for run in found["runs"] if run["method"] == method and run["seed"] == 0]
        assert own["rate"] == min(swept, key=lambda run: run["validation_loss"])["rate"]
        assert (method, own["rate"], 1) in made[4:]
    assert len(made) == 6
    for run in found["runs"]:
        assert (run["status"], run["error"], run["task"], run["task_score"]) == ("done", None, None, None)
        assert abs(run["parameters"] - 3000) < 500 and run["bytes"] > 4 * run["parameters"]
        assert min(run["rows_per_second"], run["peak_mb"], run["decode_vs_base"]) > 0
        assert run["forgetting"] != 0
    for name in ("README.md", "loss-vs-cost.png", "loss-vs-cost.svg", "curves.png", "curves.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    printed = capsys.readouterr()
    assert "lora: rank 2" in printed.err and "run 6/6" in printed.err and "left for all" in printed.err
    assert printed.out.startswith("8 rows of instructions.jsonl, 4 kept back, on tiny")

    # The rows come in the same order whatever the method.
    first = [json.loads(line)["tokens"] for line in _metrics(tmp_path / "out", "prompts", 0.00562)]
    assert first == [json.loads(line)["tokens"] for line in _metrics(tmp_path / "out", "lora", 0.000562)]


def _metrics(output: Path, method: str, rate: float) -> list[str]:
    lines = (output / method / f"rate-{rate:g}-seed-0" / "adapter" / "metrics.jsonl").read_text()
    return [line for line in lines.splitlines() if "tokens" in line]


def test_it_goes_on_where_it_was_killed(weights: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = ("--checkpoint-every", "1", "--epochs", "8")
    main(options(weights, whole, *more))
    command = [sys.executable, "-m", "eval.methods", *options(weights, cut, *more)]
    victim = subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    second = cut / "lora" / "rate-0.001-seed-0" / "adapter" / "metrics.jsonl"
    for _ in range(12000):
        if victim.poll() is not None or (second.exists() and second.stat().st_size):
            break
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    first = cut / "prompts" / "rate-0.01-seed-0" / "result.json"
    before = first.stat().st_mtime_ns
    assert len(results(cut)["runs"]) == 1
    main(options(weights, cut, *more))
    assert first.stat().st_mtime_ns == before, "a run that has a result is not repeated"
    losses = [[run["validation_loss"] for run in results(folder)["runs"]] for folder in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    with pytest.raises(UsageError, match="holds a comparison with rows = 8, now it is 9"):
        main(options(weights, cut, *more, rows=9))


def test_a_method_that_fails_leaves_the_others(weights: Path, tmp_path: Path) -> None:
    """LoRA alone cannot see; pictures are scored by exact match."""
    pictures = CHECKOUT / "examples" / "shapes"
    changed = {"data": pictures, "methods": "lora,prompts", "cache": tmp_path / "cache"}
    main(options(weights, tmp_path / "out", **changed))
    lora, prompts = results(tmp_path / "out")["runs"]
    assert lora["status"] == "failed" and "pictures come in with the prompts" in lora["error"]
    assert set(lora) == FIELDS and lora["validation_loss"] is None
    assert prompts["status"] == "done" and prompts["task"] == "exact match"
    assert 0 <= prompts["task_score"] <= 1
    assert list(results(tmp_path / "out")["best"]) == ["prompts"]
    assert "lora, rate 0.001, seed 0 failed" in (tmp_path / "out" / "README.md").read_text()


def test_scienceqa_is_scored_by_its_letters(weights: Path, tmp_path: Path) -> None:
    data = write_official(tmp_path / "data", build_problems(tmp_path, rows=16))
    main(options(weights, tmp_path / "out", data=data, methods="prompts", cache=tmp_path / "cache"))
    (run,) = results(tmp_path / "out")["runs"]
    assert set(run) == FIELDS and (run["status"], run["task"]) == ("done", "ScienceQA accuracy")
    assert run["task_score"] in (0.0, 0.25, 0.5, 0.75, 1.0), "four problems are kept back"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"methods": "prompts,magic"}, "there is no 'magic'"),
        ({"methods": "lora,lora"}, "expected different ones"),
        ({"base": "./nowhere"}, "nowhere"),
        ({"data": "nowhere.json"}, "nowhere.json: no such file"),
        ({"epochs": 0}, "epochs is 0"),
        ({"seeds": 0}, "--seeds"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(
    weights: Path, tmp_path: Path, changed: dict[str, object], told: str
) -> None:
    with pytest.raises(UsageError, match=told) as error:
        main(options(weights, tmp_path / "out", **changed))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()

"""The files of a comparison: its results, the folder of each run, the loss curve of a training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_adapter.common.errors import UsageError
from llama_adapter.comparison.results import at_best

RESULTS_FILE = "results.json"
RUN_FOLDER = "adapter"  # in a run's folder, the folder of its training
METRICS_FILE = "metrics.jsonl"


def run_folder(output: Path, method: str, rate: float, seed: int) -> Path:
    """The folder of one run of a comparison in ``output``."""
    return output / method / f"rate-{rate:g}-seed-{seed}"


def read_results(output: Path) -> dict[str, Any]:
    """Read the results of a comparison.

    Raises:
        UsageError: the folder has none, or they can't be read.
    """
    path = output / RESULTS_FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not found["best"]:
            raise UsageError(f"{path} has no run that is done; let eval.methods go on")
        str(found["base"]), list(found["runs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); give a folder that eval.methods wrote") from None
    return found


def best_runs(output: Path, results: Mapping[str, Any]) -> dict[str, Path]:
    """For each method, the folder of its training with the lowest loss among the seeds at its best rate."""
    found = {}
    for method in results["best"]:
        best = min(at_best(results["runs"], method), key=lambda run: float(run["validation_loss"]))
        found[method] = run_folder(output, method, best["rate"], best["seed"]) / RUN_FOLDER
    return found


def validation_curve(training: Path) -> list[tuple[int, float]]:
    """(step, validation loss) of a training, in order."""
    lines = (training / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    measured = [json.loads(line) for line in lines]
    return [(own["step"], own["validation_loss"]) for own in measured if "validation_loss" in own]

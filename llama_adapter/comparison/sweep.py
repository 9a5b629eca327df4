"""The runs of a comparison in order: first a sweep of learning rates for each method, then more seeds.

The folder of a comparison:

comparison.json     what all runs have in common; a later call must ask for the same
results.json        all runs and the best of each method, rewritten after each run
README.md           the same as a table; loss-vs-cost and curves (.png, .svg) are its plots
base-answers.json   the answers that forgetting is measured on
METHOD/rate-R-seed-S/   a run: result.json, log.txt, and adapter/, the folder of its training
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import write_atomically, write_json
from llama_adapter.common.progress import ProgressLine, clock
from llama_adapter.comparison import plots
from llama_adapter.comparison.folder import RESULTS_FILE, RUN_FOLDER, best_runs, run_folder, validation_curve
from llama_adapter.comparison.own_answers import kept_apart
from llama_adapter.comparison.results import best_rate, markdown, rate_grid, summarise
from llama_adapter.comparison.running import (
    LOG_FILE,
    MEASURED,
    RESULT_FILE,
    STOPPED,
    Run,
    Setting,
    Task,
    carry_out,
    prepare,
    read_task,
    start,
)
from llama_adapter.methods.table import parts_of_method
from llama_adapter.weights import locations

POLL_SECONDS = 0.5


@dataclass
class Comparison:
    """A comparison of methods on the same rows, in one folder.

    Attributes:
        seeds: how many seeds each method gets at its best rate. The sweep counts as the first.
        rates: how many learning rates are tried for each method, around its usual one.
        parameters: about how many parameters each method should have. None keeps the methods' usual sizes.
    """

    setting: Setting
    methods: Sequence[str]
    seeds: int
    rates: int
    parameters: int | None
    output: Path
    line: ProgressLine = field(default_factory=ProgressLine)

    def run(self) -> dict[str, Any]:
        """Carry out all runs that have no result yet or have failed. Returns the content of results.json.

        Raises:
            UsageError: another comparison is in the folder, or the base or the data can't be read.
            KeyboardInterrupt: after Ctrl-C. The same call continues from there.
        """
        for method in self.methods:
            parts_of_method(method)  # finds a mistyped name before the long work starts
        plan = self.setting.plan
        locations.resolve(str(plan.base), kind="base", weights=plan.weights)
        task = read_task(self.setting)
        self._claim(task)
        sizes = self._sizes(task)
        results: dict[str, Any] = {
            "base": str(self.setting.plan.base),
            "rows": sum(len(source.train) for source in task.sources),
            "validation_rows": sum(len(source.validation) for source in task.sources),
            "runs": [],
            "best": {},
        }
        total = len(self.methods) * (self.rates + self.seeds - 1)
        steps = self.setting.training.total_steps(results["rows"])
        runs: list[dict[str, Any]] = results["runs"]
        spent: list[float] = []  # seconds of each run of this call
        for run in self._runs(runs, sizes):
            if (found := _result(run)) is None:
                started = time.monotonic()
                found = self._carry_out(run, f"{len(runs) + 1}/{total}", steps, total - len(runs), spent)
                spent.append(time.monotonic() - started)
            runs.append(found)
            results["best"] = summarise(runs, self.methods)
            self._write(results)
        for method in self.methods:
            rate, grid = best_rate(runs, method), self._grid(method)
            if rate is not None and len(grid) > 1 and rate in (grid[0], grid[-1]):
                self.line.say(
                    f"{method}: the best rate, {rate:g}, is at the end of the sweep; try more --rates"
                )
        if not results["best"]:
            raise UsageError(f"no run gave a result; {runs[0]['method']}: {runs[0]['error']}")
        return results

    def _runs(self, runs: Sequence[dict[str, Any]], sizes: dict[str, dict[str, Any]]) -> Iterator[Run]:
        """All runs in order. ``runs`` are the results so far; later runs take their rate from them."""
        for method in self.methods:
            for rate in self._grid(method):
                yield self._run(method, rate, 0, sizes)
        for seed in range(1, self.seeds):
            for method in self.methods:
                if (best := best_rate(runs, method)) is not None:
                    yield self._run(method, best, seed, sizes)

    def _run(self, method: str, rate: float, seed: int, sizes: dict[str, dict[str, Any]]) -> Run:
        return Run(method, rate, seed, sizes[method], run_folder(self.output, method, rate, seed))

    def _grid(self, method: str) -> list[float]:
        return rate_grid(parts_of_method(method)[0].learning_rate, self.rates)

    def _claim(self, task: Task) -> None:
        """Write down what all runs have in common, or check it against what an earlier call wrote."""
        setting, record = self.setting, self.output / "comparison.json"
        shared = {
            "data": [dict(source.facts) for source in task.sources],
            "base": setting.plan.base,
            "rows": setting.rows,
            "validation_rows": setting.validation_rows,
            "max_length": setting.max_length,
            "parameters": self.parameters,
            "template": setting.plan.template,
            "dtype": setting.plan.dtype,
            "quantize": setting.plan.quantize,
            "settings": dataclasses.asdict(setting.training),
        }
        shared = json.loads(json.dumps(shared))  # in the form in which it will be read back
        if not record.exists():
            self.output.mkdir(parents=True, exist_ok=True)
            write_json(record, shared)
            return
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = next((name for name in shared if shared[name] != before.get(name)), None)
        if changed is not None:
            raise UsageError(
                f"{self.output} holds a comparison with {changed} = {before.get(changed)!r:.80}, now it is "
                f"{shared[changed]!r:.80}; ask for the same, or choose another --output"
            )

    def _sizes(self, task: Task) -> dict[str, dict[str, int]]:
        rows = [record for source in task.sources for record in (*source.train, *source.validation)]
        result = self.output / "prepared" / RESULT_FILE
        result.unlink(missing_ok=True)
        process = start(
            *(prepare, self.setting, kept_apart(rows), self.methods, self.parameters),
            result=result,
            log=self.output / "prepared" / LOG_FILE,
        )
        while process.is_alive():
            self.line.show("the base answers the questions that forgetting is measured on")
            process.join(POLL_SECONDS)
        found = _outcome(process.exitcode, result)
        if found["error"] is not None:
            raise UsageError(found["error"])
        sizes: dict[str, dict[str, Any]] = found["value"]
        for method, own in sizes.items():
            if self.parameters is not None:
                chosen = ", ".join(f"{name} {size}" for name, size in own.items()) or "has one size only"
                self.line.say(f"{method}: {chosen}")
        return sizes

    def _carry_out(
        self, run: Run, number: str, steps: int, runs_left: int, spent: Sequence[float]
    ) -> dict[str, Any]:
        """Carry out a run and return its entry of results.json. Shows a progress line on standard error."""
        result = run.folder / RESULT_FILE
        result.unlink(missing_ok=True)
        process = start(carry_out, self.setting, run, result=result, log=run.folder / LOG_FILE)
        started = time.monotonic()
        try:
            while process.is_alive():
                seconds = time.monotonic() - started
                step = _last_step(run.folder / RUN_FOLDER / "metrics.jsonl")
                whole = sum(spent) / len(spent) if spent else seconds * steps / step if step else 0.0
                left = clock(max(0.0, whole * runs_left - seconds)) if whole else "?"
                self.line.show(f"run {number}  {run}  step {step}/{steps}  {left} left for all")
                process.join(POLL_SECONDS)
        except KeyboardInterrupt:
            process.join()  # it got the same signal, and saves a checkpoint
            raise
        found = _outcome(process.exitcode, result)
        measured = found["value"] or dict.fromkeys(MEASURED)
        own = {
            "method": run.method,
            "seed": run.seed,
            "rate": run.rate,
            "status": "done" if found["error"] is None else "failed",
            "error": found["error"],
            **measured,
        }
        if own["status"] == "done" and own["validation_loss"] is None:
            own |= {"status": "failed", "error": "the validation loss was never finite"}
        write_json(result, own)
        told = (
            f"validation loss {own['validation_loss']:.4f}"
            if own["status"] == "done"
            else f"failed: {own['error']}"
        )
        seconds = time.monotonic() - started
        whole = (sum(spent) + seconds) / (len(spent) + 1)
        self.line.say(
            f"run {number}  {run}: {told}  in {clock(seconds)}, {clock(whole * (runs_left - 1))} left for all"
        )
        return own

    def _write(self, results: dict[str, Any]) -> None:
        """Write results.json, the table and the plots, each atomically."""
        setting = self.setting
        epochs = setting.training.epochs
        write_json(self.output / RESULTS_FILE, results)
        about = (
            f"{results['rows']:,} rows of {', '.join(Path(data).name for data in setting.data)}, "
            f"{results['validation_rows']:,} kept back, on {results['base']}; "
            f"{epochs} epoch{'s' if epochs > 1 else ''} in batches of {setting.training.batch_size}, "
            f"at most {setting.max_length} tokens a row."
        )
        with write_atomically(self.output / "README.md") as temporary:
            temporary.write_text(markdown(results, about=about), encoding="utf-8")
        if results["best"]:
            plots.draw_fronts(results, self.output)
            plots.draw_curves(
                {method: validation_curve(run) for method, run in best_runs(self.output, results).items()},
                self.output,
            )


def _result(run: Run) -> dict[str, Any] | None:
    """The entry of a run that is done, else None."""
    path = run.folder / RESULT_FILE
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found.get("status") == "done" else None


def _outcome(code: int | None, result: Path) -> dict[str, Any]:
    """The "value" and "error" that a process wrote. If it wrote nothing, how it ended is the error."""
    if code == STOPPED:
        raise KeyboardInterrupt
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return {
        "value": None,
        "error": f"its process ended with {how}; perhaps memory was short (see {result.parent / LOG_FILE})",
    }


def _last_step(metrics: Path) -> int:
    """The last step that a training has recorded; 0 before the first."""
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, metrics.stat().st_size - 2000))
            lines = file.read().decode().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, KeyError, IndexError):
        return 0  # the file is not there yet, or its last line is incomplete

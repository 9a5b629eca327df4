"""The tab "Compare": results of eval.methods as a table and charts. A click starts a chat with an adapter."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from llama_adapter.comparison.folder import METRICS_FILE, best_runs, read_results, validation_curve
from llama_adapter.comparison.results import COSTS, front, mean_of
from llama_adapter.model import LlamaAdapter
from llama_adapter.page.charts import colours_of, draw_cost, draw_curves, draw_legend
from llama_adapter.page.wiring import AT_ONCE, TAKING

# A column's name, and where its number comes from: "best" of results.json, or the mean over the runs.
_COLUMNS = {
    "task score": "task_score",
    "forgetting": "forgetting",
    "parameters": "parameters",
    "file, MB": "bytes",
    "rows/s": "rows_per_second",
    "peak, MB": "peak_mb",
    "token time": "decode_vs_base",
}
_DIGITS = {"parameters": 0, "peak_mb": 0, "forgetting": 4, "decode_vs_base": 3, "task_score": 3}  # else 2
_HEAD = ("method", "loss", "± 95 %", *_COLUMNS, "rate", "seeds", "front")
_MORE_IS_BETTER = ("task score", "rows/s", "front")
_LABELS = dict(zip(COSTS, ("trainable parameters", "peak memory, MB", "forgetting"), strict=True))
_HOW_TO_READ = (
    "Loss, forgetting, memory and token time: the lower, the better. Loss and forgetting are in nats a "
    "token: the loss of the rows kept back, and by how much the loss of the base's own answers rises. Token "
    "time is the time for a decoded token, divided by the bare base's. On the front: no other method is at "
    "least as good in loss, parameters, memory and forgetting, and better in one."
)


@dataclass(frozen=True)
class Compared:
    """A comparison, and its adapters that the page offers.

    Attributes:
        results: the content of results.json.
        curves: (step, validation loss) of each method's best run.
        experts: for each method, the name of its best adapter on the page.
        adapters: the folders of these adapters, by that name.
    """

    results: Mapping[str, Any]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    experts: Mapping[str, str]
    adapters: Mapping[str, Path]

    def loaded(self, model: LlamaAdapter) -> Compared:
        """The same with only those adapters that a model has. Reports the missing ones on standard error."""
        there = {method: name for method, name in self.experts.items() if name in model.adapters}
        if missing := sorted(set(self.results["best"]) - set(there)):
            base = self.results["base"]
            print(
                f"of the comparison, on base {base}, these cannot be chatted with: {', '.join(missing)}",
                file=sys.stderr,
            )
        return replace(self, experts=there)


def read_comparison(folder: Path) -> Compared:
    """Read a comparison's folder. Raises UsageError if it is none."""
    results = read_results(folder)
    best = best_runs(folder, results)
    runs = {method: run for method, run in best.items() if (run / METRICS_FILE).is_file()}
    # Not only the method's name: an adapter in the weights folders may have that name.
    name = folder.resolve().name.replace(".", "_")
    experts = {method: f"{name}: {method}" for method in runs}
    return Compared(
        results,
        {method: validation_curve(run) for method, run in runs.items()},
        experts,
        {experts[method]: run for method, run in runs.items()},
    )


def compare_tab(compared: Compared, tabs: gr.Tabs, chat: str, expert: gr.Dropdown) -> None:
    """Build the tab. A click on a row chooses its method's adapter and goes to the tab of the id ``chat``."""
    results = compared.results
    gr.Markdown(
        f"{results['rows']:,} rows to train on, {results['validation_rows']:,} kept back, on "
        f"{results['base']}. Click a row to chat with its adapter."
    )
    by = gr.Dropdown(
        [name for name in _HEAD if name not in ("± 95 %", "seeds")],
        value="loss",
        label="Best first by",
        filterable=False,
        elem_id="sort",
    )
    kinds: list[Any] = ["str", *["number"] * (len(_HEAD) - 2), "str"]
    table = gr.Dataframe(
        sort_rows(table_rows(results), "loss"),
        headers=list(_HEAD),
        datatype=kinds,
        interactive=False,
        show_label=False,
        label="Methods",
        wrap=False,
        pinned_columns=1,
        elem_id="compared",
    )
    gr.Markdown(_HOW_TO_READ, elem_classes="line")
    gr.HTML(draw_charts(compared), elem_id="charts", padding=False)

    def choose(event: gr.SelectData) -> tuple[Any, Any]:
        method = str(event.row_value[0])
        if method not in compared.experts:
            gr.Warning(f"The adapter of {method} is not loaded here.", title="")
            return gr.skip(), gr.skip()
        return compared.experts[method], gr.Tabs(selected=chat)

    by.input(lambda name: sort_rows(table_rows(results), name), by, table, **AT_ONCE)
    table.select(choose, None, [expert, tabs], **TAKING)


def table_rows(results: Mapping[str, Any]) -> list[list[Any]]:
    """The rows of the table. Numbers stay numbers, so that the table can sort them."""
    rows = []
    for method, best in results["best"].items():
        half = (best["validation_loss_high"] - best["validation_loss_low"]) / 2 if best["seeds"] > 1 else None
        measured = [mean_of(results["runs"], method, name) for name in _COLUMNS.values()]
        rows.append(
            [
                method,
                _rounded(best["validation_loss_mean"], 4),
                _rounded(half, 4),
                *(
                    _rounded(value, _DIGITS.get(name, 2), 1e-6 if name == "bytes" else 1.0)
                    for name, value in zip(_COLUMNS.values(), measured, strict=True)
                ),
                best["rate"],
                best["seeds"],
                "✓" if best["on_front"] else "",
            ]
        )
    return rows


def sort_rows(rows: list[list[Any]], by: str) -> list[list[Any]]:
    """The rows of a table by one of its columns, the best first and those without a number last."""
    column = _HEAD.index(by)
    there, without = ([row for row in rows if (row[column] is None) == gone] for gone in (False, True))
    return sorted(there, key=lambda row: row[column], reverse=by in _MORE_IS_BETTER) + without


def draw_charts(compared: Compared) -> str:
    """HTML: a chart for each cost that was measured, and the loss curves."""
    results = compared.results
    best = results["best"]
    colours = colours_of(list(best))
    intervals = {
        method: (own["validation_loss_low"], own["validation_loss_high"]) for method, own in best.items()
    }
    charts = []
    for cost in COSTS:
        measured = {method: mean_of(results["runs"], method, cost) for method in best}
        points = {
            method: (value, best[method]["validation_loss_mean"])
            for method, value in measured.items()
            if value is not None
        }
        if points:
            charts.append(draw_cost(points, intervals, front(points), label=_LABELS[cost], colours=colours))
    if any(compared.curves.values()):
        curves = {method: points for method, points in compared.curves.items() if points}
        charts.append(draw_curves(curves, colours=colours))
    return draw_legend(colours) + f'<div class="charts">{"".join(charts)}</div>'


def _rounded(value: float | None, digits: int, factor: float = 1.0) -> float | None:
    return None if value is None else round(value * factor, digits or None)

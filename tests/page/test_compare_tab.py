"""The tab "Compare": what it reads of a comparison's folder, its table and its charts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llama_adapter.common.errors import UsageError
from llama_adapter.comparison.folder import RESULTS_FILE, RUN_FOLDER, run_folder
from llama_adapter.methods.checkpoint import save_adapter
from llama_adapter.model import LlamaAdapter
from llama_adapter.page.compare_tab import draw_charts, read_comparison, sort_rows, table_rows
from llama_adapter.page.experts import load_experts
from tests.compared import METHODS, build_results
from tests.tiny_models import build_tiny_model


def write_comparison(folder: Path, model: LlamaAdapter) -> Path:
    """A comparison whose adapters are the active one of a model; `full` has none."""
    results = build_results()
    for run in results["runs"]:
        training = run_folder(folder, run["method"], run["rate"], run["seed"]) / RUN_FOLDER
        if run["method"] == "full":
            continue
        save_adapter(model.get_adapter(model.active_adapter), training)
        lines = [{"step": step, "validation_loss": run["validation_loss"] + 1 / step} for step in (1, 2, 3)]
        (training / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / RESULTS_FILE).write_text(json.dumps(results))
    return folder


@pytest.fixture
def model() -> LlamaAdapter:
    return build_tiny_model()


def test_the_table_has_numbers_and_is_sorted_by_any_of_them(model: LlamaAdapter, tmp_path: Path) -> None:
    made = table_rows(read_comparison(write_comparison(tmp_path, model)).results)
    made[2][4] = None
    for by, first in (("parameters", "prompts"), ("front", "prompts"), ("rows/s", "prompts")):
        assert sort_rows(made, by)[0][0] == first, by
    assert [row[0] for row in sort_rows(made, "forgetting")] == ["prompts", "prompts+lora", "full"]
    rows = sort_rows(made, "loss")
    assert [row[0] for row in rows] == ["prompts+lora", "full", "prompts"]
    _, loss, half, score, forgotten, parameters, size, *_, rate, seeds, front = rows[0]
    assert (loss, score, forgotten, parameters, size) == (1.45, None, 0.1, 30_000, 0.12)
    assert half == pytest.approx(12.706 * 0.05, abs=1e-3) and (rate, seeds, front) == (0.01, 2, "✓")
    assert rows[1][-1] == "", "prompts+lora beats it in all"


def test_the_best_adapters_are_offered_on_the_page(
    model: LlamaAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = read_comparison(write_comparison(tmp_path / "my.runs", model))
    assert compared.adapters == {
        f"my_runs: {method}": run_folder(tmp_path / "my.runs", method, 0.01, 1) / RUN_FOLDER
        for method in ("prompts", "prompts+lora")
    }
    experts = load_experts(model, weights=tmp_path / "none", compared=compared.adapters)
    assert {"my_runs: prompts", "my_runs: prompts+lora"} <= set(experts) & {*model.adapters}
    assert compared.loaded(model).experts == compared.experts
    model.delete_adapter("my_runs: prompts")
    assert list(compared.loaded(model).experts) == ["prompts+lora"]
    assert "these cannot be chatted with: full, prompts" in capsys.readouterr().err


def test_charts_show_every_method_and_the_front(model: LlamaAdapter, tmp_path: Path) -> None:
    drawn = draw_charts(read_comparison(write_comparison(tmp_path, model)))
    assert drawn.count("<svg") == 4 and "NaN" not in drawn and "inf" not in drawn
    for method in METHODS:
        assert drawn.count(f">{method}</text>") == 3, "its name is beside its point in each chart of a cost"
    assert "front: prompts, prompts+lora" in drawn  # by parameters
    places = re.findall(r'<(?:circle|text)[^>]* (?:cx|x)="([-\d.]+)"', drawn)
    assert all(0 <= float(place) <= 420 for place in places)


@pytest.mark.parametrize("content", [None, "no JSON", "{}", '{"best": {}, "runs": [], "base": "b"}'])
def test_what_is_no_comparison_is_told_in_a_line(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / RESULTS_FILE).write_text(content)
    with pytest.raises(UsageError, match=r"cannot be read|no run that is done") as error:
        read_comparison(tmp_path)
    assert "\n" not in str(error.value)

"""Training in one call from Python: `llama_adapter.train`."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llama_adapter
from llama_adapter.common.errors import UsageError
from llama_adapter.methods.checkpoint import load_adapter
from llama_adapter.methods.table import METHODS, PARTS, option_names
from llama_adapter.training.plan import AdapterPlan
from llama_adapter.training.recipes import read_source, validation_loss
from llama_adapter.training.settings import TrainingSettings
from tests.conftest import CHECKOUT
from tests.tiny_models import build_tiny_base

DATA = CHECKOUT / "examples" / "instructions.jsonl"
QUICK: dict[str, Any] = {"epochs": 2, "warmup_epochs": 0, "batch_size": 4, "validate_every": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_base(tmp_path_factory.mktemp("base")))


def test_one_call_gives_the_best_adapter(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best is that of the first validation here, not that of the last step."""
    losses = itertools.count(1.0)
    monkeypatch.setattr(
        "llama_adapter.training.trainer.mean_answer_loss", lambda *_, **__: (next(losses), 10)
    )
    output = tmp_path / "run"
    model = llama_adapter.train(DATA, base=base, output=output, validation_rows=4, learning_rate=0.1, **QUICK)
    assert validation_loss(model) == 1
    adapter = model.get_adapter(model.active_adapter)
    assert adapter.config.training["step"] == 2
    saved = load_adapter(output).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in adapter.state_dict().items())


def test_several_sources_with_weights(base: str, tmp_path: Path) -> None:
    rows = tmp_path / "few.json"
    rows.write_text(json.dumps([{"instruction": f"Say {n}", "output": "yes"} for n in range(8)]))
    sources = [read_source(rows, validation_rows=4, weight=2), DATA]
    llama_adapter.train(sources, base=base, output=tmp_path / "run", validation_rows=4, max_steps=1, **QUICK)
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert [(own["source"], own["weight"]) for own in data["sources"]] == [("few.json", 2), (DATA.name, 1)]
    assert (data["train_rows"], data["validation_rows"]) == (24, 8)


def test_a_run_goes_on_and_an_adapter_is_trained_on(base: str, tmp_path: Path) -> None:
    given = {"base": base, "validation_rows": 4, **QUICK}
    first = llama_adapter.train(DATA, output=tmp_path / "run", **given)
    again = llama_adapter.train(DATA, output=tmp_path / "run", resume=True, **given)
    one, other = (model.get_adapter("trained").state_dict() for model in (first, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    further = llama_adapter.train(
        DATA, output=tmp_path / "more", start_from=str(tmp_path / "run"), method="prompts+scales", **given
    )
    assert further.get_adapter("trained").config.method == "prompts+scales"


def test_weights_of_the_base_are_trained_and_trained_on(base: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"base": base, "validation_rows": 4, **QUICK}
    chosen = {"method": "selected", "share": 0.02, "sample_rows": 3}
    first = llama_adapter.train(DATA, output=tmp_path / "run", **chosen, **given)
    adapter = first.get_adapter("trained")
    assert adapter.config.method == "selected"
    assert adapter.config.options == {"share": 0.02, "score": "fisher", "sample_rows": 3}
    more = llama_adapter.train(DATA, output=tmp_path / "more", start_from=str(tmp_path / "run"), **given)
    before, after = (model.get_adapter("trained").state_dict() for model in (first, more))
    assert torch.equal(before["selected.places"], after["selected.places"])
    assert not torch.equal(before["selected.changes"], after["selected.changes"])


def test_settings_and_a_plan_take_the_place_of_keywords(base: str, tmp_path: Path) -> None:
    settings = TrainingSettings(**QUICK, max_steps=1, seed=3)
    plan = AdapterPlan(base=base, method="prompts", options={"prompt_length": 2})
    model = llama_adapter.train(
        DATA, output=tmp_path / "run", settings=settings, plan=plan, validation_rows=4
    )
    assert model.get_adapter("trained").config.prompt_length == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["seed"] == 3


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"epoch": 3}, "train has no option 'epoch'"),
        ({"settings": TrainingSettings(), "epochs": 3}, "settings is given, and epochs beside it"),
        ({"plan": AdapterPlan(), "prompt_length": 3}, "plan is given, and prompt_length beside it"),
        ({"method": "scales", "prompt_length": 3}, "method 'scales' has no option 'prompt_length'"),
        ({"method": "magic"}, "there is no 'magic'"),
        ({"rates": {"lora": 0.1}}, "has no group 'lora'"),
        ({"batch_size": 0}, "batch-size is 0"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(
    base: str, tmp_path: Path, given: dict[str, Any], told: str
) -> None:
    own = {} if "plan" in given else {"base": base}
    with pytest.raises(UsageError, match=told) as error:
        llama_adapter.train(DATA, output=tmp_path / "run", validation_rows=4, **own, **given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_every_keyword_has_one_meaning() -> None:
    names = [own.name for kind in (TrainingSettings, AdapterPlan) for own in dataclasses.fields(kind)]
    names += {name for kind in METHODS for name in option_names(PARTS[kind].Config)}
    assert len(set(names)) == len(names)

"""The loop: schedule, accumulation, validation, stopping, resuming and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_adapter.common.errors import UsageError
from llama_adapter.data.examples import IGNORED, Example
from llama_adapter.methods.checkpoint import load_adapter
from llama_adapter.methods.projection import Projection
from llama_adapter.packing import losses as packed_losses
from llama_adapter.packing.losses import accumulate_gradient, answer_loss
from llama_adapter.training import trainer as training
from llama_adapter.training.settings import TrainingSettings
from llama_adapter.training.trainer import Trainer
from tests.finished_runs import load_last_checkpoint, losses, trained_weights
from tests.refusals import refusal
from tests.tiny_models import VISION, build_tiny_model

SETTINGS = TrainingSettings(
    epochs=3, warmup_epochs=1, batch_size=2, learning_rate=0.05, validate_every=4, checkpoint_every=2
)


def examples(count: int, first_row: int = 1) -> list[Example]:
    """Rows whose answer is the question backwards."""
    generator = torch.Generator().manual_seed(first_row)
    made = []
    for row in range(first_row, first_row + count):
        question = torch.randint(3, 60, (3 + row % 4,), generator=generator).tolist()
        answer = [*question[::-1], 2]
        made.append(Example(question + answer, [IGNORED] * len(question) + answer, (), row))
    return made


def trainer(output: Path, **changes: Any) -> Trainer:
    settings = dataclasses.replace(SETTINGS, **changes)
    return Trainer(
        build_tiny_model(),
        "tiny",
        examples(8),
        {"made": examples(4, 100)},
        settings,
        output,
        {"source": "made"},
    )


def test_the_papers_settings_are_the_defaults() -> None:
    settings = TrainingSettings()
    assert (settings.epochs, settings.warmup_epochs, settings.batch_size) == (5, 2, 64)
    assert (settings.weight_decay, settings.betas) == (0.02, (0.9, 0.95))
    assert settings.peak_learning_rate == 9e-3 * 64 / 256


def test_the_rate_rises_for_the_warm_up_and_falls_to_zero() -> None:
    rates = [SETTINGS.schedule(step, 12) for step in range(13)]
    assert rates[:4] == sorted(rates[:4]) and rates[0] > 0
    assert rates[4] == pytest.approx(1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[8] == pytest.approx(0.5)  # half way down the cosine
    assert rates[12] == pytest.approx(0, abs=1e-12)


def test_the_gates_can_have_a_rate_of_their_own(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1, rates={"gates": 1e-9}).run()
    before = build_tiny_model().adapters["tiny"].state_dict()
    after = trained_weights(tmp_path)
    assert torch.allclose(after["prompts.gates"], before["prompts.gates"], atol=1e-6)
    assert (after["prompts.embeddings"] - before["prompts.embeddings"]).abs().max() > 1e-3


def test_scales_and_biases_can_have_a_rate_of_their_own(tmp_path: Path) -> None:
    small = trainer(tmp_path, max_steps=1, rates={"scales": 1e-9})
    model = build_tiny_model(names=())
    before = model.new_adapter("tiny", prompt_length=3, adapted_layers=2, method="prompts+scales", seed=1)
    torch.nn.init.normal_(before.prompts.gates, generator=torch.Generator().manual_seed(1))
    first = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    dataclasses.replace(small, model=model).run()
    after = trained_weights(tmp_path)
    assert 0 < after["scales.values"].abs().max() < 1e-6
    assert (after["prompts.embeddings"] - first["prompts.embeddings"]).abs().max() > 1e-3


def test_steps_are_counted_in_whole_epochs_unless_cut() -> None:
    assert SETTINGS.total_steps(9) == 15
    assert dataclasses.replace(SETTINGS, max_steps=7).total_steps(9) == 7


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": -1},
        {"learning_rate": float("nan")},
        {"warmup_epochs": 9},
        {"seed": -1},
        {"seed": 2**60},
        {"max_tokens": 0},
        {"max_minutes": 0},
        {"max_minutes": -1.5},
        {"max_minutes": float("nan")},
        {"max_minutes": float("inf")},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    assert f"--{next(iter(wrong)).replace('_', '-')} is" in refusal(lambda: TrainingSettings(**wrong))


def test_it_learns_and_changes_nothing_but_the_adapter(tmp_path: Path) -> None:
    run = trainer(tmp_path, epochs=12, warmup_epochs=2)
    before = {name: tensor.clone() for name, tensor in run.model.decoder.state_dict().items()}
    best = run.run()
    measured = losses(tmp_path)
    assert sum(measured[-4:]) < 0.9 * sum(measured[:4])
    for name, tensor in run.model.decoder.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None for parameter in run.model.decoder.parameters())
    kept = load_adapter(tmp_path)
    assert kept.config.training["validation_loss"] == round(best, 4)
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["data"]["source"] == "made" and described["made_by"]["versions"]["torch"]


def test_the_best_on_validation_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(training, "mean_answer_loss", lambda *_, **__: (next(given), 5))
    run = trainer(tmp_path)
    assert run.run() == 1.0
    assert load_adapter(tmp_path).config.training["step"] == 8


def test_accumulation_equals_the_large_batch(tmp_path: Path) -> None:
    trainer(tmp_path / "whole", batch_size=8, max_tokens=1000).run()
    trainer(tmp_path / "parts", batch_size=8, max_tokens=20).run()
    whole, parts = trained_weights(tmp_path / "whole"), trained_weights(tmp_path / "parts")
    for name, tensor in whole.items():
        assert torch.allclose(tensor, parts[name], atol=1e-5)


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    for name in ("one", "two"):
        trainer(tmp_path / name).run()
    trainer(tmp_path / "three", seed=1).run()
    one, two, three = (trained_weights(tmp_path / name) for name in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["prompts.embeddings"], three["prompts.embeddings"])


class Killed(Exception):
    """Stands for a machine that goes away."""


def scale_losses(monkeypatch: pytest.MonkeyPatch, factor: Callable[[int], float]) -> None:
    """Multiply the loss of each training step, counted from 1; those of validation stay."""
    steps = itertools.count(1)

    def accumulate(*args: Any, **kwargs: Any) -> float:
        step = next(steps)
        with monkeypatch.context() as patch:
            patch.setattr(packed_losses, "answer_loss", lambda *a, **k: answer_loss(*a, **k) * factor(step))
            return accumulate_gradient(*args, **kwargs)

    monkeypatch.setattr(training, "accumulate_gradient", accumulate)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    def act(now: int) -> float:
        if now == step:
            action()
        return 1.0

    scale_losses(monkeypatch, act)


@pytest.mark.parametrize("step", [1, 2, 5, 6, 11])
def test_a_killed_run_goes_on_exactly(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill() -> None:
        raise Killed

    trainer(tmp_path / "whole").run()
    with monkeypatch.context() as patch:
        interrupt_at(step, patch, kill)
        with pytest.raises(Killed):
            trainer(tmp_path / "cut").run()
    trainer(tmp_path / "cut").run(resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = trained_weights(tmp_path / "whole"), trained_weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path / "whole").run()
    with monkeypatch.context() as patch:
        interrupt_at(5, patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path / "cut").run()
    assert (tmp_path / "cut/checkpoints/step-0000005.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trainer(tmp_path / "cut").run(resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path).run()
    kept = sorted((tmp_path / "checkpoints").glob("*.pt"))
    assert [path.name for path in kept] == ["step-0000010.pt", "step-0000012.pt"]
    before = trained_weights(tmp_path)
    kept[-1].write_bytes(kept[-1].read_bytes()[:-100])
    trainer(tmp_path).run(resume=True)
    told = capsys.readouterr().err
    assert "step-0000012.pt is not whole" in told and "going on from step 10" in told
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained_weights(tmp_path).items())


def test_a_finished_run_resumed_does_nothing(tmp_path: Path) -> None:
    first = trainer(tmp_path).run()
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert trainer(tmp_path).run(resume=True) == first
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("where", ["start", "resume"])
def test_another_run_in_the_folder_is_refused(where: str, tmp_path: Path) -> None:
    if where == "resume":
        with pytest.raises(UsageError, match="no run to resume"):
            trainer(tmp_path).run(resume=True)
        return
    trainer(tmp_path, max_steps=1).run()
    with pytest.raises(UsageError, match="--resume"):
        trainer(tmp_path, max_steps=1).run()


def test_a_resume_with_other_settings_or_data_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    with pytest.raises(UsageError, match=r"settings batch_size = 2, now it is 4"):
        trainer(tmp_path, batch_size=4).run(resume=True)
    other = dataclasses.replace(trainer(tmp_path), data={"source": "changed"})
    with pytest.raises(UsageError, match=r"data source = 'made', now it is 'changed'"):
        other.run(resume=True)


def test_a_resume_of_another_adapter_is_refused_by_what_differs(tmp_path: Path) -> None:
    def with_adapter(output: Path, **made: Any) -> Trainer:
        model = build_tiny_model(names=())
        model.new_adapter("tiny", **made)
        return dataclasses.replace(trainer(output, max_steps=1), model=model)

    with_adapter(tmp_path / "tuned", method="prompts+scales").run()
    with pytest.raises(UsageError, match=r"adapter method = 'prompts\+scales', now it is 'prompts'; resume"):
        with_adapter(tmp_path / "tuned").run(resume=True)
    with_adapter(tmp_path / "sees", vision=VISION).run()
    with pytest.raises(UsageError, match=r"adapter parts projection bottleneck = 5, now it is 6; resume"):
        with_adapter(tmp_path / "sees", vision=dataclasses.replace(VISION, bottleneck=6)).run(resume=True)


def test_a_step_without_a_finite_loss_is_skipped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale_losses(monkeypatch, lambda step: math.nan if step in (2, 3) else 1.0)
    trainer(tmp_path).run()
    assert load_last_checkpoint(tmp_path)["progress"]["skipped_steps"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in trained_weights(tmp_path).values())


def test_three_bad_steps_in_a_row_end_the_run_and_name_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale_losses(monkeypatch, lambda step: math.inf)
    run = trainer(tmp_path)
    before = {name: t.clone() for name, t in run.model.adapters["tiny"].state_dict().items()}
    with pytest.raises(UsageError, match=r"3 steps in a row, last in the rows \d+, \d+; "):
        run.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained_weights(tmp_path).items())


# --- a run that ends by its time ----------------------------------------------------------------------------

LONG = {"epochs": 30, "warmup_epochs": 3.0, "validate_every": 1000, "checkpoint_every": 1000}  # 120 steps


def seconds_each(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let each training step last so long, and everything else no time."""
    now = 1000.0

    def act(step: int) -> float:
        nonlocal now
        now += seconds
        return 1.0

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now))
    scale_losses(monkeypatch, act)


def rates(output: Path) -> list[float]:
    """The learning rate of each step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["learning_rate"] for line in lines if "learning_rate" in line]


def test_a_run_whose_time_ends_has_had_its_whole_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds_each(monkeypatch, 1.5)
    run = trainer(tmp_path, **LONG, max_minutes=1)
    best = run.run()
    given = rates(tmp_path)
    assert len(given) == 40 < run.settings.total_steps(8)
    peak = run.settings.peak_learning_rate
    assert given == pytest.approx([peak * run.settings.schedule(3 * step, 120) for step in range(40)])
    assert max(given) > 0.9 * peak and given[-1] < 0.003 * peak
    assert load_last_checkpoint(tmp_path)["progress"]["step"] == 40
    kept = load_adapter(tmp_path).config.training
    assert kept["step"] == 40 and kept["validation_loss"] == round(best, 4)


def test_a_run_with_time_to_spare_ends_by_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        seconds_each(patch, 3600.0)
        trainer(tmp_path / "without").run()
    with monkeypatch.context() as patch:
        seconds_each(patch, 4.9)
        trainer(tmp_path / "enough", max_minutes=1).run()
    assert rates(tmp_path / "enough") == rates(tmp_path / "without")
    assert rates(tmp_path / "without") == [0.05 * SETTINGS.schedule(step, 12) for step in range(12)]
    assert losses(tmp_path / "enough") == losses(tmp_path / "without")
    without, enough = trained_weights(tmp_path / "without"), trained_weights(tmp_path / "enough")
    assert all(torch.equal(without[name], enough[name]) for name in without)


def test_a_single_step_longer_than_the_time_leaves_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds_each(monkeypatch, 100.0)
    trainer(tmp_path, **LONG, max_minutes=1).run()
    assert len(losses(tmp_path)) == 1
    assert load_adapter(tmp_path).config.training["step"] == 1


def test_a_resumed_run_counts_the_time_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {**LONG, "checkpoint_every": 1, "max_minutes": 1}
    with monkeypatch.context() as patch:
        seconds_each(patch, 1.5)
        trainer(tmp_path / "whole", **changes).run()
    with monkeypatch.context() as patch:
        seconds_each(patch, 1.5)
        interrupted = itertools.count(1)
        accumulate = training.accumulate_gradient

        def stop_after_ten(*args: Any, **kwargs: Any) -> float:
            if next(interrupted) == 10:
                os.kill(os.getpid(), signal.SIGINT)
            return accumulate(*args, **kwargs)

        patch.setattr(training, "accumulate_gradient", stop_after_ten)
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path / "cut", **changes).run()
    assert len(losses(tmp_path / "cut")) == 10
    with monkeypatch.context() as patch:
        seconds_each(patch, 1.5)
        trainer(tmp_path / "cut", **changes).run(resume=True)
    assert rates(tmp_path / "cut") == rates(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_run_that_its_time_ended_does_nothing_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds_each(monkeypatch, 1.5)
    first = trainer(tmp_path, **LONG, max_minutes=1).run()
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert trainer(tmp_path, **LONG, max_minutes=1).run(resume=True) == first
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert len(losses(tmp_path)) == 40


# --- which adapter is the best ------------------------------------------------------------------------------


def test_sources_count_alike_whatever_their_length(tmp_path: Path) -> None:
    run = dataclasses.replace(
        trainer(tmp_path, max_steps=1, validate_every=1),
        validation_examples={"few": examples(1, 100), "many": examples(12, 200)},
    )
    best = run.run()
    [line] = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()][1:]
    assert best == line["validation_loss"]
    assert best == pytest.approx((line["validation_loss_few"] + line["validation_loss_many"]) / 2)
    assert line["validation_loss_few"] != pytest.approx(line["validation_loss_many"], abs=1e-3)


# --- how often a row comes up -------------------------------------------------------------------------------


def orders(
    output: Path, occurrences: list[float] | None, *, epochs: int = 8, seed: int = 0
) -> list[list[int]]:
    """Which rows come up in each of some epochs."""
    run = dataclasses.replace(
        trainer(output, seed=seed),
        train_examples=examples(8 if occurrences is None else len(occurrences)),
        occurrences=occurrences,
    )
    return [run.order(epoch) for epoch in range(epochs)]


def test_without_weights_every_row_comes_up_once_in_another_order(tmp_path: Path) -> None:
    for occurrences in (None, [1.0] * 8):
        made = orders(tmp_path, occurrences)
        assert all(sorted(order) == list(range(8)) for order in made)
        assert len(set(map(tuple, made))) == 8


def test_a_row_comes_up_as_often_as_its_weight_says(tmp_path: Path) -> None:
    weights = [2.0] * 3 + [0.5] * 10 + [1.0] * 4
    made = orders(tmp_path, weights, epochs=40)
    for order in made:
        assert len(order) == 15
        assert [order.count(row) for row in (0, 1, 2)] == [2, 2, 2]
        assert [order.count(row) for row in (13, 14, 15, 16)] == [1, 1, 1, 1]
        halves = [order.count(row) for row in range(3, 13)]
        assert set(halves) == {0, 1} and sum(halves) == 5
    shown = {frozenset(row for row in order if 3 <= row < 13) for order in made}
    assert len(shown) > 30, "other ones each time"
    for row in range(3, 13):
        assert 10 <= sum(order.count(row) for order in made) <= 30  # 20 of 40 on average
    assert orders(tmp_path, weights, epochs=40) == made
    assert orders(tmp_path, weights, epochs=40, seed=1) != made


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.7, 1, 1 / 3, 2.5]), st.integers(1, 30)), min_size=1),
    st.integers(0, 5),
)
def test_every_epoch_has_as_many_rows(parts: list[tuple[float, int]], seed: int) -> None:
    weights = [weight for weight, rows in parts for _ in range(rows)]
    made = orders(Path("unused"), weights, seed=seed)
    assert len({len(order) for order in made}) == 1
    assert abs(len(made[0]) - sum(weights)) <= 0.5 + 1e-6
    for order in made:
        for row, weight in enumerate(weights):
            assert math.floor(weight) <= order.count(row) <= math.ceil(weight)


def test_weighted_rows_train_and_resume_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weighted(output: Path) -> Trainer:
        return dataclasses.replace(trainer(output), occurrences=[0.5] * 4 + [1.5] * 4)

    weighted(tmp_path / "whole").run()
    assert len(losses(tmp_path / "whole")) == 12  # 8 rows an epoch in batches of 2
    with monkeypatch.context() as patch:
        interrupt_at(7, patch, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            weighted(tmp_path / "cut").run()
    weighted(tmp_path / "cut").run(resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_weights_that_leave_no_row_are_refused(tmp_path: Path) -> None:
    run = dataclasses.replace(trainer(tmp_path / "run"), occurrences=[0.01] * 8)
    with pytest.raises(UsageError, match="leave no row to train on"):
        run.run()
    assert not (tmp_path / "run").exists()


# --- pictures -----------------------------------------------------------------------------------------------


def seeing_trainer(output: Path, **changes: Any) -> Trainer:
    """Rows that only differ in their pictures, whose answers follow from them; and one without."""
    generator = torch.Generator().manual_seed(0)
    features = {Path(f"{n}.png"): torch.randn(6, generator=generator) for n in range(8)}
    rows = [
        Example([9, 10, 11, 20 + n % 4, 2], [IGNORED] * 3 + [20 + n % 4, 2], (picture,), n)
        for n, picture in enumerate(features)
    ]
    rows.append(Example([9, 10, 12, 30, 2], [IGNORED] * 3 + [30, 2], (), 9))
    settings = dataclasses.replace(SETTINGS, **changes)
    model = build_tiny_model(vision=VISION)
    return Trainer(model, "tiny", rows, {"made": rows}, settings, output, features=features)


def test_it_learns_from_pictures(tmp_path: Path) -> None:
    fast: dict[str, Any] = {
        "epochs": 12,
        "learning_rate": 0.3,
        "rates": {"gates": 0.1},
        "validate_every": 100,
    }
    run = seeing_trainer(tmp_path / "seeing", **fast)
    best = run.run()
    blind = seeing_trainer(tmp_path / "blind", **fast)
    without = [dataclasses.replace(row, images=()) for row in blind.train_examples]
    blind = dataclasses.replace(blind, train_examples=without, validation_examples={"made": without})
    assert best < blind.run() - 0.2
    kept = load_adapter(tmp_path / "seeing")
    assert kept.find(Projection) is not None and run.model.get_adapter("tiny").find(Projection) is not None
    before = build_tiny_model(vision=VISION).adapters["tiny"].state_dict()
    for name, tensor in kept.state_dict().items():
        fitted = name in ("projection.mean", "projection.scale")
        assert torch.equal(tensor, before[name]) == fitted, name


def test_the_projection_can_have_a_rate_of_its_own(tmp_path: Path) -> None:
    seeing_trainer(tmp_path, max_steps=1, rates={"projection": 1e-9}, weight_decay=0.0).run()
    before = build_tiny_model(vision=VISION).adapters["tiny"].state_dict()
    after = trained_weights(tmp_path)
    assert torch.allclose(after["projection.up.weight"], before["projection.up.weight"], atol=1e-6)
    assert (after["prompts.embeddings"] - before["prompts.embeddings"]).abs().max() > 1e-3

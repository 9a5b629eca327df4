"""What can go wrong in a training: it is killed, the disk is full, the data are gone or have changed."""

from __future__ import annotations

import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train.alpaca
from llama_adapter.common.errors import run_command
from llama_adapter.training import run_folder
from tests.commands.test_train_alpaca import DATA, base, options  # noqa: F401  (base is a fixture)
from tests.conftest import CHECKOUT
from tests.finished_runs import last_checkpoint, losses, trained_weights
from tests.own_process import OwnProcess
from tests.training.test_trainer import trainer

EPOCHS = 40  # of four steps, a checkpoint after each


def start(output: Path, *more: str) -> OwnProcess:
    options = ["--output", str(output), "--epochs", str(EPOCHS), "--checkpoint-every", "1"]
    return OwnProcess("tests.train_tiny", *options, *more)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at_a_random_moment(output: Path, moments: random.Random, *more: str) -> None:
    """Start or resume a run, and kill it with SIGKILL at a random moment before its end."""
    process = start(output, *more)
    metrics = output / "metrics.jsonl"
    enough = lines_in(metrics) + 1  # so that every session makes progress
    deadline = time.monotonic() + 120
    while lines_in(metrics) < enough and process.is_running() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(moments.uniform(0, 0.15))
    assert process.is_running(), "the run was over before it could be killed; let it have more epochs"
    process.send_signal(signal.SIGKILL)
    process.wait()


def expect_the_same_after(kills: int, tmp_path: Path, *, seed: int) -> None:
    moments = random.Random(seed)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start(whole).finish()
    kill_at_a_random_moment(cut, moments)
    for _ in range(kills - 1):
        kill_at_a_random_moment(cut, moments, "--resume")
    assert len(list((cut / "checkpoints").glob("step-*.pt"))) <= 3, "two are kept, and one may be new"
    assert "going on from step" in start(cut, "--resume").finish().stderr
    assert losses(cut) == losses(whole)
    before, after = trained_weights(whole), trained_weights(cut)
    assert all(torch.equal(before[name], after[name]) for name in before)
    final = "adapter_model.safetensors"
    assert (cut / final).read_bytes() == (whole / final).read_bytes()
    assert len(list((cut / "checkpoints").glob("*.pt"))) == 2


def test_killed_at_five_random_moments_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    expect_the_same_after(5, tmp_path, seed=5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_twenty_random_moments_it_ends_with_the_same_weights(seed: int, tmp_path: Path) -> None:
    expect_the_same_after(5, tmp_path, seed=seed)


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "changed", "unsealed", "half a seal"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path).run()
    expected = trained_weights(tmp_path)
    last = last_checkpoint(tmp_path)
    seal = last.with_suffix(".json")
    if damage == "cut":
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    elif damage == "changed":
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
    elif damage == "unsealed":
        seal.unlink()
    else:
        seal.write_text(seal.read_text()[:9])
    trainer(tmp_path).run(resume=True)
    told = capsys.readouterr().err
    assert f"{last.name} is not whole" in told and "going on from step 10" in told
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_weights(tmp_path).items())


def test_with_no_whole_checkpoint_it_starts_again_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path).run()
    expected = trained_weights(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    trainer(tmp_path).run(resume=True)
    assert "there is no checkpoint yet: starting from the beginning" in capsys.readouterr().err
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_weights(tmp_path).items())


# --- disk and data ------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_in_one_line_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path / "whole").run()
    capsys.readouterr()
    saved = torch.save
    steps = iter(range(100))

    def fill_up(state: object, path: Path) -> None:
        if next(steps) == 2:
            Path(path).write_bytes(b"half a checkp")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.torch, "save", fill_up)
        assert run_command(lambda: trainer(tmp_path / "cut").run() and None) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "the disk is full while writing" in told[0] and "step-0000006.pt" in told[0]
    assert not list((tmp_path / "cut").rglob("*.tmp"))
    trainer(tmp_path / "cut").run(resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_data_that_vanished_before_a_resume_are_named(
    base: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, output = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text(DATA.read_text())
    arguments = options(base, output, "--data", str(data), "--max-steps", "2")
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    assert run_command(train.alpaca.main) == 0
    data.unlink()
    monkeypatch.setattr(sys, "argv", ["command", *arguments, "--resume"])
    capsys.readouterr()
    assert run_command(train.alpaca.main) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{data}: no such file" in told


def test_a_run_says_how_it_was_made(
    base: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train.alpaca", *options(base, output, "--max-steps", "1")])
    train.alpaca.main()
    record = json.loads((output / "run.json").read_text())
    assert record["settings"]["seed"] == 0 and record["settings"]["batch_size"] == 4
    assert len(record["data"]["fingerprint"]) == 64 and record["data"]["source"] == DATA.name
    made_by = record["made_by"]
    assert made_by["command"].startswith("train.alpaca --data") and "--max-steps 1" in made_by["command"]
    assert {"python", "torch", "transformers", "llama-adapter"} <= set(made_by["versions"])
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True)
    assert made_by["git_revision"] == (revision.stdout.strip() or None)
    assert made_by["processes"] == 1

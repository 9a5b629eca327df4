"""Several processes of one run: together they compute what a single process computes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama_adapter.common.processes import Processes, running_processes
from llama_adapter.data.examples import Example
from llama_adapter.packing.pack import deal
from tests.conftest import CHECKOUT
from tests.finished_runs import losses, trained_weights
from tests.own_process import OwnProcess
from tests.train_tiny import build


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module in two processes with `accelerate launch`."""
    options = ["--config_file", str(CHECKOUT / "configs/ddp.yaml"), "--num_processes", "2"]
    options += ["--main_process_port", str(free_port())]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", *arguments],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def together(module: str, *arguments: str, code: int = 0) -> list[OwnProcess]:
    """Run a module in two processes, as a launcher would. Both have to end with the exit code."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    own = [{"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    processes = [OwnProcess(module, *arguments, environment=shared | ranks) for ranks in own]
    for process in processes:
        assert process.wait() == code, process.stderr[-3000:]
    return processes


# --- one process --------------------------------------------------------------------------------------------


def test_one_process_has_nobody_to_talk_to() -> None:
    alone = running_processes()
    assert (alone.index, alone.count, alone.main, alone.sharded) == (0, 1, True, False)
    assert alone.sum(torch.tensor(3.0)) == 3 and alone.any(True) and not alone.any(False)
    assert alone.from_main(lambda: "made") == "made"
    with alone.main_first():
        pass


lengths = st.lists(st.integers(2, 600), min_size=1, max_size=40)


@given(lengths, st.integers(1, 9))
def test_no_row_is_lost_or_dealt_twice(lengths: list[int], processes: int) -> None:
    rows = [Example([5] * length, [5] * length, (), row) for row, length in enumerate(lengths)]
    shares = deal(rows, processes)
    assert len(shares) == processes
    assert sorted(row.row for share in shares for row in share) == list(range(len(rows)))
    tokens = [sum(len(row.input_ids) - 1 for row in share) for share in shares]  # nothing reads the last
    assert max(tokens) - min(tokens) <= max(lengths), "the work is even"


def test_one_process_gets_the_rows_as_they_are() -> None:
    rows = [Example([5] * length, [5] * length, (), row) for row, length in enumerate((3, 9, 1))]
    assert deal(rows, 1) == [rows]


# --- two processes, by gloo ---------------------------------------------------------------------------------


TRAINING = ("tests.train_tiny", "--output")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    OwnProcess(*TRAINING, str(output)).finish()
    return output


def expect_same(output: Path, alone: Path) -> None:
    assert losses(output) == pytest.approx(losses(alone), abs=1e-5)
    one, several = trained_weights(alone), trained_weights(output)
    for name, tensor in one.items():
        assert torch.allclose(tensor, several[name], atol=1e-4), name


def test_two_processes_train_as_one(alone: Path, tmp_path: Path) -> None:
    """Only some batches have pictures. An epoch's last batch is a single row, so one process has none."""
    output = tmp_path / "run"
    done = launch(*TRAINING, str(output))
    expect_same(output, alone)
    assert done.stderr.count("validation loss") == (alone.parent / "run/metrics.jsonl").read_text().count(
        "validation_loss"
    ), "one process tells"
    assert done.stdout.count("group at exit: False") == 2
    assert len(list((output / "checkpoints").glob("*.pt"))) == 2
    record = json.loads((output / "run.json").read_text())
    assert record["made_by"]["processes"] == 2
    assert set(json.loads((alone / "run.json").read_text())) == set(record)


def test_two_processes_train_other_methods_as_one(tmp_path: Path) -> None:
    """Each does something more: a penalty and a choice of ranks; gradients passed on; a choice of weights."""
    methods = ("adalora", "full", "selected")
    together(*TRAINING, str(tmp_path / "two"), "--methods", *methods)
    for method in methods:
        build(method, tmp_path / "one" / method).run()
        expect_same(tmp_path / "two" / method, tmp_path / "one" / method)


def test_a_run_goes_on_with_another_number_of_processes(alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    together(*TRAINING, str(output), "--stop-after", "5", code=130)
    assert len(losses(output)) == 5
    done = OwnProcess(*TRAINING, str(output), "--resume").finish()
    assert "going on from step 5" in done.stderr
    expect_same(output, alone)


def test_a_mistake_ends_all_processes_with_one_line(alone: Path) -> None:
    told = "".join(process.stderr for process in together(*TRAINING, str(alone), code=2))
    assert told.count("holds a run already") == 1


def test_a_sharded_decoder_gives_the_same(alone: Path, tmp_path: Path) -> None:
    """accelerate shards only on accelerators. Here the decoder is sharded with the function that it calls."""
    output = tmp_path / "run"
    together(*TRAINING, str(output), "--shard")
    expect_same(output, alone)


def test_a_sharded_decoder_generates_the_same() -> None:
    for process in together("tests.generate_tiny"):
        assert "the same tokens: True" in process.stdout


def test_the_decoder_is_not_sharded_unless_asked() -> None:
    module = torch.nn.Linear(2, 2)
    Processes().shard(module)
    assert type(module) is torch.nn.Linear


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_the_shipped_configs_are_what_accelerate_reads(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CHECKOUT / f"configs/{name}.yaml"))
    assert config.num_processes == 2 and str(config.distributed_type.value) in ("MULTI_GPU", "FSDP")

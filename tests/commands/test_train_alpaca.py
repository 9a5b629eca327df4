"""train.alpaca and eval.alpaca from the command line, on a tiny base."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import eval.alpaca
import train.alpaca
from llama_adapter.common.errors import UsageError
from tests.conftest import CHECKOUT
from tests.finished_runs import losses
from tests.own_process import OwnProcess
from tests.pasted import run_pasted
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import build_tiny_base

DATA = CHECKOUT / "examples" / "instructions.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


def options(base: Path, output: Path, *more: str) -> list[str]:
    given = {"--data": DATA, "--output": output, "--base": base, "--epochs": 2, "--warmup-epochs": 0.5}
    given |= {"--batch-size": 4, "--learning-rate": 0.01, "--validation-rows": 4, "--checkpoint-every": 1}
    return [str(part) for pair in given.items() for part in pair] + list(more)


def run(module: object, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    module.main()  # type: ignore[attr-defined]


def test_a_run_leaves_an_adapter_that_eval_scores(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, figures = tmp_path / "run", tmp_path / "figures.json"
    run(train.alpaca, options(base, output), monkeypatch)
    assert len(losses(output)) == 10  # 20 rows in batches of 4, twice
    assert any((output / "tensorboard").iterdir())
    printed = capsys.readouterr()
    assert "24 rows" in printed.err and "best validation loss" in printed.out

    score = ["--adapter", str(output), "--base", str(base), "--data", str(DATA), "--json", str(figures)]
    run(eval.alpaca, [*score, "--samples", "2", "--max-new-tokens", "4"], monkeypatch)
    scored = json.loads(figures.read_text())
    assert set(scored) == {"adapter_loss", "base_loss", "rows", "tokens"}
    assert scored["rows"] == 24 and scored["tokens"] > 100
    assert scored["adapter_loss"] < scored["base_loss"]
    assert capsys.readouterr().out.count("bare base  ") == 2

    run(eval.alpaca, [*score, "--samples", "0", "--validation-rows", "4"], monkeypatch)
    kept_back = json.loads(figures.read_text())
    trained = json.loads((output / "llama_adapter_config.json").read_text())["training"]
    assert kept_back["rows"] == 4
    assert round(kept_back["adapter_loss"], 4) == trained["validation_loss"]


def test_top_layers_are_trained_with_rates_that_fall_with_depth(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--method", "top-layers", "--option", "layer_decay=0.5", "--rate", "layer-1=1e-9")
    run(train.alpaca, options(base, tmp_path / "run", *more, "--max-steps", "2"), monkeypatch)
    kept = load_file(tmp_path / "run" / "adapter_model.safetensors")
    changes = [max(float(v.abs().max()) for k, v in kept.items() if f".{n}." in k) for n in (1, 2)]
    assert 0 < changes[0] < 1e-6 < 1e-3 < changes[1]
    with pytest.raises(UsageError, match="top-layers changes the base's own weights"):
        run(train.alpaca, options(base, tmp_path / "no", *more, "--quantize", "int8"), monkeypatch)
    assert not (tmp_path / "no").exists()


def test_eval_says_what_quantising_costs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llama_adapter.quantization.stored.cache_folder", lambda: tmp_path)
    score = ["--adapter", "none", "--base", str(base), "--data", str(DATA), "--samples", "0"]
    figures = {}
    for name in ("int8", "int4"):
        run(eval.alpaca, [*score, "--quantize", name, "--json", str(tmp_path / name)], monkeypatch)
        figures[name] = json.loads((tmp_path / name).read_text())
        difference = figures[name]["base_loss"] - figures[name]["base_loss_float32"]
        assert figures[name]["quantized_loss_difference"] == pytest.approx(difference)
        assert f"{name} to float32" in capsys.readouterr().out
    assert figures["int8"]["base_loss_float32"] == figures["int4"]["base_loss_float32"]
    losses = [abs(figures[name]["quantized_loss_difference"]) for name in figures]
    assert 0 < losses[0] < losses[1] < 1
    with pytest.raises(UsageError, match="no adapter to score"):
        run(eval.alpaca, score, monkeypatch)  # nothing to compare


@pytest.mark.parametrize("more", [[], ["--limit", "12", "--device", "cpu"]])
def test_the_commands_that_it_ends_with_work(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
) -> None:
    output = tmp_path / "my run"  # a name that has to be quoted
    run(train.alpaca, options(base, output, "--max-steps", "1", *more), monkeypatch)
    printed = capsys.readouterr().out
    ask, page, score = run_pasted(printed, monkeypatch)
    assert (ask[0], page[0], score[:2]) == ("ask", "demo", ["eval", "alpaca"])
    assert all(words[words.index("--adapter") + 1] == str(output) for words in (ask, page, score))
    assert ("--device" in ask) == ("--device" in score) == bool(more)
    assert ("--validation-rows" in score) == (not more)


def test_a_run_killed_at_any_moment_goes_on_with_the_same_losses(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(train.alpaca, options(base, whole), monkeypatch)
    victim = OwnProcess("train.alpaca", *options(base, cut))
    metrics = cut / "metrics.jsonl"
    for _ in range(6000):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 3:
            break
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    run(train.alpaca, options(base, cut, "--resume"), monkeypatch)
    assert "going on from step" in capsys.readouterr().err
    assert losses(cut) == losses(whole)
    final = "adapter_model.safetensors"
    assert (cut / final).read_bytes() == (whole / final).read_bytes()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--batch-size", "0"], "batch-size is 0"),
        (["--limit", "0"], "--limit"),
        (["--limit", "3"], "cannot be split"),
        (["--learning-rate", "nan"], "learning-rate is nan"),
        (["--seed", "-1"], "seed of 0 to"),
        (["--seed", str(2**32)], "seed of 0 to"),
        (["--mean-over", "words"], "mean-over is 'words'; expected tokens or rows"),
        (["--adapted-layers", "9"], "adapted layers: 9 given"),
        (["--template", "poem"], "no template 'poem'"),
        (["--data", "nowhere.json"], "nowhere.json: no such file"),
        (["--base", "./nowhere"], "nowhere"),
        (["--resume"], "no run to resume"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(
    more: list[str], told: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=told) as error:
        run(train.alpaca, options(base, tmp_path / "run", *more), monkeypatch)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_data_that_changed_under_a_resume_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text(DATA.read_text())
    run(train.alpaca, options(base, output, "--data", str(data)), monkeypatch)
    data.write_text(DATA.read_text().replace("Oslo", "Bergen"))
    with pytest.raises(UsageError, match="fingerprint"):
        run(train.alpaca, options(base, output, "--data", str(data), "--resume"), monkeypatch)


@pytest.mark.parametrize("module", ["train.alpaca", "eval.alpaca"])
def test_a_mistyped_option_is_told_in_one_line(module: str) -> None:
    command = [sys.executable, "-m", module]
    wrong = subprocess.run(
        [*command, "--nonsense"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and wrong.stderr.startswith("error: ")


def test_ctrl_c_ends_a_run_with_130(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    training = OwnProcess("train.alpaca", *options(base, output, "--epochs", "500"))
    for _ in range(6000):
        if (output / "metrics.jsonl").exists() and (output / "metrics.jsonl").stat().st_size:
            break
        time.sleep(0.01)
    training.send_signal(signal.SIGINT)
    assert training.wait() == 130
    assert "--resume goes on from there" in training.stderr and "Traceback" not in training.stderr


# --- what the screen and run.json say of the data -----------------------------------------------------------

QUICK = ("--epochs", "1", "--max-steps", "1", "--warmup-epochs", "0")


def test_rows_that_are_skipped_dropped_or_cut_are_told_and_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"Say {n}", "output": "yes", "id": n} for n in range(12)]
    rows += [{"instruction": "long " * 600 + str(n), "output": "x"} for n in range(30)]
    rows += [{"instruction": "Say nothing.", "output": ""}]
    data, output = tmp_path / "rows.json", tmp_path / "run"
    data.write_text(json.dumps(rows))
    more = ("--data", str(data), "--max-length", "256", *QUICK)
    run(train.alpaca, options(base, output, *more), monkeypatch)
    said = capsys.readouterr().err
    assert f"{data}: 43 rows, 1 skipped (empty answer), columns not read: id" in said
    assert "dropped (no answer within 256 tokens)" in said and "warning: of 38 rows" in said
    kept = json.loads((output / "run.json").read_text())["data"]
    assert kept["read"] == {"rows": 43, "skipped": {"empty answer": 1}, "unanswered": 0} | {
        "unread": ["id"],
        "other_splits": {},
    }
    assert kept["train"]["dropped"] + kept["validation"]["dropped"] == 30
    assert kept["train"]["rows"] - kept["train"]["dropped"] == kept["train_rows"]

    score = ["--adapter", str(output), "--base", str(base), "--data", str(data), "--max-length", "256"]
    run(eval.alpaca, [*score, "--samples", "0"], monkeypatch)
    assert "30 of 42 dropped (no answer within 256 tokens)" in capsys.readouterr().err


def test_rows_of_another_split_are_neither_trained_on_nor_scored(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"instruction": f"Say {split} {n}", "output": "yes", "split": split}
        for split in ("train", "test")
        for n in range(8)
    ]
    data, output, figures = tmp_path / "rows.json", tmp_path / "run", tmp_path / "figures.json"
    data.write_text(json.dumps(rows))
    run(train.alpaca, options(base, output, "--data", str(data), *QUICK), monkeypatch)
    assert f"{data}: 8 rows, 8 rows of split test left out" in capsys.readouterr().err
    kept = json.loads((output / "run.json").read_text())["data"]
    assert (kept["split"], kept["train_rows"], kept["validation_rows"]) == ("train", 4, 4)
    score = ["--adapter", str(output), "--base", str(base), "--data", str(data), "--json", str(figures)]
    for more, expected in (([], 8), (["--validation-rows", "4"], 4), (["--split", "train"], 8)):
        run(eval.alpaca, [*score, "--samples", "0", *more], monkeypatch)
        assert json.loads(figures.read_text())["rows"] == expected


def test_the_day_that_a_chat_template_writes_is_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the config, for answering, and over a resume on another day."""
    import datetime

    from llama_adapter.model import LlamaAdapter

    class Earlier(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2025, 2, 3)

    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = "Today: {{ strftime_now('%d %b %Y') }}\n" + str(tokenizer.chat_template)
    dated = build_tiny_base(tmp_path / "base", tokenizer)
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(datetime, "date", Earlier)
        run(train.alpaca, options(dated, output, "--template", "chat", *QUICK), monkeypatch)
    before = json.loads((output / "run.json").read_text())
    assert before["adapter"]["template_date"] == "2025-02-03"
    run(train.alpaca, options(dated, output, "--template", "chat", *QUICK, "--resume"), monkeypatch)

    model = LlamaAdapter.from_pretrained(str(output), base=str(dated))
    assert "03 Feb 2025" in tokenizer.decode(model.encode_question("Hi"))
    assert "03 Feb 2025" not in tokenizer.decode(model.encode_question("Hi", adapter="none"))
    further = tmp_path / "further"
    run(train.alpaca, options(dated, further, "--start-from", str(output), *QUICK), monkeypatch)
    assert json.loads((further / "run.json").read_text())["adapter"]["template_date"] == "2025-02-03"

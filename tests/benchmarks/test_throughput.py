"""benchmarks.throughput on a tiny base: it runs, prints its tables and writes the figures it promises."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import examining, measuring, quantized, throughput, ways_to_train
from benchmarks.gpu import LLAMA_7B, gpu, work_of
from benchmarks.large import build_random_base, large
from llama_adapter.common.errors import UsageError
from llama_adapter.data.examples import Example
from llama_adapter.methods.config import ScienceQAConfig
from llama_adapter.model import LlamaAdapter
from llama_adapter.packing.losses import accumulate_gradient
from tests.conftest import CHECKOUT
from tests.tiny import build_tiny_tokenizer
from tests.tiny_gguf import build_tiny_gguf
from tests.tiny_models import build_tiny_base, build_tiny_decoder, build_tiny_model

DECODING = {"decode_vs_base", "forward_vs_base", "tokens_per_second"}
MEMORY = {"training_memory_mb", "training_memory_vs_peft", "checkpointed_memory_vs_peft"}
DEMO = {"demo_seconds_to_page", "demo_seconds_to_answer", "demo_memory_mb"}
SERVING = {"serving_ratio", "tokens_per_second_of_one", "tokens_per_second_of_8", "engine_vs_alone"}
TRAINING = {"rows_per_second", "training_vs_peft", "training_vs_pad512", "loss_difference"}
TRAINING |= {"training_vs_peft_processor", "training_vs_pad512_processor"} | MEMORY


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


def measure(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> dict[str, float]:
    figures = folder / "figures.json"
    monkeypatch.setattr(sys, "argv", ["throughput", *options, "--json", str(figures)])
    throughput.main()
    written: dict[str, float] = json.loads(figures.read_text())
    return written


def test_all_suites_and_peers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--pairs", "2", "--new-tokens", "3", "--steps", "4", "--batch-size", "2"]
    figures = measure(monkeypatch, tmp_path, "--peers", "--base", str(base), *small)
    assert set(figures) == DECODING | TRAINING | SERVING | DEMO
    assert 0 < figures["demo_seconds_to_page"] < figures["demo_seconds_to_answer"]
    assert 100 < figures["demo_memory_mb"] < 5000
    assert all(0 < figures[name] < 1000 for name in DECODING - {"tokens_per_second"})
    assert all(figures[name] > 0 for name in SERVING)
    assert figures["serving_ratio"] < 50
    assert figures["loss_difference"] < 1e-4, "PEFT must be given the same to do"
    assert all(figures[name] > 0 for name in MEMORY)
    printed = capsys.readouterr().out
    for line in (
        "peak memory above the frozen weights",
        "gradient checkpointing",
        "decoding, a token",
        "to the first token",
        "forward pass",
        "generate()",
        "a training step",
        "8 clients",
    ):
        assert line in printed
    assert printed.count("PEFT") == 4
    rates = re.search(r"PEFT, padded +([0-9.]+) +([0-9.]+) ", printed)
    assert rates, "rows a second of all rounds, as the ratio is"
    assert figures["training_vs_peft"] == pytest.approx(float(rates[2]) / float(rates[1]), rel=0.01)


def test_quantised_decoding_is_measured_beside_float32(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llama_adapter.quantization.stored.cache_folder", lambda: tmp_path)
    monkeypatch.setattr(quantized, "READ_BYTES", 1 << 20)
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    options = ["--suite", "decoding", "--quantize", "int8", "--pairs", "2", "--new-tokens", "3"]
    figures = measure(monkeypatch, tmp_path, "--base", str(base), *options)
    own = {"int8_vs_float32", "bandwidth_share", "seconds_around_kernels", "peer_tokens_per_second"}
    assert set(figures) == DECODING | own
    assert figures["int8_vs_float32"] > 0 and figures["bandwidth_share"] > 0
    assert figures["seconds_around_kernels"] > 0
    assert figures["peer_tokens_per_second"] is None
    assert "peer left out" in capsys.readouterr().out


def test_a_gguf_file_is_measured_beside_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantized, "READ_BYTES", 1 << 20)
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    tokenizer = build_tiny_tokenizer()
    build_tiny_gguf(tmp_path / "tiny.gguf", vocab_size=len(tokenizer), max_position_embeddings=1024)
    tokenizer.save_pretrained(tmp_path)
    options = ["--suite", "decoding", "--pairs", "1", "--new-tokens", "2"]
    figures = measure(monkeypatch, tmp_path, "--base", str(tmp_path / "tiny.gguf"), *options)
    own = {"gguf_vs_float32", "gguf_memory_vs_file", "bandwidth_share", "peer_tokens_per_second"}
    own |= {"seconds_around_kernels"}
    assert set(figures) == DECODING | own
    assert 0.9 < figures["gguf_memory_vs_file"] <= 1.05
    assert "times its file" in capsys.readouterr().out


@pytest.mark.slow
def test_training_on_a_quantised_base_is_measured_beside_float32(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ["--suite", "training", "--quantize", "int8", "--base", str(base)]
    figures = measure(monkeypatch, tmp_path, *options, "--steps", "2", "--batch-size", "2")
    own = {"training_vs_float32", "training_vs_float32_processor", "frozen_memory_vs_float32"}
    assert set(figures) == {"rows_per_second", *own}
    assert 0.26 < figures["frozen_memory_vs_float32"] < 0.33
    with pytest.raises(UsageError, match="leave --quantize or --peers out"):
        measure(monkeypatch, tmp_path, *options, "--peers")


def test_a_large_base_is_built_in_int4_and_answers(capsys: pytest.CaptureFixture[str]) -> None:
    shape = {**LLAMA_7B, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    shape |= {"vocab_size": 100, "num_attention_heads": 4, "num_key_value_heads": 4}
    arguments = argparse.Namespace(quantize="int4", new_tokens=3)
    figures = large(build_tiny_model(), arguments, shape=shape)
    assert figures["large_tokens_per_second"] > 0 and figures["large_peak_gb"] > 0
    assert "random weights in int4" in capsys.readouterr().out
    decoder = build_random_base(shape, "int4", torch.Generator())
    assert not any(value.is_meta for value in decoder.state_dict().values())
    assert 0.5 < decoder.lm_head.weight.std() * 8 < 2
    with pytest.raises(UsageError, match="takes --quantize int4"):
        large(build_tiny_model(), argparse.Namespace(quantize=None), shape=shape)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_other_methods_are_trained_beside_pefts_own(
    method: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--suite", "training", "--peers", "--method", method, "--base", str(base)]
    figures = measure(monkeypatch, tmp_path, *options, "--steps", "3", "--batch-size", "2")
    own = {
        f"{method}_{name}" for name in ("vs_peft", "vs_peft_processor", "memory_vs_peft", "loss_difference")
    }
    assert set(figures) == {"rows_per_second", *own}
    assert all(figures[name] > 0 for name in own)
    assert figures[f"{method}_loss_difference"] < 1e-4, "PEFT must be given the same to do"


def test_the_gpu_suite_runs_on_a_tiny_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = build_tiny_tokenizer()
    lender = build_tiny_model(tokenizer=tokenizer, max_position_embeddings=1024)
    shape = {**LLAMA_7B, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    shape |= {"vocab_size": 100, "num_attention_heads": 4, "num_key_value_heads": 4}
    monkeypatch.setattr("benchmarks.gpu.BATCH", 4)
    arguments = argparse.Namespace(data=None, steps=2)
    figures = gpu(lender, arguments, shape=shape, adapted_layers=3, product=64)
    assert set(figures) == {"gpu_rows_per_second", "gpu_floor_share", "gpu_hours"}
    assert figures["gpu_hours"] == pytest.approx(5 * 52_002 / figures["gpu_rows_per_second"] / 3600)
    printed = capsys.readouterr().out
    assert "4 rows a step" in printed and "the floor" in printed and "MFU left out: CPU" in printed


def test_the_work_of_a_step_is_counted_from_the_shape() -> None:
    """Against a count of every product that the step really makes."""
    decoder = build_tiny_decoder(num_hidden_layers=4)
    model = LlamaAdapter(decoder, base="tiny")
    model.new_adapter("trained", prompt_length=3, adapted_layers=3)
    rows = [Example([5, 6, 7, 8], [-100, -100, 7, 8], (), 1), Example([9] * 7, [-100] + [9] * 6, (), 2)]
    work = work_of(rows, decoder, 3)
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48
    assert work.by_rule == 4 * 9 * (4 * layer + 64 * 32)
    assert work.needed == 2 * 9 * layer * 7 + 4 * 8 * 64 * 32
    with FlopCounterMode(display=False) as counted:
        accumulate_gradient(model, rows, device=decoder.device, max_tokens=99)
    # The prompts' projections and attention come on top; the lowest adapted layer's inputs need no gradient.
    assert counted.get_flop_counts()["Global"][torch.ops.aten.mm] == pytest.approx(work.needed, rel=0.35)


def test_the_rows_may_come_from_a_file(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(CHECKOUT / "examples" / "instructions.jsonl")
    options = ["--suite", "training", "--base", str(base), "--data", data, "--batch-size", "4"]
    figures = measure(monkeypatch, tmp_path, *options, "--steps", "2")
    assert set(figures) == {"rows_per_second"}
    assert "instructions.jsonl" in capsys.readouterr().out
    with pytest.raises(UsageError, match="24 rows: 36 are needed"):
        measure(monkeypatch, tmp_path, *options, "--steps", "8")


def test_without_a_first_token_to_take_off_there_is_nothing_to_measure(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="new-tokens is 1"):
        measure(monkeypatch, tmp_path, "--base", str(base), "--new-tokens", "1")


def test_the_suite_of_scienceqa_takes_an_adapter_that_was_trained_on_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = LlamaAdapter.from_base(str(base))
    adapter = model.new_adapter("tiny", template="scienceqa", prompt_length=2, seed=0)
    torch.nn.init.ones_(adapter.prompts.gates)
    model.save_pretrained(tmp_path / "other")
    adapter.config = replace(adapter.config, scienceqa=ScienceQAConfig("QCM-O"))
    model.save_pretrained(tmp_path / "trained")
    monkeypatch.setattr(examining, "ROUNDS", 1)
    monkeypatch.setattr(examining, "PROBLEMS", 4)
    options = ["--suite", "scienceqa", "--adapter"]
    assert measure(monkeypatch, tmp_path, *options, str(tmp_path / "other")) == {}
    assert "left out: the adapter was not trained on ScienceQA" in capsys.readouterr().out
    figures = measure(monkeypatch, tmp_path, *options, str(tmp_path / "trained"))
    assert set(figures) == {f"scienceqa_{way}" for way in ("generate", "letter", "option")}
    assert all(value > 0 for value in figures.values())


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []

    def contender(name: str, number: int) -> int:
        calls.append(name)
        return number

    results = measuring.alternate({name: lambda n, name=name: contender(name, n) for name in "abc"}, rounds=3)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert results == {"a": [1, 2, 3], "b": [1, 2, 3], "c": [1, 2, 3]}


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    assert measuring.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0


def test_rows_are_padded_to_the_longest_or_to_a_length() -> None:
    from llama_adapter.data.examples import Example

    batch = [Example([5, 6, 7], [-100, 6, 7], (), 1), Example([8], [8], (), 2)]
    inputs = ways_to_train.pad(batch, None, torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert inputs["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    longer = ways_to_train.pad(batch, 4, torch.device("cpu"))
    assert all(longer[name][:, :3].equal(inputs[name]) and longer[name].shape == (2, 4) for name in inputs)

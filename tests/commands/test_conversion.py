"""llama-adapter convert to and from PEFT's folders, average and merge, on a tiny base in a weights folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_adapter.__main__ import main
from llama_adapter.methods.checkpoint import load_adapter, read_config, save_adapter
from llama_adapter.model import LlamaAdapter
from tests.tiny_models import build_tiny_base

TOKENS = torch.tensor([[5, 9, 33, 7, 21, 2]])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder with a base, an adapter of LoRA and one of prompts."""
    folder = tmp_path_factory.mktemp("weights")
    build_tiny_base(folder / "base")
    model = LlamaAdapter.from_base("base", weights=folder, device="cpu")
    for method in ("lora", "prompts"):
        adapter = model.new_adapter(method, method=method, adapted_layers=2, seed=0)
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
        model.save_pretrained(folder / method, adapter=method)
    return folder


@pytest.fixture(autouse=True)
def here(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ADAPTER_WEIGHTS", str(weights))


def invoke(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["llama-adapter", *words])
    return main()


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


def test_an_adapter_goes_out_to_peft_and_comes_back(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    assert invoke(monkeypatch, "convert", "lora", str(theirs), "--to", "peft") == 0
    assert capsys.readouterr().out == f"{theirs}\n"
    expected = logits_of(LlamaAdapter.from_pretrained("lora", device="cpu"))
    base = AutoModelForCausalLM.from_pretrained(weights / "base")
    assert torch.allclose(logits_of(PeftModel.from_pretrained(base, theirs)), expected, atol=1e-4)
    assert invoke(monkeypatch, "convert", str(theirs), str(back)) == 0
    assert torch.allclose(logits_of(LlamaAdapter.from_pretrained(back, device="cpu")), expected, atol=1e-4)
    assert (read_config(back).base, read_config(back).template) == ("base", "chat")
    capsys.readouterr()
    assert invoke(monkeypatch, "info", str(theirs)) == 0
    assert "lora in the top L = 2 layers" in capsys.readouterr().out


def test_an_adapter_of_peft_answers(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(weights / "base")
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    capsys.readouterr()  # removes the progress bar of loading the base here
    options = ["--adapter", str(tmp_path / "theirs"), "--max-new-tokens", "4", "--temperature", "0"]
    assert invoke(monkeypatch, "ask", "Hi", *options) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() and shown.err == "(cut off at the length limit, after 4 tokens)\n"


def test_a_folder_in_float16_is_half_as_large(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "half"
    assert invoke(monkeypatch, "convert", "lora", str(folder), "--dtype", "float16") == 0
    before, after = load_adapter(weights / "lora").state_dict(), load_adapter(folder).state_dict()
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32
        torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-6)
    large, small = (
        (place / "adapter_model.safetensors").stat().st_size for place in (weights / "lora", folder)
    )
    assert small < 0.75 * large


def test_average_writes_the_mean(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, other, mean = load_adapter(weights / "lora"), tmp_path / "other", tmp_path / "mean"
    for parameter in lora.parameters():
        parameter.data.add_(1.0)
    save_adapter(lora, other)
    words = ["average", "lora", str(other), "--output", str(mean), "--shares", "1", "3"]
    assert invoke(monkeypatch, *words, "--dtype", "float16") == 0
    assert capsys.readouterr().out == f"{mean}\n"
    before, after = load_adapter(weights / "lora").state_dict(), load_adapter(mean).state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value + 0.75, rtol=1e-3, atol=1e-3)
    LlamaAdapter.from_pretrained(mean, device="cpu")


def test_merge_writes_a_plain_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged"
    assert invoke(monkeypatch, "merge", "lora", str(merged), "--device", "cpu") == 0
    shown = capsys.readouterr()
    assert shown.out == f"{merged}\n" and "template alpaca" in shown.err
    expected = logits_of(LlamaAdapter.from_pretrained("lora", device="cpu"))
    assert torch.allclose(logits_of(AutoModelForCausalLM.from_pretrained(merged)), expected, atol=1e-4)
    assert AutoTokenizer.from_pretrained(merged).chat_template
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    # It can be adapted like any other base.
    LlamaAdapter.from_base(str(merged), device="cpu").new_adapter("more")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merge", "prompts", "OUT"], "prompts cannot be merged into weights"),
        (["merge", "none", "OUT"], "there is no adapter to merge"),
        (["merge", "lora", "OUT", "--quantize", "int8"], "a quantised base can't be merged into"),
        (["merge", "lora", "THERE"], "is there already"),
        (["average", "lora", "--output", "OUT"], "a mean of 1 given; name two or more adapters"),
        (["average", "lora", "lora", "--output", "OUT"], "an adapter is given twice"),
        (["average", "lora", "prompts", "--output", "OUT"], "the first has lora, the second prompts"),
        (["average", "lora", "prompts", "--output", "THERE"], "is there already"),
        (["average", "lora", "nothing", "--output", "OUT"], "no adapter 'nothing'"),
        (["convert", "prompts", "OUT", "--to", "peft"], "this adapter's heads have gates of their own"),
        (["convert", "lora", "OUT.pth"], "the authors' layout"),
        (
            ["convert", "lora", "OUT", "--to", "peft", "--dtype", "float16"],
            "--dtype goes with --to llama-adapter",
        ),
        (
            ["convert", "lora", "OUT", "--to", "peft", "--base", "base"],
            "--base goes with a .pth or",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    words: list[str],
    said: str,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"OUT": tmp_path / "out", "OUT.pth": tmp_path / "out.pth", "THERE": weights / "lora"}
    assert invoke(monkeypatch, *(str(places.get(word, word)) for word in words)) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.startswith("error: ") and shown.count("\n") == 1
    assert not list(tmp_path.iterdir())

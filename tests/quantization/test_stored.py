"""Quantised decoders on disk: what is read is what was written, and is used only if it fits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llama_adapter.methods import decoder as loading
from llama_adapter.methods.decoder import load_decoder
from llama_adapter.quantization import stored
from llama_adapter.quantization.formats import FORMATS
from llama_adapter.quantization.stored import load_stored, stored_file
from tests.tiny_models import build_tiny_decoder, random_rows

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base's folder in bfloat16, and an empty cache folder for its quantised weights."""
    monkeypatch.setattr(stored, "cache_folder", lambda: tmp_path / "cache")
    folder = tmp_path / "base"
    build_tiny_decoder("qwen2", torch.bfloat16, tie_word_embeddings=request.param).save_pretrained(folder)
    return folder


def kept(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache" / "quantized").glob("*"))


@pytest.mark.parametrize("name", FORMATS)
def test_the_second_start_reads_what_the_first_has_made(
    base: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_decoder(str(base), device=CPU, dtype=torch.float32, quantize=name)
    (file,) = kept(base)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # the float weights are not read
    second = load_decoder(str(base), device=CPU, dtype=torch.float32, quantize=name)
    ids = random_rows(9)[0][None]
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert second.dtype == torch.float32
    for decoder in (first, second):
        tied = decoder.lm_head.quantized is decoder.get_input_embeddings().quantized
        assert tied == decoder.config.tie_word_embeddings
    assert first.generation_config.to_dict() == second.generation_config.to_dict()
    assert kept(base) == [file]


def test_another_version_of_the_base_takes_its_place(base: Path) -> None:
    load_decoder(str(base), device=CPU, dtype=torch.float32, quantize="int8")
    (old,) = kept(base)
    build_tiny_decoder("qwen2", torch.bfloat16, seed=1).save_pretrained(base)
    os.utime(base / "model.safetensors", ns=(1, 1))
    load_decoder(str(base), device=CPU, dtype=torch.float32, quantize="int8")
    (new,) = kept(base)
    assert old != new


def test_another_base_of_the_same_name_keeps_its_own(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / base.name
    shutil.copytree(base, other)
    load_decoder(str(base), device=CPU, dtype=torch.float32, quantize="int8")
    load_decoder(str(other), device=CPU, dtype=torch.float32, quantize="int8")
    assert len(kept(base)) == 2
    shutil.rmtree(other)
    build_tiny_decoder("qwen2", torch.bfloat16, seed=1).save_pretrained(base)
    os.utime(base / "model.safetensors", ns=(1, 1))
    load_decoder(str(base), device=CPU, dtype=torch.float32, quantize="int8")
    assert len(kept(base)) == 1  # the other base is gone, and so is this one's earlier version


@pytest.mark.parametrize("damage", ["cut", "empty", "another's"])
def test_a_damaged_file_is_made_anew(base: Path, damage: str, tmp_path: Path) -> None:
    ids = random_rows(9)[0][None]
    expected = load_decoder(str(base), device=CPU, dtype=torch.float32, quantize="int8")(ids).logits
    (file,) = kept(base)
    if damage == "another's":
        small = build_tiny_decoder("qwen2", num_hidden_layers=1)
        loading.quantize_decoder(small, "int8")
        stored.store(small, file, str(base))
    else:
        file.write_bytes(file.read_bytes()[:1000] if damage == "cut" else b"")
    config = AutoConfig.from_pretrained(base)
    assert stored_file(str(base), config, "int8") == file
    assert load_stored(str(base), config, file) is None
    again = load_decoder(str(base), device=CPU, dtype=torch.float32, quantize="int8")
    assert torch.equal(again(ids).logits, expected)
    assert load_stored(str(base), config, file) is not None


def test_a_place_that_cannot_be_written_is_done_without(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(stored, "cache_folder", lambda: tmp_path / "file")
    decoder = load_decoder(str(base), device=CPU, dtype=torch.float32, quantize="int8")
    assert decoder(random_rows(4)[0][None]).logits.isfinite().all()
    assert "can't be stored" in capsys.readouterr().err


def test_a_hub_base_is_told_by_its_commit() -> None:
    config = AutoConfig.for_model("llama")
    assert stored_file("owner/name", config, "int8") is None
    files = set()
    for commit in ("a" * 40, "b" * 40):
        config._commit_hash = commit
        files.add(stored_file("owner/name", config, "int8"))
    assert len(files) == 2 and None not in files

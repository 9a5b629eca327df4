"""GGUF files kept as they are: the same decoder as when transformers dequantises it, in fewer bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from llama_adapter.common import gguf_reading
from llama_adapter.common.errors import UsageError
from llama_adapter.common.gguf_reading import gguf_read_once, open_gguf
from llama_adapter.methods import decoder as loading
from llama_adapter.methods.decoder import load_decoder, load_shape, load_structure
from llama_adapter.quantization import stored
from llama_adapter.quantization.linear import QuantizedLinear, format_of, kept_bytes
from tests.tiny import build_tiny_tokenizer
from tests.tiny_gguf import build_tiny_gguf
from tests.tiny_models import random_rows

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The path for a test's file."""
    return tmp_path / "tiny.gguf"


def load_dense(file: Path) -> PreTrainedModel:
    """The decoder that transformers makes of the file by dequantising."""
    dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    return dense


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("llama", False), ("qwen2", False), ("qwen3", True)]
)
def test_it_is_the_decoder_that_transformers_dequantises(file: Path, family: str, tied: bool) -> None:
    # transformers assumes heads of width 128 for Qwen3, whatever the file says.
    build_tiny_gguf(file, family, tie_word_embeddings=tied, head_dim=128 if family == "qwen3" else 64)
    kept = load_decoder(str(file), device=CPU, dtype=torch.float32)
    dense = load_dense(file)
    for name, weight in dense.named_parameters():
        module, _, leaf = name.rpartition(".")
        assert torch.equal(getattr(kept.get_submodule(module), leaf), weight), name
    ids = random_rows(9)[0][None]
    torch.testing.assert_close(kept(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert kept.config.tie_word_embeddings == tied
    assert kept.generation_config.eos_token_id == 2
    assert not any(parameter.requires_grad for parameter in kept.parameters())


def test_it_takes_no_more_memory_than_the_file(file: Path) -> None:
    build_tiny_gguf(file)
    kept = load_decoder(str(file), device=CPU, dtype=torch.float32)
    assert kept_bytes(kept) <= 1.05 * file.stat().st_size
    assert kept_bytes(kept) > 0.9 * file.stat().st_size  # all weights are counted
    assert format_of(kept) == "gguf"


def test_a_folder_with_one_file_is_its_base(file: Path) -> None:
    build_tiny_gguf(file)
    kept = load_decoder(str(file.parent), device=CPU, dtype=torch.bfloat16)
    assert kept.dtype == torch.bfloat16 and format_of(kept) == "gguf"
    assert load_shape(str(file.parent)).hidden_size == 256
    assert load_structure(str(file)).device.type == "meta"
    file.with_name("other.gguf").touch()
    with pytest.raises(
        UsageError, match=r"several GGUF files \(other.gguf, tiny.gguf\); give the path of one"
    ):
        load_decoder(str(file.parent), device=CPU, dtype=torch.float32)
    named = load_decoder(str(file.parent), device=CPU, dtype=torch.float32, gguf_file="tiny.gguf")
    assert format_of(named) == "gguf"


def test_its_tokenizer_is_taken_from_the_files_beside_it(file: Path) -> None:
    build_tiny_gguf(file, vocab_size=320)
    build_tiny_tokenizer().save_pretrained(file.parent)
    assert loading.load_tokenizer(str(file)).eos_token == "<|im_end|>"


def test_a_file_is_read_once_for_a_decoder_and_its_tokenizer(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tiny_gguf(file, vocab_size=320)
    opened: list[Path] = []
    reader = gguf.GGUFReader
    read = gguf_reading.PlainReader.__init__

    def note(self: Any, path: Path) -> None:
        opened.append(path)
        read(self, path)

    monkeypatch.setattr(gguf_reading.PlainReader, "__init__", note)
    with gguf_read_once():
        load_dense(file)
        load_decoder(str(file), device=CPU, dtype=torch.float32)
    assert opened == [file]
    load_decoder(str(file), device=CPU, dtype=torch.float32)
    assert opened == [file] * 2, "nothing is kept after a load"
    assert gguf.GGUFReader is reader


def test_our_reader_reads_what_gguf_py_reads(file: Path) -> None:
    build_tiny_gguf(file, "qwen2")
    ours, theirs = open_gguf(file), gguf.GGUFReader(file)
    assert ours.fields.keys() == theirs.fields.keys()
    for name, field in theirs.fields.items():
        assert ours.fields[name].contents() == field.contents(), name
    assert len(ours.tensors) == len(theirs.tensors) > 0
    for own, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert own.name == other.name and own.tensor_type == other.tensor_type
        assert (own.data == other.data).all(), own.name


def test_it_is_quantised_anew_where_that_is_asked_for(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(stored, "cache_folder", lambda: tmp_path / "cache")
    build_tiny_gguf(file, kinds=("Q4_1",))
    first, second = (
        load_decoder(str(file), device=CPU, dtype=torch.float32, quantize="int8") for _ in range(2)
    )
    assert format_of(first) == format_of(second) == "int8"
    assert len(list((tmp_path / "cache" / "quantized").iterdir())) == 1
    ids = random_rows(9)[0][None]
    assert torch.equal(first(ids).logits, second(ids).logits)


def test_a_transformers_config_dequantises_it(file: Path) -> None:
    build_tiny_gguf(file)
    options = {"quantization_config": GgufConfig(dequantize=True)}
    dense = load_decoder(str(file), device=CPU, dtype=torch.float32, **options)
    assert format_of(dense) is None and not any(isinstance(m, QuantizedLinear) for m in dense.modules())


def test_where_it_cannot_stay_as_it_is_a_line_says_so(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_tiny_gguf(file)
    decoder = load_decoder(str(file), device=CPU, dtype=torch.bfloat16, device_map="cpu")
    assert format_of(decoder) is None and decoder.dtype == torch.bfloat16
    assert "its weights become bfloat16; blocks of GGUF are kept on a CPU only" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["Q2_K", "IQ4_XS"])
def test_another_kind_is_refused_by_its_name(file: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny_gguf(file, kinds=("F32", kind))
    with pytest.raises(UsageError, match=rf"attn_q.weight has blocks of the kind {kind}.*--quantize int8"):
        load_decoder(str(file), device=CPU, dtype=torch.float32)


def test_matrices_in_floats_stay_floats(file: Path) -> None:
    build_tiny_gguf(file, kinds=("F32", "Q8_0"))
    kept = load_decoder(str(file), device=CPU, dtype=torch.float32)
    dense = load_dense(file)
    ids = random_rows(9)[0][None]
    torch.testing.assert_close(kept(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_damaged_file_is_one_line(file: Path) -> None:
    build_tiny_gguf(file)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UsageError, match=re.escape(str(file))):
        load_decoder(str(file), device=CPU, dtype=torch.float32)


def test_a_file_that_leaves_a_hole_is_refused(file: Path) -> None:
    build_tiny_gguf(file, "qwen2")
    file.write_bytes(file.read_bytes().replace(b"blk.0.attn_q.bias", b"blk.0.attn_x.bias"))
    with pytest.raises(
        UsageError, match=r"does not fit a qwen2 decoder: model.layers.0.self_attn.q_proj.bias"
    ):
        load_decoder(str(file), device=CPU, dtype=torch.float32)


def test_a_tensor_without_a_place_is_named(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_tiny_gguf(file, left_over="rope.freqs.weight")
    load_decoder(str(file), device=CPU, dtype=torch.float32)
    assert "tiny.gguf: not used: rope_freqs.weight" in capsys.readouterr().err

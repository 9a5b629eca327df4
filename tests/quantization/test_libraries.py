"""Quantised weights of other libraries: what is asked of them, and what is refused in a line."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.utils.quantization_config import QuantizationMethod

from llama_adapter.common.errors import UsageError
from llama_adapter.methods import decoder as loading
from llama_adapter.methods.attention import attention_form
from llama_adapter.methods.decoder import load_decoder
from llama_adapter.methods.prepared import attention_layers
from llama_adapter.model import LlamaAdapter
from llama_adapter.quantization import libraries, stored
from llama_adapter.quantization.libraries import library_config, precision_of
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import build_tiny_decoder, random_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder of a tiny base, with an empty place for what is quantised from it."""
    monkeypatch.setattr(stored, "cache_folder", lambda: tmp_path / "cache")
    build_tiny_decoder().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def precision(base: str, quantize: str | None, **options: Any) -> str | None:
    return precision_of(load_decoder(base, device=CPU, dtype=torch.float32, quantize=quantize, **options))


def test_auto_is_int8_where_our_kernels_run(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision(base, "auto") == "int8"
    assert precision(base, "none") is None
    assert precision(base, None) is None
    assert precision(base, "auto", device_map={"": "cpu"}) is None
    monkeypatch.setattr(loading, "find_compiler", lambda: None)
    assert precision(base, "auto") is None


def test_what_cannot_be_quantised_so_is_refused(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'int9' is not known; choose one of int8, int4, nf4, auto, none"):
        precision(base, "int9")
    with pytest.raises(UsageError, match="give one of them"):
        precision(base, "int8", quantization_config={"load_in_8bit": True})
    with pytest.raises(UsageError, match="nf4 does not run on 'mps'; choose device cpu or cuda"):
        library_config("nf4", torch.device("mps"), torch.float32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="nf4 needs bitsandbytes here; pip install"):
        precision(base, "nf4")


def test_nf4_computes_on_a_cpu_and_gradients_go_through_it(base: str) -> None:
    """As the matrices do that it multiplies by; also after the trials have used it in evaluation mode."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    build_tiny_tokenizer().save_pretrained(base)
    nf4 = LlamaAdapter.from_base(base, device="cpu", dtype="float32", quantize="nf4")
    assert precision_of(nf4.decoder) == "nf4"
    plain, kept = (LlamaAdapter.from_base(base, device="cpu", dtype="float32") for _ in range(2))
    for name, module in nf4.decoder.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module(torch.eye(module.in_features)).t()
            plain.decoder.get_submodule(name).weight.data.copy_(weight)
    ids = random_rows(9)[0][None]
    results = []
    for model in (nf4, plain, kept):
        adapter = model.new_adapter("mine", adapted_layers=2, seed=1)
        torch.nn.init.normal_(adapter.prompts.gates, generator=torch.Generator().manual_seed(1))
        logits = model(ids, adapter="mine").logits
        logits.square().sum().backward()
        results.append((logits.detach(), adapter.prompts.embeddings.grad))
    for found, expected, unrounded in zip(*results, strict=True):
        assert found is not None and expected is not None and unrounded is not None
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
        assert (found - unrounded).abs().max() > 1e-2 * expected.abs().max()


def test_nf4_weights_that_were_packed_are_refused(base: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        pytest.skip("weights are packed only where a CPU has AVX-512 with bfloat16")
    build_tiny_decoder(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(base)
    decoder = AutoModelForCausalLM.from_pretrained(
        base, device_map="cpu", quantization_config=BitsAndBytesConfig(**SETTINGS["nf4"])
    )
    with torch.no_grad():
        decoder(random_rows(9)[0][None])
    with pytest.raises(UsageError, match=r"q_proj: its 4-bit weights were packed .* hand it over unused"):
        LlamaAdapter(decoder, base="tiny-base")


SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
}


def load_in_bfloat16(base: str, name: str) -> LlamaAdapter:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(**SETTINGS[name])
    return LlamaAdapter.from_base(base, device="cpu", dtype="bfloat16", quantization_config=config)


@pytest.mark.parametrize("name", SETTINGS)
def test_bitsandbytes_in_bfloat16_can_be_adapted_and_packed(base: str, name: str) -> None:
    build_tiny_tokenizer().save_pretrained(base)
    model = load_in_bfloat16(base, name)
    assert all(attention_form(layer).unpackable is None for layer in attention_layers(model.decoder))
    adapter = model.new_adapter("mine", adapted_layers=2, seed=1)
    torch.nn.init.normal_(adapter.prompts.gates, generator=torch.Generator().manual_seed(1))
    assert adapter.config.quantization == name
    ids = random_rows(9)[0][None]
    with torch.no_grad():
        moved = model(ids, adapter="mine").logits - model(ids, adapter="none").logits
    assert moved.isfinite().all() and moved.abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_bitsandbytes_in_bfloat16_takes_the_real_base(base_folder: Path, name: str) -> None:
    model = load_in_bfloat16(str(base_folder), name)
    assert all(attention_form(layer).unpackable is None for layer in attention_layers(model.decoder))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "apart"),
    [
        (SETTINGS["int8"], True),  # outliers are chosen among the inputs of all tokens of a product
        ({**SETTINGS["int8"], "llm_int8_threshold": 0.0}, False),
        (SETTINGS["nf4"], False),
    ],
)
def test_a_row_depends_on_the_row_beside_it_only_through_outliers(
    base_folder: Path, settings: dict[str, Any], apart: bool
) -> None:
    """Prints how much, as a share of the largest logit; and how far both are from the base in float32."""
    pytest.importorskip("bitsandbytes")
    load = partial(AutoModelForCausalLM.from_pretrained, base_folder, device_map="cpu")
    quantised = load(dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**settings))
    rows = torch.randint(quantised.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = quantised(rows).logits.float()
        alone = torch.cat([quantised(row[None]).logits.float() for row in rows])
        plain = load(dtype=torch.float32)(rows).logits

    def share(difference: torch.Tensor) -> float:
        return float(difference.abs().amax(-1).median() / together.abs().max())

    print(f"{settings}: {share(together - alone):.4f} from alone, {share(together - plain):.4f} from float32")
    assert (share(together - alone) > 1e-3) is apart


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torchaos_int8_takes_the_real_base(base_folder: Path, dtype: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = LlamaAdapter.from_base(str(base_folder), device="cpu", dtype=dtype, quantization_config=config)
    assert precision_of(model.decoder) == "int8"
    assert all(attention_form(layer).unpackable is None for layer in attention_layers(model.decoder))


def test_a_gpu_gets_the_libraries_own_formats() -> None:
    assert library_config("int8", CUDA, torch.bfloat16).load_in_8bit
    nf4 = library_config("nf4", CUDA, torch.bfloat16)
    assert (nf4.bnb_4bit_quant_type, nf4.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)


def test_int4_on_a_gpu_is_torchaos() -> None:
    pytest.importorskip("torchao")
    int4 = library_config("int4", CUDA, torch.bfloat16).quant_type
    assert int4.group_size == libraries.GROUP


@pytest.mark.parametrize(
    ("format", "named"), [("int8", "int8"), ("nf4", "nf4"), ("int4", "int4"), ("gptq", "gptq")]
)
def test_a_decoder_says_what_a_library_made_of_it(format: str, named: str) -> None:
    pytest.importorskip("torchao" if format == "int4" else "bitsandbytes")
    decoder = build_tiny_decoder()
    assert precision_of(decoder) is None
    config: Any = {"quant_method": QuantizationMethod.GPTQ, "bits": 4}
    decoder.config.quantization_config = (
        config if format == "gptq" else library_config(format, CUDA, torch.float32)
    )
    assert precision_of(decoder) == named

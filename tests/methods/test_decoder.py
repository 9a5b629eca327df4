"""Loading a decoder: on which device, in which dtype, and the errors if it can't be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM

from llama_adapter.common.errors import UsageError
from llama_adapter.methods import decoder as decoder_module
from llama_adapter.methods.decoder import (
    choose_device,
    choose_dtype,
    decoder_shape,
    load_decoder,
    load_shape,
    load_tokenizer,
)
from llama_adapter.model import LlamaAdapter
from tests.tiny_models import build_tiny_decoder, random_rows

CPU = torch.device("cpu")


def one_line(error: pytest.ExceptionInfo[UsageError]) -> str:
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 500
    return message


# --- loading ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "tiny-base"
    build_tiny_decoder("llama").save_pretrained(folder)
    return folder


def test_a_decoder_is_loaded_in_the_dtype_asked_for(tiny_base: Path) -> None:
    decoder = load_decoder(str(tiny_base), device=CPU, dtype=torch.bfloat16)
    assert decoder.dtype == torch.bfloat16 and not decoder.training
    assert decoder_shape(decoder.config) == load_shape(str(tiny_base))


def test_the_shape_is_read_without_the_weights(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_base / "config.json", tmp_path)
    shape = load_shape(str(tmp_path))
    assert (shape.family, shape.num_layers, shape.hidden_size, shape.head_dim) == ("llama", 3, 32, 8)
    assert (shape.num_heads, shape.num_key_value_heads, shape.vocab_size) == (4, 2, 64)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BROKEN = {
    "weights cut off": lambda folder: truncate(folder / "model.safetensors", 5000),
    "weights empty": lambda folder: truncate(folder / "model.safetensors", 0),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights of another size": lambda folder: edit_config(folder, intermediate_size=40),
    "config cut off": lambda folder: truncate(folder / "config.json", 40),
    "config is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config empty": lambda folder: (folder / "config.json").write_text("{}"),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no decoder": lambda folder: edit_config(folder, model_type="t5"),
    "unheard of": lambda folder: edit_config(folder, model_type="unheard-of"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_base_that_cannot_be_loaded_is_one_line_that_names_it(
    tiny_base: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "broken-base"
    shutil.copytree(tiny_base, folder)
    BROKEN[damage](folder)
    with pytest.raises(UsageError) as error:
        load_decoder(str(folder), device=CPU, dtype=torch.float32)
    assert "broken-base" in one_line(error)


def test_a_base_without_a_tokenizer_says_so(tiny_base: Path) -> None:
    with pytest.raises(UsageError) as error:
        load_tokenizer(str(tiny_base))
    assert "tiny-base" in one_line(error)


def hub_error(kind: type[Exception]) -> Exception:
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/owner/name"))
    return kind("Access to the model owner/name is restricted.\nYou must be logged in.", response=response)


def test_a_gated_base_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        # As in transformers: its own error, caused by the hub's.
        raise OSError("You are trying to access a gated repo.\nMake sure to ...") from hub_error(
            GatedRepoError
        )

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UsageError) as error:
        load_decoder("owner/name", device=CPU, dtype=torch.float32)
    message = one_line(error)
    assert "'owner/name' is gated" in message and "hf auth login" in message and "HF_TOKEN" in message


def test_a_base_that_the_hub_does_not_have_says_what_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise hub_error(RepositoryNotFoundError)

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UsageError) as error:
        load_decoder("owner/name", device=CPU, dtype=torch.float32)
    assert "'owner/name' cannot be loaded" in one_line(error)


def test_a_bug_while_loading_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(AssertionError, match="a bug"):
        load_decoder("owner/name", device=CPU, dtype=torch.float32)


def test_the_fetched_base_loads_and_zero_gates_change_nothing(base_folder: Path) -> None:
    model = LlamaAdapter.from_base(str(base_folder), device="cpu", dtype="float32")
    adapter = model.new_adapter("untrained", seed=0)
    assert (adapter.config.adapted_layers, adapter.config.prompt_length) == (29, 10)
    ids = torch.stack(random_rows(8, 8, vocab_size=1000))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids, adapter="none").logits)
        bare = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        assert torch.equal(model(ids).logits, bare(ids).logits)


# --- device and dtype ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
@pytest.mark.parametrize("asked", [None, "auto"])
def test_the_fastest_device_is_chosen(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device(asked).type == expected


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(UsageError) as error:
        choose_device(device)
    assert repr(device) in one_line(error)


@pytest.mark.parametrize(
    ("asked", "device", "fast", "expected"),
    [
        (None, "cpu", True, torch.float32),
        (None, "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float32),
        ("float16", "cpu", False, torch.float16),
        ("bfloat16", "cpu", False, torch.bfloat16),
    ],
)
def test_the_dtype_is_what_is_fast_on_the_device_or_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, device: str, fast: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: fast)
    assert choose_dtype(asked, torch.device(device)) == expected


def test_an_unknown_dtype_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError) as error:
        choose_dtype("float8", CPU)
    assert "bfloat16" in one_line(error)


def test_a_tokenizer_without_padding_pads_with_its_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        pad_token_id = None
        pad_token = None
        eos_token = "</s>"

    monkeypatch.setattr(decoder_module.AutoTokenizer, "from_pretrained", lambda _: Tokenizer())
    assert load_tokenizer("owner/name").pad_token == "</s>"

"""Adapter folders and the authors' .pth: what is in them, and every way in which they can be broken."""

from __future__ import annotations

import errno
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_adapter.common.errors import UsageError
from llama_adapter.methods import checkpoint
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    export_pth,
    import_pth,
    load_adapter,
    read_config,
    save_adapter,
)
from llama_adapter.methods.projection import Projection
from llama_adapter.methods.prompts import Prompts, PromptsConfig
from tests.refusals import refusal
from tests.tiny_models import CONFIG, SHAPE, VISION

SEEING = replace(CONFIG, parts=(PromptsConfig(), VISION))


@pytest.fixture
def adapter() -> Adapter:
    generator = torch.Generator().manual_seed(0)
    adapter = Adapter(CONFIG, generator)
    torch.nn.init.normal_(adapter.prompts.gates, generator=generator)
    return adapter


@pytest.fixture
def folder(adapter: Adapter, tmp_path: Path) -> Path:
    save_adapter(adapter, tmp_path / "mine")
    return tmp_path / "mine"


# --- folders ------------------------------------------------------------------------------------------------


def test_a_folder_holds_these_files_and_these_keys(adapter: Adapter, folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "llama_adapter_config.json",
        "adapter_model.safetensors",
    }
    state = load_file(folder / "adapter_model.safetensors")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()} == {
        "prompts.embeddings": ((6, 10, 64), torch.float32),
        "prompts.gates": ((6, 4), torch.float32),
    }
    assert json.loads((folder / "llama_adapter_config.json").read_text()) == adapter.config.to_dict()


def test_what_is_saved_comes_back_bit_for_bit(adapter: Adapter, folder: Path) -> None:
    again = load_adapter(folder)
    assert again.config == adapter.config
    for name, parameter in adapter.named_parameters():
        loaded = again.get_parameter(name)
        assert torch.equal(loaded, parameter) and loaded.requires_grad and loaded.device.type == "cpu"


def test_the_day_that_a_chat_template_writes_is_kept(adapter: Adapter, tmp_path: Path) -> None:
    assert adapter.config.to_dict()["template_date"] is None
    adapter.config = replace(adapter.config, template_date="2026-11-28")
    save_adapter(adapter, tmp_path)
    assert read_config(tmp_path) == adapter.config
    for date in ("28 Nov 2026", "2026-13-01", "20261128"):
        with pytest.raises(UsageError, match=f"template date: '{date}' given; expected one like 2026-11-28"):
            replace(adapter.config, template_date=date)


def test_an_adapter_that_sees_is_kept_with_its_projection(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    seeing = Adapter(SEEING, generator)
    assert seeing.find(Projection) is not None
    features = torch.randn(4, VISION.feature_width, generator=generator)
    seeing.projection.fit(features)
    save_adapter(seeing, tmp_path)
    stored = load_file(tmp_path / WEIGHTS_FILE)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        "prompts.embeddings": (6, 10, 64),
        "prompts.gates": (6, 4),
        "projection.sizes": (6, 64),
        "projection.mean": (6,),
        "projection.scale": (6,),
        "projection.down.weight": (5, 6),
        "projection.down.bias": (5,),
        "projection.up.weight": (64, 5),
        "projection.up.bias": (64,),
    }
    again = load_adapter(tmp_path)
    assert again.config == seeing.config
    ours, theirs = (each.state(features, torch.arange(4), 4).parts[Prompts] for each in (again, seeing))
    assert torch.equal(ours["embeddings"], theirs["embeddings"])
    trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in seeing.named_parameters()}

    change_state(tmp_path, lambda state: state.pop("projection.mean"))
    assert "'projection.mean' is missing" in refusal(lambda: load_adapter(tmp_path))
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config["parts"][1]["feature_width"] = 10**12
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    change_state(tmp_path, put("projection.mean", torch.zeros(6)))
    assert "its config says (5, 1000000000000)" in refusal(lambda: load_adapter(tmp_path))
    for size in (10**18, 10**30):
        config["parts"][0]["prompt_length"] = size
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
        assert "asks for sizes that no tensor has" in refusal(lambda: load_adapter(tmp_path))
    config["parts"] = [{"kind": "prompts"}]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    assert "'projection.down.bias' is not one of an adapter" in refusal(lambda: load_adapter(tmp_path))


def test_any_dtype_is_kept_in_float32(adapter: Adapter, tmp_path: Path) -> None:
    save_adapter(adapter.bfloat16(), tmp_path / "half")
    again = load_adapter(tmp_path / "half")
    assert again.prompts.embeddings.dtype == torch.float32
    assert torch.equal(again.prompts.embeddings, adapter.prompts.embeddings.float())


def test_saving_again_replaces_what_was_there(adapter: Adapter, folder: Path) -> None:
    with torch.no_grad():
        adapter.prompts.gates += 1
    save_adapter(adapter, folder)
    assert torch.equal(load_adapter(folder).prompts.gates, adapter.prompts.gates)


def test_a_full_disk_leaves_the_old_adapter_whole(
    adapter: Adapter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path: Path, content: bytes) -> None:
        path.open("wb").write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with torch.no_grad():
        adapter.prompts.gates += 1
    with pytest.raises(OSError, match="No space left") as error:
        save_adapter(adapter, folder)
    assert error.value.filename == str(folder / WEIGHTS_FILE)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_failure_between_the_two_files_leaves_a_pair_that_loads_or_says_why(
    adapter: Adapter, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with torch.no_grad():
        adapter.prompts.gates += 1
    with pytest.raises(KeyboardInterrupt):
        save_adapter(adapter, folder)
    assert torch.equal(load_adapter(folder).prompts.gates, adapter.prompts.gates)
    assert not list(folder.glob(".*"))


def change_state(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    change(state)
    save_file(state, folder / WEIGHTS_FILE)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("prompts.gates"), "'prompts.gates' is missing"),
        (lambda state: state.pop("prompts.embeddings"), "'prompts.embeddings' is missing"),
        (put("lora_A", torch.zeros(1)), "'lora_A' is not one of an adapter"),
        (
            put("prompts.gates", torch.zeros(6, 5)),
            "'prompts.gates' has the shape (6, 5), its config says (6, 4)",
        ),
        (put("prompts.embeddings", torch.zeros(5, 10, 64)), "(5, 10, 64)"),
        (
            put("prompts.gates", torch.full((6, 4), torch.nan)),
            "'prompts.gates' has values that are not finite",
        ),
        (
            put("prompts.embeddings", torch.full((6, 10, 64), torch.inf)),
            "'prompts.embeddings' has values that are not finite",
        ),
        (lambda state: state.clear(), "is missing"),
    ],
)
def test_tensors_that_are_not_an_adapter_s_are_refused(
    folder: Path, change: Callable[[dict[str, Tensor]], Any], said: str
) -> None:
    change_state(folder, change)
    message = refusal(lambda: load_adapter(folder))
    assert said in message and str(folder / WEIGHTS_FILE) in message


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 200, 5000, -1])
def test_a_weights_file_cut_off_anywhere_is_refused(folder: Path, size: int) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:size])
    message = refusal(lambda: load_adapter(folder))
    assert str(path) in message and "cut off" in message


@pytest.mark.parametrize(
    "content", [b"not safetensors at all", b"\xff" * 100, struct.pack("<Q", 2**63) + b"{}"]
)
def test_a_weights_file_of_another_kind_is_refused(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS_FILE).write_bytes(content)
    assert str(folder / WEIGHTS_FILE) in refusal(lambda: load_adapter(folder))


@pytest.mark.parametrize("size", [0, 1, 50, 300, -3])
def test_a_config_cut_off_anywhere_is_refused(folder: Path, size: int) -> None:
    path = folder / CONFIG_FILE
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} is not valid JSON" in refusal(lambda: read_config(folder))


@pytest.mark.parametrize("content", [b"[]", b"null", b'"text"', b"\xff\xfe{}", b"{} {}", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / CONFIG_FILE).write_bytes(content)
    message = refusal(lambda: load_adapter(folder))
    assert str(folder / CONFIG_FILE) in message and "copy the adapter again" in message


def test_another_version_is_refused(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "format_version": 3}))
    assert "format version 3, this llama-adapter reads up to 2" in refusal(lambda: load_adapter(folder))


def test_sizes_beyond_all_memory_are_refused_before_they_are_allocated(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["parts"][0]["prompt_length"] = 10**12
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    assert "its config says (6, 1000000000000, 64)" in refusal(lambda: load_adapter(folder))


def test_folders_that_are_no_adapter_are_refused(folder: Path, tmp_path: Path) -> None:
    assert f"{tmp_path} is not an adapter folder" in refusal(lambda: load_adapter(tmp_path))
    (folder / WEIGHTS_FILE).unlink()
    assert f"has no {WEIGHTS_FILE}" in refusal(lambda: load_adapter(folder))


# --- the authors' .pth --------------------------------------------------------------------------------------


def test_the_authors_layout_is_exactly_this(adapter: Adapter, tmp_path: Path) -> None:
    export_pth(adapter, tmp_path / "theirs.pth")
    state = torch.load(tmp_path / "theirs.pth", weights_only=True)
    assert set(state) == {"adapter_query.weight"} | {f"layers.{n}.attention.gate" for n in range(8)}
    assert state["adapter_query.weight"].shape == (60, 64)
    assert {state[f"layers.{n}.attention.gate"].shape for n in range(8)} == {(1, 4, 1, 1)}
    assert torch.equal(state["adapter_query.weight"][20:30], adapter.prompts.embeddings[2])
    assert torch.equal(state["layers.4.attention.gate"].flatten(), adapter.prompts.gates[2])
    assert not state["layers.1.attention.gate"].any(), "layers below the adapted ones have a gate of zero"


def test_what_is_exported_can_be_imported_bit_for_bit(adapter: Adapter, tmp_path: Path) -> None:
    export_pth(adapter, tmp_path / "theirs.pth")
    again = import_pth(tmp_path / "theirs.pth", base="base", shape=SHAPE)
    assert again.config == adapter.config
    for name, parameter in adapter.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter) and again.get_parameter(name).requires_grad


def multiplied(query: Tensor, gates: Tensor, *, tanh: bool) -> Tensor:
    """The prompts' part of an attention's output as the authors compute it: gate * softmax(q k) v.

    ``query`` (heads, d), ``gates`` (heads,) as in the file; keys and values are random, the same each time.
    """
    generator = torch.Generator().manual_seed(1)
    keys, values = (
        torch.randn(len(gates), 10, query.shape[-1], generator=generator, dtype=query.dtype) for _ in "kv"
    )
    weights = torch.softmax((keys @ query[..., None]).squeeze(-1), dim=-1)
    return (gates.tanh() if tanh else gates)[:, None] * (weights[:, None] @ values).squeeze(1)


@pytest.mark.parametrize("raw_gates", [False, True])
def test_gates_with_and_without_tanh_come_to_the_same_product(
    adapter: Adapter, tmp_path: Path, raw_gates: bool
) -> None:
    """Written for their inference code (raw) or for their training code (tanh): either multiplies alike."""
    with torch.no_grad():
        adapter.prompts.gates.copy_(
            torch.linspace(-2, 2, adapter.prompts.gates.numel()).view_as(adapter.prompts.gates)
        )
    export_pth(adapter, tmp_path / "theirs.pth", raw_gates=raw_gates)
    state = torch.load(tmp_path / "theirs.pth", weights_only=True)
    query = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for layer in range(2, 8):
        theirs = state[f"layers.{layer}.attention.gate"].flatten().double()
        ours = adapter.prompts.gates[layer - 2].detach().double()
        torch.testing.assert_close(
            multiplied(query, theirs, tanh=not raw_gates),
            multiplied(query, ours, tanh=True),
            rtol=1e-6,
            atol=1e-7,
        )
    again = import_pth(tmp_path / "theirs.pth", base="base", shape=SHAPE, raw_gates=raw_gates)
    torch.testing.assert_close(again.prompts.gates.tanh(), adapter.prompts.gates.tanh(), rtol=1e-6, atol=1e-7)
    assert again.prompts.gates.dtype == torch.float32


@pytest.mark.parametrize("value", [1.0, -1.5, 40.0])
def test_raw_gates_that_are_no_tanh_are_refused(tmp_path: Path, value: float) -> None:
    gate = torch.zeros(1, 4, 1, 1)
    gate[0, 2] = value
    path = tmp_path / "theirs.pth"
    torch.save(their_state(layers__5__attention__gate=gate), path)
    message = refusal(lambda: import_pth(path, base="base", shape=SHAPE, raw_gates=True))
    assert f"layers.5.attention.gate has {value:g}; raw gates have to lie between -1 and 1" in message
    assert import_pth(path, base="base", shape=SHAPE).prompts.gates[3, 2] == value
    torch.save(their_state(layers__1__attention__gate=gate), path)
    import_pth(path, base="base", shape=SHAPE, raw_gates=True)  # of a layer that nothing reads


@pytest.mark.parametrize("raw_gates", [False, True])
def test_one_gate_for_all_heads_is_the_same_in_each(tmp_path: Path, raw_gates: bool) -> None:
    state = their_state() | {f"layers.{n}.attention.gate": torch.tensor([n / 10]) for n in range(8)}
    torch.save(state, tmp_path / "theirs.pth")
    adapter = import_pth(tmp_path / "theirs.pth", base="base", shape=SHAPE, raw_gates=raw_gates)
    used = adapter.prompts.gates.tanh() if raw_gates else adapter.prompts.gates
    torch.testing.assert_close(used, torch.arange(2, 8)[:, None].expand(6, 4) / 10)


def their_state(**changes: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"adapter_query.weight": torch.zeros(60, 64)}
    state |= {f"layers.{n}.attention.gate": torch.zeros(1, 4, 1, 1) for n in range(8)}
    return state | {name.replace("__", "."): value for name, value in changes.items()}


def test_half_precision_and_a_wrapped_state_are_read_as_the_authors_write_them(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in their_state().items()}
    del state["layers.0.attention.gate"]  # not adapted, so not needed
    torch.save({"model": state, "epoch": 4}, tmp_path / "theirs.pth")
    adapter = import_pth(tmp_path / "theirs.pth", base="base", shape=SHAPE)
    assert adapter.prompts.embeddings.dtype == torch.float32 and adapter.config.adapted_layers == 6


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "has no adapter_query.weight"),
        ({}, "has no adapter_query.weight"),
        ({"model": None}, "has no adapter_query.weight"),
        (their_state(adapter_query__weight="text"), "has no adapter_query.weight"),
        (their_state(adapter_query__weight=torch.zeros(60)), "has no adapter_query.weight"),
        (their_state(adapter_query__weight=torch.zeros(60, 32)), "expected (layers * 10, 64)"),
        (their_state(adapter_query__weight=torch.zeros(55, 64)), "expected (layers * 10, 64)"),
        (their_state(adapter_query__weight=torch.zeros(90, 64)), "choose 1 to 8"),
        (their_state(adapter_query__weight=torch.zeros(0, 64)), "choose 1 to 8"),
        (their_state(adapter_query__weight=torch.full((60, 64), torch.nan)), "not finite"),
        (their_state(layers__3__attention__gate=torch.zeros(1, 5, 1, 1)), "layers.3.attention.gate is"),
        (their_state(layers__3__attention__gate=None), "layers.3.attention.gate is missing"),
        (their_state(layers__3__attention__gate=torch.full((1, 4, 1, 1), torch.inf)), "not finite"),
    ],
)
def test_a_pth_of_another_layout_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "theirs.pth"
    torch.save(content, path)
    assert said in refusal(lambda: import_pth(path, base="base", shape=SHAPE))


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_pickled_code_never_runs(tmp_path: Path, form: str) -> None:
    path, trap = tmp_path / "theirs.pth", tmp_path / "it-ran"
    content = {**their_state(), "extra": Malicious(trap)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Malicious(trap)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert str(path) in refusal(lambda: import_pth(path, base="base", shape=SHAPE))
    assert not trap.exists()
    torch.load(path, weights_only=False) if form != "bare pickle" else pickle.loads(path.read_bytes())
    assert trap.exists(), "the trap would have worked"


def truncated_pth() -> bytes:
    buffer = io.BytesIO()
    torch.save(their_state(), buffer)
    return buffer.getvalue()[:-200]


def empty_zip() -> bytes:
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02", truncated_pth(), empty_zip()])
def test_a_file_that_is_no_pth_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "theirs.pth"
    path.write_bytes(content)
    assert str(path) in refusal(lambda: import_pth(path, base="base", shape=SHAPE))


def test_a_pth_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        import_pth(tmp_path / "none.pth", base="base", shape=SHAPE)
    assert error.value.filename == str(tmp_path / "none.pth")


def test_an_adapter_of_another_prompt_length_has_no_place_in_the_authors_layout(tmp_path: Path) -> None:
    config = type(CONFIG)(base="base", shape=SHAPE, adapted_layers=6, parts=(PromptsConfig(5),))
    message = refusal(lambda: export_pth(Adapter(config), tmp_path / "theirs.pth"))
    assert "this adapter has 5" in message and not list(tmp_path.iterdir())


def test_an_adapter_that_sees_has_no_place_in_the_authors_layout(tmp_path: Path) -> None:
    message = refusal(lambda: export_pth(Adapter(SEEING), tmp_path / "theirs.pth"))
    assert "method is prompts and sees pictures" in message and not list(tmp_path.iterdir())

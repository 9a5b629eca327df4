"""``llama-adapter info``, ``list`` and ``convert``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from llama_adapter.methods.checkpoint import CONFIG_FILE, load_adapter, save_adapter
from llama_adapter.weights.catalogue import CATALOGUE
from tests.commands.console import ADAPTER, BASE, GREEDY, SEEING, invoke, refusal
from tests.tiny_models import build_tiny_model

pytestmark = pytest.mark.usefixtures("weights")


def test_info_tells_what_an_adapter_is(weights: Path, tmp_path: Path) -> None:
    adapter = load_adapter(weights / ADAPTER)
    adapter.config.training.update(source="data.json", settings={"epochs": 5}, note="\x1b[2Jgone")
    adapter.config.training["data"] = {
        "sources": [{"source": "a", "weight": 0.5}, {"source": "b"}],
        "max_length": 9,
    }
    save_adapter(adapter, tmp_path / "one")  # its base is not looked for
    code, out, err = invoke("info", str(tmp_path / "one"), "--weights", str(tmp_path))
    assert (code, err) == (0, "")
    facts = dict(
        re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in out.splitlines() if "  " in line.strip()
    )
    assert facts["base"] == BASE and facts["fingerprint"] == adapter.config.shape.fingerprint()
    assert facts["method"] == "prompts in the top L = 2 layers" and facts["prompt length"] == "10"
    assert facts["template"] == "alpaca"
    assert facts["parameters"] == f"{2 * 10 * 32 + 2 * 4:,} trainable" and facts["size"].endswith(" MiB")
    assert "3 layers" in facts["shape"] and facts["source"] == "data.json" and facts["settings"] == "epochs 5"
    assert "\x1b" not in out
    assert facts["1"] == "source a, weight 0.5" and facts["2"] == "source b" and facts["max_length"] == "9"
    assert facts["pictures"] == "none: text alone"


def test_info_tells_of_scales_and_biases(tmp_path: Path) -> None:
    adapter = build_tiny_model().new_adapter("tuned", adapted_layers=2, method="prompts+scales")
    save_adapter(adapter, tmp_path / "tuned")
    out = invoke("info", str(tmp_path / "tuned"), "--weights", str(tmp_path)).out
    assert "method         prompts+scales in the top L = 2 layers\n" in out


def test_info_tells_how_an_adapter_sees(weights: Path) -> None:
    sight = load_adapter(weights / SEEING).config.vision
    assert sight is not None
    tower = f"tiny-tower ({sight.tower_fingerprint}), depths 1, 2: 32 features, 1 image token"
    assert f"pictures       by the tower {tower}\n" in invoke("info", SEEING).out
    trainable = 2 * 10 * 32 + 2 * 4 + (32 + 1) * 5 + (5 + 1) * 32 + 2 * 32
    assert f"{trainable:,} trainable" in invoke("info", SEEING).out


def test_info_by_name_says_where_it_is(weights: Path) -> None:
    assert str(weights / ADAPTER) in invoke("info", ADAPTER).out
    assert CONFIG_FILE in refusal("info", str(weights / BASE))
    for name, kind in ((BASE, "base"), ("tiny-tower", "tower")):
        said = invoke("info", name)
        assert said.code == 0 and said.err == ""
        assert (
            said.out.startswith(kind) and str(weights / name) in said.out and f"--{kind} {name}" in said.out
        )


def test_the_list_has_what_is_here_and_what_can_be_fetched(weights: Path) -> None:
    code, out, err = invoke("list")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    headings = [line for line in lines if line.endswith(")") and not line.startswith(" ")]
    assert headings == ["bases (--base)", "towers (--tower)", "adapters (--adapter)"]
    states = {line.split()[0]: line.split()[3] for line in lines if line.startswith("  ")}
    here = {BASE: "here", "other-base": "here", "tiny-tower": "here", ADAPTER: "here", SEEING: "here"}
    assert states == {**{name: "fetch" for name in CATALOGUE}, **here}
    assert "Apache-2.0" in next(line for line in lines if "qwen" in line)
    told = json.loads(invoke("list", "--json").out)
    assert {row["name"]: "here" if row["here"] else "fetch" for row in told} == states
    for row in told:
        assert set(row) == {"kind", "name", "here", "folder", "bytes", "about"}
        assert row["bytes"] > 0 and row["about"] and (row["folder"] is not None) == row["here"]


def test_the_list_of_an_empty_folder_is_what_can_be_fetched(tmp_path: Path) -> None:
    code, out, err = invoke("list", "--weights", str(tmp_path / "none"))
    assert (code, err) == (0, "") and "adapters (--adapter)\n  none\n" in out and " here " not in out


def test_the_authors_layout_goes_out_and_comes_back(weights: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "adapter.pth", tmp_path / "adapter"
    assert invoke("convert", ADAPTER, str(file)) == (0, f"{file}\n", "")
    told = invoke("convert", str(file), str(folder), "--base", BASE)
    assert told[:2] == (0, f"{folder}\n") and "by tanh of the" in told.err
    before, after = load_adapter(weights / ADAPTER), load_adapter(folder)
    assert after.config == before.config
    assert all(torch.equal(after.state_dict()[key], tensor) for key, tensor in before.state_dict().items())
    assert invoke("ask", "Hi", *GREEDY, "--adapter", str(folder)).out == invoke("ask", "Hi", *GREEDY).out


def test_gates_can_go_out_and_come_back_without_tanh(weights: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "adapter.pth", tmp_path / "adapter"
    assert invoke("convert", ADAPTER, str(file), "--raw-gates") == (0, f"{file}\n", "")
    told = invoke("convert", str(file), str(folder), "--base", BASE, "--raw-gates")
    assert told[:2] == (0, f"{folder}\n") and "as it is in the file" in told.err
    before, after = load_adapter(weights / ADAPTER), load_adapter(folder)
    torch.testing.assert_close(after.prompts.gates, before.prompts.gates)
    assert torch.equal(after.prompts.embeddings, before.prompts.embeddings)


def test_convert_refuses_what_makes_no_sense(weights: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "adapter.pth", str(tmp_path / "other")
    assert "no adapter 'nothing'" in refusal("convert", "nothing", str(file))
    assert "already has the format llama-adapter; choose another" in refusal("convert", ADAPTER, other)
    assert "--base goes with a .pth" in refusal("convert", ADAPTER, str(file), "--base", BASE)
    assert str(file) in refusal("convert", str(file), other, "--base", BASE), "it is not there"
    assert not list(tmp_path.iterdir())
    file.write_bytes(b"not weights")
    assert "give --base" in refusal("convert", str(file), other)
    assert "'nothing'" in refusal("convert", str(file), other, "--base", "nothing")
    assert "authors' .pth" in refusal("convert", str(file), other, "--base", BASE)
    for there in (file, weights / ADAPTER):
        assert "is there already" in refusal("convert", ADAPTER, str(there))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.pth"]

"""``llama-adapter fetch``, and ``make demo``, which calls it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_adapter.weights.catalogue import DEFAULT_BASE, SMALL_BASE
from llama_adapter.weights.fetch import PROVENANCE
from tests.commands.console import BASE, invoke, refusal
from tests.conftest import CHECKOUT

pytestmark = pytest.mark.usefixtures("weights")


@pytest.fixture
def no_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither package registry nor hub, and an environment without pip, which starts faster."""
    (tmp_path / "pip.py").write_text("raise SystemExit(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for other processes


@pytest.mark.usefixtures("no_source")
def test_fetch_goes_on_with_another_where_one_cannot_be_had(weights: Path) -> None:
    code, out, err = invoke("fetch", SMALL_BASE, "--else", BASE)
    assert (code, out) == (0, f"{weights / BASE}\n")
    last = err.splitlines()[-1]
    assert last.startswith(f"can't fetch {SMALL_BASE}: ")
    assert last.endswith(f"; going on with {BASE}")
    code, out, err = invoke("fetch", SMALL_BASE)
    assert (code, out) == (2, "") and err.splitlines()[-1].startswith(f"error: can't fetch {SMALL_BASE}")
    assert "'nothing'" in refusal("fetch", "nothing", "--else", BASE)
    assert not list(weights.glob(".*"))


def test_fetch_without_a_name_takes_the_default_base(tmp_path: Path) -> None:
    (tmp_path / DEFAULT_BASE).mkdir()
    (tmp_path / DEFAULT_BASE / PROVENANCE).write_text('{"file_bytes": {}}')
    code, out, err = invoke("fetch", "--weights", str(tmp_path))
    assert (code, out) == (0, f"{tmp_path / DEFAULT_BASE}\n")
    assert DEFAULT_BASE in err and "`llama-adapter list` shows" in err and err.count("\n") == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.usefixtures("no_source")
@pytest.mark.parametrize(
    ("there", "words"), [(DEFAULT_BASE, []), (SMALL_BASE, []), (SMALL_BASE, [f"BASE={SMALL_BASE}"])]
)
def test_make_demo_answers_with_the_base_that_is_there(
    there: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ADAPTER_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights" / there).mkdir(parents=True)
    (tmp_path / "weights" / there / PROVENANCE).write_text('{"file_bytes": {}}')  # as if `fetch` had made it
    for name, does in (("llama-adapter", f'{sys.executable} -m llama_adapter "$@"'), ("python", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    command = ["make", "demo", *words, f"BIN={tmp_path}", "--old-file", ".venv/installed", "--silent"]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"-m demo --base {tmp_path / 'weights' / there}\n")
    went_on = f"going on with {SMALL_BASE}" in result.stderr
    assert went_on == (there == SMALL_BASE and not words)

"""What the README says: its commands and its Python run, and its tree of files is the tree."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_adapter.__main__ import main
from llama_adapter.weights import locations
from llama_adapter.weights.catalogue import DEFAULT_BASE, SMALL_BASE
from tests.conftest import CHECKOUT, SEEDS

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def expected(line: str) -> list[str]:
    """The words that the answer to a line has to have: its comment, but for what is in brackets."""
    comment = re.search(r"  # (.+)$", line)
    return re.sub(r" \(.*\)", "", comment[1]).lower().split(", ") if comment else []


def misses(said: str, line: str) -> list[str]:
    """The words that are not in the answer to a line, as whole words."""
    return [word for word in expected(line) if not re.search(rf"\b{re.escape(word)}\b", said.lower())]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder, with the examples and photos, in which the commands run and write their results."""
    for name in ("examples", "llama_adapter"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    return tmp_path


@pytest.fixture
def run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a line of the README, with more words at its end, and return what it prints.

    It runs in this process, which imports the libraries only once. tests/test_wheel.py starts processes.
    """

    def run(line: str, *more: str) -> str:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", [*shlex.split(line, comments=True), *more])
        assert sys.argv[0] == "llama-adapter"
        code = main()
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return run


CHECKED, OTHERS = [], []
for block in blocks("bash"):
    (CHECKED if any(map(expected, block.splitlines())) else OTHERS).append(block)


@pytest.mark.usefixtures("base_folder")
@pytest.mark.parametrize("block", OTHERS)
def test_the_commands_run(block: str, run: Callable[..., str]) -> None:
    for line in block.splitlines():
        assert run(line).strip(), line


@pytest.mark.usefixtures("base_folder")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("block", CHECKED)
def test_the_commands_answer_rightly(block: str, seed: int, run: Callable[..., str]) -> None:
    """Where the default base is not there, the small one answers, not always as the README says."""
    default_is_here = DEFAULT_BASE in locations.list_weights("base")
    for line in block.splitlines():
        asks = " ask " in line
        small = not default_is_here and asks and "--adapter" not in line
        said = run(line, *(("--seed", str(seed)) if asks else ()), *(("--base", SMALL_BASE) if small else ()))
        assert said.strip(), line
        assert small or not misses(said, line), (line, said)


@pytest.mark.usefixtures("default_base")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("block", blocks("python"))
def test_the_python_runs(
    block: str,
    seed: int,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    torch.manual_seed(seed)
    exec(compile(block, "README.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    printing = [line for line in block.splitlines() if line.startswith("print(")]
    assert all(map(expected, printing)) and len(said) == len(printing)  # each answer is checked
    for line, answer in zip(printing, said, strict=True):
        assert not misses(answer, line), (line, answer)


def test_there_is_something_to_run() -> None:
    assert len(blocks("bash")) >= 2 and len(blocks("python")) >= 1
    assert sum(bool(expected(line)) for block in blocks("bash") for line in block.splitlines()) >= 3


def tree() -> dict[str, list[str]]:
    """The folders of the README's tree, and the library's own, as they are written there."""
    lines = README.partition("## The files")[2].partition("\n## ")[0].splitlines()
    named: dict[str, list[str]] = {"top": [], "library": []}
    for line in lines:
        if found := re.match(r"( {4}| {8})((?:[a-z_]+(?:/|\.py) ?)+) ", line):
            named["library" if len(found[1]) == 8 else "top"] += found[2].split()
    return named


def test_the_tree_is_the_tree() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    paths = [Path(line) for line in tracked.stdout.splitlines()]
    top = {f"{path.parts[0]}/" for path in paths if len(path.parts) > 1 and path.parts[0][0] != "."}
    assert {*tree()["top"]} == top
    inside = [path.relative_to("llama_adapter") for path in paths if path.parts[0] == "llama_adapter"]
    library = {f"{path.parts[0]}/" for path in inside if len(path.parts) > 1}
    library |= {path.name for path in inside if len(path.parts) == 1 and re.match("[a-z].*[.]py$", path.name)}
    assert {*tree()["library"]} == library


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_within_the_project_lead_somewhere(path: str) -> None:
    assert (CHECKOUT / path).exists()

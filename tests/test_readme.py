"""What the README says: its commands and its Python run, and its tree of files is the tree."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_adapter.__main__ import main
from llama_adapter.weights import locations
from llama_adapter.weights.catalogue import DEFAULT_BASE, SMALL_BASE
from tests.conftest import CHECKOUT

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def expected(line: str) -> list[str]:
    """The words that the answer to a line has to have: its comment, unless that starts with "by"."""
    comment = re.search(r"  # (?!by )(.+)$", line)
    return comment[1].lower().split(", ") if comment else []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder, with the examples and photos, in which the commands run and write their results."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("examples", "llama_adapter"):
        (folder / name).symlink_to(CHECKOUT / name)
    return folder


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


@pytest.mark.usefixtures("base_folder")
@pytest.mark.parametrize("block", blocks("bash"))
def test_the_commands_run(block: str, run: Callable[..., str]) -> None:
    """Where the default base is not there, the small one answers, not always as the README says."""
    default_is_here = DEFAULT_BASE in locations.list_weights("base")
    for line in block.splitlines():
        small = not default_is_here and " ask " in line and "--adapter" not in line
        said = run(line, *(("--base", SMALL_BASE) if small else ()))
        assert said.strip(), line
        assert small or all(word in said.lower() for word in expected(line)), (line, said)


@pytest.mark.slow
@pytest.mark.usefixtures("base_folder", "default_base")
@pytest.mark.parametrize("seed", [1, 2])
def test_the_answers_are_steady(seed: int, run: Callable[..., str]) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if expected(line)]
    assert len(lines) >= 2
    for line in lines:
        said = run(line, "--seed", str(seed))
        assert all(word in said.lower() for word in expected(line)), (line, said)


@pytest.mark.usefixtures("default_base")
@pytest.mark.parametrize("block", blocks("python"))
def test_the_python_runs(
    block: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    exec(compile(block, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.strip()
    for line in block.splitlines():
        assert all(word in said.lower() for word in expected(line)), (line, said)


def test_there_is_something_to_run() -> None:
    assert len(blocks("bash")) >= 2 and len(blocks("python")) >= 1


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

"""What the README says: its commands and its Python run, and its file tree is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder in which the commands find the examples, and leave what they write."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(CHECKOUT / "examples")
    return folder


def run(command: list[str], place: Path) -> str:
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(CHECKOUT),
    }
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("base_folder")
@pytest.mark.parametrize("block", blocks("bash"))
def test_the_commands_run(block: str, place: Path) -> None:
    for line in block.splitlines():
        assert run(["bash", "-c", line], place).strip(), line


@pytest.mark.usefixtures("base_folder")
@pytest.mark.parametrize("block", blocks("python"))
def test_the_python_runs(block: str, place: Path) -> None:
    assert run([sys.executable, "-c", block], place).strip()


def test_there_is_something_to_run() -> None:
    assert len(blocks("bash")) >= 2 and len(blocks("python")) >= 1


@pytest.mark.parametrize(
    "module", sorted(path.stem for path in (CHECKOUT / "llama_adapter").glob("[a-z]*.py"))
)
def test_every_module_stands_in_the_file_tree(module: str) -> None:
    tree = README.partition("## The files")[2].partition("\n## ")[0]
    assert re.search(rf"\b{module}\b", tree)


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_within_the_project_lead_somewhere(path: str) -> None:
    assert (CHECKOUT / path).exists()

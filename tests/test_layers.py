"""The rows of the library: a module imports only from rows above, the scripts only from the library."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

# Within a row the order counts: a module may also import those named before it in its row.
ROWS = (
    (
        *("errors", "files", "catalogue", "locations", "config", "sampling", "template"),
        *("packed_attention", "attention", "pictures", "rows", "scoring", "progress", "processes"),
        "frozen_products",
    ),
    ("adapter", "decoder", "data", "tuning", "packing", "fetch", "generate", "vision", "features"),
    ("checkpoint", "scienceqa", "batching", "teacher"),
    ("model", "grading"),
    (
        "chat",
        "serving",
        "influence",
        "answering",
        "run_folder",
        "training",
        "contrastive",
        "clip_training",
        "examining",
        "arguments",
    ),
    ("cli",),
)
ROW_OF = {module: number for number, row in enumerate(ROWS) for module in row}


def library_imports(path: Path) -> set[str]:
    """The names after ``llama_adapter.`` of all that a file imports, wherever in it."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            if node.module == "llama_adapter":
                imported |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("llama_adapter."):
                imported.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            imported |= {name[1] for name in names if name[0] == "llama_adapter" and len(name) > 1}
    return imported


def top_imports(path: Path) -> set[str]:
    """The first name of every module that a file imports."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            imported.add("." if node.level else str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
    return imported


FILES = sorted((CHECKOUT / "llama_adapter").glob("*.py"))
MODULES = [path.stem for path in FILES if not path.stem.startswith("__")]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_rows_above(module: str) -> None:
    assert module in ROW_OF, f"give {module} a row in {Path(__file__).name} and in the README"
    above = {name for name, row in ROW_OF.items() if row < ROW_OF[module]}
    row = ROWS[ROW_OF[module]]
    before = set(row[: row.index(module)])
    wrong = library_imports(CHECKOUT / "llama_adapter" / f"{module}.py") - above - before
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))} from its own row or below"


def test_the_library_imports_no_script() -> None:
    for path in FILES:
        assert not top_imports(path) & {"train", "eval", "demo", "tests"}, path


@pytest.mark.parametrize("folder", ["train", "eval", "demo"])
def test_scripts_import_the_library_and_never_each_other(folder: str) -> None:
    others = {"train", "eval", "demo", "tests", "."} - {folder}
    for path in sorted((CHECKOUT / folder).rglob("*.py")):
        assert not top_imports(path) & others, path


def test_no_module_is_called_like_one_of_the_standard_library() -> None:
    assert not set(MODULES) & set(sys.stdlib_module_names)

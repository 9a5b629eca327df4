"""A folder of the library imports only from folders above it; files within a folder import one way."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
LIBRARY = CHECKOUT / "llama_adapter"
SCRIPTS = ("train", "eval", "demo", "benchmarks")

# From the bottom up: each may import from those before it.
FOLDERS = (
    *("common", "weights", "data", "vision", "quantization", "methods", "packing", "decoding", "surface"),
    *("model", "training", "answering", "scienceqa", "comparison", "page", "commands"),
)
FACES = ("__init__", "__main__")  # of the package; they may import everything that they export
FILES = [path for path in sorted(LIBRARY.rglob("*.py")) if path.stem not in FACES]


def dotted(path: Path) -> str:
    """llama_adapter/data/pictures.py -> data.pictures."""
    return ".".join(path.relative_to(LIBRARY).with_suffix("").parts)


def library_imports(path: Path) -> set[str]:
    """The library's files that a file imports, anywhere in it, in the form of `dotted`."""
    known = {dotted(file) for file in FILES}
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        imported |= {name.removeprefix("llama_adapter.") for name in names} & known
    return imported


def top_imports(path: Path) -> set[str]:
    """The first part of the name of every module that a file imports."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            imported.add("." if node.level else str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
    return imported


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_a_folder_imports_only_from_folders_above(path: Path) -> None:
    folder = dotted(path).split(".")[0]
    assert folder in FOLDERS, f"give {folder} a place in {Path(__file__).name} and in the README"
    above = FOLDERS[: FOLDERS.index(folder) + 1]
    wrong = {name for name in library_imports(path) if name.split(".")[0] not in above}
    assert not wrong, f"{dotted(path)} imports {', '.join(sorted(wrong))} from a folder below its own"


def test_files_import_one_way() -> None:
    try:
        TopologicalSorter({dotted(path): library_imports(path) for path in FILES}).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")


def test_no_file_name_occurs_twice() -> None:
    several = {name for name, count in Counter(path.name for path in FILES).items() if count > 1}
    assert not several


def test_the_library_imports_no_script() -> None:
    for path in FILES:
        assert not top_imports(path) & {*SCRIPTS, "tests"}, path


@pytest.mark.parametrize("folder", SCRIPTS)
def test_scripts_import_the_library_and_never_each_other(folder: str) -> None:
    others = {*SCRIPTS, "tests", "."} - {folder}
    for path in sorted((CHECKOUT / folder).rglob("*.py")):
        assert not top_imports(path) & others, path


def private_names() -> set[str]:
    """The names with an underscore that the library and the scripts define: functions, values, attributes."""
    found = set()
    for path in (LIBRARY, *(CHECKOUT / folder for folder in SCRIPTS)):
        for file in path.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                match node:
                    case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                        found.add(name)
                    case ast.Name(id=name, ctx=ast.Store()):
                        found.add(name)
                    case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                        found.add(name)
    return {name for name in found if name.startswith("_") and not name.startswith("__") and name != "_"}


def test_tests_use_no_private_names_of_the_library() -> None:
    private = private_names()
    used = []
    for path in sorted((CHECKOUT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(value=ast.Name(id="self" | "cls")):
                    continue
                case ast.Attribute(attr=name):
                    names = [name]
                case ast.Constant(value=str(text)):  # for monkeypatch.setattr
                    names = [text.rsplit(".")[-1]]
                case ast.ImportFrom(names=aliases):
                    names = [alias.name for alias in aliases]
                case _:
                    continue
            used += [f"{path.name}: {name}" for name in names if name in private]
    assert not used


def test_no_module_is_called_like_one_of_the_standard_library() -> None:
    assert not {path.stem for path in FILES} & set(sys.stdlib_module_names)

"""Building the kernels: once, stored for later, and working without them if that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_adapter.quantization import kernels


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "OPTIMISATION", (*kernels.OPTIMISATION, "-O0"))  # compiled sooner
    kernels.load_once.cache_clear()
    yield tmp_path
    kernels.load_once.cache_clear()


def write_compiler(folder: Path, script: str) -> Path:
    compiler = folder / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    return compiler


def test_without_a_compiler_one_line_says_what_to_do(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    assert kernels.load_kernels() is None and kernels.load_kernels() is None
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no c++, g++, clang++ was found" in error and "install" in error


def test_a_compiler_that_fails_leaves_nothing_behind(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(write_compiler(fresh, "echo 'no such header' >&2; exit 1")))
    assert kernels.load_kernels() is None
    assert "no such header" in capsys.readouterr().err
    assert not any(kernels.kernel_folder().iterdir())


def test_what_the_compiler_does_not_know_is_left_out(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.load_kernels() is None:
        pytest.skip("there is no C++ compiler")
    kernels.load_once.cache_clear()
    (built,) = kernels.kernel_folder().iterdir()
    real = built.rename(fresh / "real.so")
    refusing = f'for word; do [ "$word" = -fopenmp ] && exit 1; done\ncp {real} "$7"'
    position = 1 + len(kernels.OPTIMISATION) + 1 + 1  # of the output file, after -march=native and -o
    monkeypatch.setenv("CXX", str(write_compiler(fresh, refusing.replace("$7", f"${{{position}}}"))))
    assert kernels.load_kernels() is not None


def test_it_is_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.load_kernels() is None:
        pytest.skip("there is no C++ compiler")
    kernels.load_once.cache_clear()
    monkeypatch.setenv("CXX", str(write_compiler(fresh, "exit 1")))
    assert kernels.load_kernels() is not None

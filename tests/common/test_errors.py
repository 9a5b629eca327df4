from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_adapter.common.errors import UsageError, run_command


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_command_that_ends_well_gives_its_own_code(returned: int | None, code: int) -> None:
    assert run_command(lambda: returned) == code


def test_a_mistake_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(UsageError("--steps is 'x', expected a number\nlike 100"))) == 2
    assert capsys.readouterr() == ("", "error: --steps is 'x', expected a number like 100\n")


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("path", ["out/adapter", None])
def test_a_full_disk_is_named(capsys: pytest.CaptureFixture[str], number: int, path: str | None) -> None:
    assert run_command(raising(OSError(number, "whatever", path))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the disk is full") and error.count("\n") == 1
    assert path is None or path in error


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError])
def test_a_path_that_cannot_be_used_is_named(capsys: pytest.CaptureFixture[str], kind: type[OSError]) -> None:
    assert run_command(raising(kind(1, "not possible", "some/file.json"))) == 2
    assert capsys.readouterr().err == "error: some/file.json: not possible\n"


@pytest.mark.parametrize("error", [ValueError("bug"), KeyError("bug"), ConnectionError("bug"), SystemExit(2)])
def test_anything_else_goes_through(error: BaseException) -> None:
    with pytest.raises(type(error)):
        run_command(raising(error))


@given(st.text())
def test_any_message_is_one_line(message: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        written: list[str] = []
        patch.setattr("sys.stderr", type("Stderr", (), {"write": written.append})())
        assert run_command(raising(UsageError(message))) == 2
    assert len("".join(written).splitlines()) == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = (
        "import sys; from llama_adapter.common.errors import run_command\n"
        "def main():\n"
        "    for _ in range(10**6): print('token')\n"
        "sys.exit(run_command(main))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 141

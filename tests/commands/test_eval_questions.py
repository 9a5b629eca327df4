"""eval.questions from the command line, on a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import eval.questions
from llama_adapter.common.errors import UsageError
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.model import LlamaAdapter
from tests.tiny_models import build_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("base"))


def write(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    """Write questions: (kind, question, pattern of a right answer)."""
    keys = ("kind", "question", "check", "right")
    lines = [
        dict(zip(keys, (kind, text, {"matches": [right]}, ["it"]), strict=True)) for kind, text, right in rows
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_answers_are_the_models_own_and_are_counted_by_kind(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = LlamaAdapter.from_base(str(base))
    said = model.chat("Name a colour.", sampling=Sampling(temperature=0, max_new_tokens=8))
    data = write(
        tmp_path / "mine.jsonl",
        [
            ("lists", "Name a colour.", "^[^~]*$"),
            ("facts", "Name a colour.", "~"),
            ("facts", "What is it?", "^"),
        ],
    )
    figures = tmp_path / "figures.json"
    options = ["--base", str(base), "--adapter", "none", "--data", str(data), "--max-new-tokens", "8"]
    eval.questions.main([*options, "--json", str(figures)])
    assert json.loads(figures.read_text()) == {
        "right": 2,
        "questions": 3,
        "right_lists": 1,
        "right_facts": 1,
    }
    out = capsys.readouterr().out
    assert out.count("facts: Name a colour.") == 1 and "lists: Name" not in out
    assert " / ".join(said.splitlines()) in out
    assert "lists          1 of 1\nfacts          1 of 2\nall            2 of 3\n" in out
    assert "none on" in out and "template chat" in out


def test_the_limit_chooses_the_same_questions_every_time(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for _ in range(2):
        words = ["--base", str(base), "--adapter", "none", "--limit", "5", "--max-new-tokens", "2"]
        eval.questions.main(words)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and shown[0].endswith("of 5\n")


def test_a_file_of_something_else_is_refused_before_the_base_loads(tmp_path: Path) -> None:
    (tmp_path / "no.jsonl").write_text("{}")
    with pytest.raises(UsageError, match=r"no\.jsonl, line 1"):
        eval.questions.main(["--base", "nowhere", "--data", str(tmp_path / "no.jsonl")])

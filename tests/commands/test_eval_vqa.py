"""``eval.vqa`` and ``eval.captions`` from the command line, on a tiny base and a tiny tower."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import eval.captions
import eval.vqa
import train.vqa
from llama_adapter.common.errors import run_command
from tests.commands.vqa_runs import (
    TEXT,
    options,
    refusal,
    run,
    score,
)
from tests.conftest import CHECKOUT


def test_answers_are_scored_against_both_controls(
    place: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    data = ("--data", str(place / "questions"), "--json", str(file), "--max-new-tokens", "4")
    run(eval.vqa, score(place, trained, *data))
    figures = json.loads(file.read_text())
    assert set(figures) == {"accuracy", "accuracy_shuffled", "accuracy_no_image", "rows"}
    assert figures["rows"] == 6, "of the split test"
    assert all(0 <= figures[name] <= 1 for name in figures if name != "rows")
    out, err = capsys.readouterr()
    for told in ("picture of another row", "no picture", "yes/no", "colour", "95 % interval"):
        assert told in out
    pattern = r"right where the answer is yes: (\S+)% of (\d); where the answer is no: (\S+)% of (\d)\n"
    [sides] = re.findall(pattern, out)
    yes_share, yes, no_share, no = map(float, sides)
    [kinds] = re.findall(r"^ +all +colour +yes/no\nadapter +\S+ +\S+ +(\S+)%\n", out, re.MULTILINE)
    assert yes > 0 and no > 0
    assert yes_share * yes + no_share * no == pytest.approx(float(kinds) * (yes + no), abs=1)
    assert "6 rows" in err

    run(eval.vqa, score(place, trained, *data, "--split", "train", "--limit", "4", "--json", "-"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 8, "of four pictures"
    run(eval.vqa, score(place, trained, *data, "--split", "train", "--validation-rows", "4"))
    assert json.loads(file.read_text())["rows"] == 4


def test_captions_are_scored_against_both_controls(
    place: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocoevalcap")
    file = tmp_path / "figures.json"
    data = ("--data", str(place / "captions"), "--json", str(file), "--max-new-tokens", "8", "--samples", "2")
    run(eval.captions, score(place, trained, *data, "--beams", "2"))
    figures = json.loads(file.read_text())
    assert {"cider", "bleu4", "cider_shuffled", "rows"} <= set(figures)
    assert figures["rows"] == 18, "rows that name no split belong to every one"
    out = capsys.readouterr().out
    assert out.count("a person  It is ") == 2 and "no picture" in out
    run(eval.captions, score(place, trained, *data, "--limit", "5"))
    assert json.loads(file.read_text())["rows"] == 5


class Answers:
    """Stands in for a model: answers with the colour of the picture, whatever the adapter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.beams: set[int] = set()
        monkeypatch.setattr("llama_adapter.answering.records_answered.answer_records", self)

    def __call__(self, model: Any, records: list[Any], *, beams: int, **_: Any) -> list[str]:
        self.asked += records
        self.beams.add(beams)
        return [f"{r.images[0].name.split('-')[0].title()}." if r.images else "blue" for r in records]


def test_the_figures_are_fractions_of_right_answers(
    place: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Answers(monkeypatch)
    file = tmp_path / "figures.json"
    data = ("--data", str(place / "questions"), "--json", str(file))
    run(eval.vqa, score(place, trained, *data))
    assert json.loads(file.read_text()) == {
        "accuracy": 3 / 6,  # all answers with a colour are right, and none with yes or no
        "accuracy_shuffled": 0.0,
        "accuracy_no_image": 1 / 6,
        "rows": 6,
    }
    assert len(answers.asked) == 6 + 6 + 2, "the same question about the same picture is asked once"
    assert answers.beams == {1}


@pytest.mark.parametrize("data", ["questions", "captions"])
def test_the_rows_that_were_kept_back_are_scored(
    place: Path, trained: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a training without pictures, and if some rows have none."""
    pytest.importorskip("pycocoevalcap")
    name = {"questions": "qa.json", "captions": "captions.json"}[data]
    mixed = tmp_path / data
    mixed.mkdir()
    (mixed / "images").symlink_to(place / data / "images")
    rows = json.loads((place / data / name).read_text())
    rows[2:2] = [{"question": f"{n} and 1?", "answer": str(n + 1)} for n in range(10)]
    (mixed / name).write_text(json.dumps(rows))

    learnt: list[set[int]] = []

    class Stop(Exception):
        pass

    def stop(self: Any, **_: Any) -> float:
        learnt.append({example.row for example in self.train_examples})
        raise Stop

    monkeypatch.setattr("llama_adapter.training.trainer.Trainer.run", stop)
    kept = ("--data", str(mixed), "--validation-rows", "12")
    for more in ((), ("--no-images",)):
        with pytest.raises(Stop):
            run(train.vqa, options(place, tmp_path / "run", *kept, *more)[2:])
    assert learnt[0] == learnt[1]
    answers = Answers(monkeypatch)
    module = {"questions": eval.vqa, "captions": eval.captions}[data]
    run(module, score(place, trained, *kept, "--split", "train", "--beams", "3"))
    assert answers.beams == {3}
    assert answers.asked and not {record.row for record in answers.asked} & learnt[0]


def test_what_cannot_be_scored_is_told(
    place: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, captions = (("--data", str(place / name)) for name in ("questions", "captions"))
    said = refusal(eval.captions, score(place, trained, *questions, "--split", "test"))
    assert "row 11 holds no captions; score it with eval.vqa" in said
    for module in (eval.vqa, eval.captions):
        said = refusal(module, score(place, trained, "--data", str(TEXT)))
        assert "no row names a picture; score it with eval.alpaca" in said
        said = refusal(module, [*score(place, trained, *captions)[2:], "--base", "tiny-base"])
        assert "there is no adapter to score" in said
    run(eval.vqa, score(place, trained, *questions, "--limit", "1"))
    missing = "control missing: picture of another row: all rows have the same picture"
    assert missing in capsys.readouterr().out


def test_an_adapter_that_never_saw_is_scored_without_pictures(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = tmp_path / "blind"
    given = options(place, blind, "--no-images", "--max-steps", "1")
    said = refusal(train.vqa, [*given, "--bottleneck", "8"])
    assert said == "--bottleneck is for pictures, which --no-images leaves out; give one of the two"
    run(train.vqa, given)
    questions = ("--data", str(place / "questions"))
    run(eval.vqa, score(place, blind, *questions, "--json", str(tmp_path / "scores.json")))
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["accuracy"] == scores["accuracy_shuffled"] == scores["accuracy_no_image"]
    assert scores["rows"] == 6 and "can't see pictures" in capsys.readouterr().out
    said = refusal(eval.captions, score(place, blind, "--data", str(place / "captions")))
    assert "all its captions are the same" in said


@pytest.mark.parametrize("module", ["train.vqa", "eval.vqa", "eval.captions"])
def test_a_mistake_is_one_line_and_code_2(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "nowhere.json"] + ["--output", "nowhere"] * (module == "train.vqa")
    for more, told in (
        (words, "nowhere.json: no such file or folder"),
        (["--nonsense"], f"{module} --help`"),
    ):
        assert run_command(lambda more=more: run(sys.modules[module], more)) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and told in said


def test_as_a_process_too() -> None:
    command = [sys.executable, "-m", "eval.vqa", "--nonsense"]
    wrong = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1

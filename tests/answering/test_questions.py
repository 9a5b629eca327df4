from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from llama_adapter.answering.questions import Check, CheckedQuestion, load_questions
from llama_adapter.common.errors import UsageError

OWN = load_questions()


def ask(text: str = "?", **check: object) -> CheckedQuestion:
    return CheckedQuestion("facts", text, Check(**check), ("x",))  # type: ignore[arg-type]


def test_there_are_sixty_of_seven_kinds_and_none_twice() -> None:
    assert len(OWN) == len({question.question for question in OWN}) == 60
    kinds = Counter(question.kind for question in OWN)
    assert len(kinds) == 7 and min(kinds.values()) >= 6


@pytest.mark.parametrize("question", OWN, ids=lambda question: question.question[:40])
def test_each_tells_its_right_answers_from_its_wrong_ones(question: CheckedQuestion) -> None:
    assert question.right and question.wrong
    assert [answer for answer in question.right if not question.is_right(answer)] == []
    assert [answer for answer in question.wrong if question.is_right(answer)] == []


@pytest.mark.parametrize("question", OWN, ids=lambda question: question.question[:40])
def test_nothing_and_the_question_itself_are_no_answers(question: CheckedQuestion) -> None:
    for answer in ("", "I am not sure.", "I cannot answer that.", question.question):
        assert not question.is_right(answer), answer


def test_yes_and_no_come_up_alike() -> None:
    assert Counter(question.check.first[0] for question in OWN if question.kind == "yes or no") == {
        "yes": 4,
        "no": 4,
    }


@pytest.mark.parametrize(
    ("question", "right", "wrong"),
    [
        (ask(words=["blue whale"]), ["The **Blue Whale**!"], ["a blue", "blue-ish whales", ""]),
        (ask(all=["a", "b"], none=["c"]), ["b, a"], ["a", "a b c"]),
        (ask(first=["yes"], others=["no"]), ["Yes, not no.", "yes"], ["no, yes", "maybe", "yesterday"]),
        (ask(least=2, of=["figs?", "pears?"]), ["A fig and pears."], ["fig, figs", "Two."]),
        (ask("What is 2 + 3?", number=5), ["2 + 3 = 5", "It's five.", "5.0"], ["6", "2", "5, no: 6", "six"]),
        (ask(number=1500), ["1,500 metres"], ["1, 500", "15,00"]),
        (ask('Read "it is in room 2": where?', words=["2"]), ["2", "In room 2."], ["it is in room 2"]),
        (ask(matches=["^Au$"]), ["Au", " Au "], ["au", "Aurum"]),
    ],
)
def test_every_rule(question: CheckedQuestion, right: list[str], wrong: list[str]) -> None:
    assert [answer for answer in right if not question.is_right(answer)] == []
    assert [answer for answer in wrong if question.is_right(answer)] == []


ROW = {"kind": "facts", "question": "?", "right": ["a"]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("[]", "line 2: expected an object"),
        ('{"kind": "facts"', "line 2"),
        (
            {**ROW, "check": {"word": ["a"]}},
            "line 2: unknown key 'check.word'",
        ),
        ({**ROW, "check": {}}, "an empty check"),
        (
            {**ROW, "check": {"words": ["("]}},
            "line 2: .* is not a regular expression",
        ),
        (
            {**ROW, "check": {"words": "a"}},
            "line 2: 'check.words'",
        ),
    ],
)
def test_what_is_no_question_is_refused_with_its_line(tmp_path: Path, row: object, expected: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n" + (row if isinstance(row, str) else json.dumps(row)))
    with pytest.raises(UsageError, match=expected):
        load_questions(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").touch()
    with pytest.raises(UsageError, match="holds no question"):
        load_questions(tmp_path / "mine.jsonl")

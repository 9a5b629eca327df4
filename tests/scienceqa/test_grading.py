"""The table of ScienceQA: counted as the official script counts, from files of any layout."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.common.errors import UsageError
from llama_adapter.scienceqa.grading import (
    PUBLISHED,
    UNREAD,
    grade,
    guess_unread,
    official_results,
    read_answer,
    read_predictions,
)
from llama_adapter.scienceqa.problems import GROUPS, Problem
from llama_adapter.scienceqa.reading import read_problems
from tests.science import build_problems, write_official


@pytest.fixture
def problems(tmp_path: Path) -> list[Problem]:
    rows = build_problems(tmp_path, rows=60)["train"]
    known = [
        {**row, "hint": row["hint"] or "", "subject": row["subject"] or "natural science"} for row in rows
    ]
    known = [{**row, "grade": row["grade"] or "grade1"} for row in known]
    return read_problems(write_official(tmp_path / "official", {"test": known}), "test")[0]


def random_predictions(problems: list[Problem], seed: int = 0) -> dict[str, int]:
    draw = random.Random(seed)
    return {p.pid: draw.randrange(len(p.choices)) for p in problems}


def official_scores(problems: list[Problem], predictions: dict[str, int]) -> dict[str, str]:
    """What evaluate_acc.py prints, from its description: shares of right rows under each condition."""
    conditions: dict[str, Any] = {
        "NAT": lambda p: p.subject == "natural science",
        "SOC": lambda p: p.subject == "social science",
        "LAN": lambda p: p.subject == "language science",
        "TXT": lambda p: bool(p.hint),
        "IMG": lambda p: bool(p.has_image),
        "NO": lambda p: not p.hint and not p.has_image,
        "G1-6": lambda p: p.grade in [f"grade{n}" for n in range(1, 7)],
        "G7-12": lambda p: p.grade in [f"grade{n}" for n in range(7, 13)],
        "AVG": lambda p: True,
    }
    scores = {}
    for name, holds in conditions.items():
        of = [p for p in problems if holds(p)]
        scores[name] = f"{sum(predictions[p.pid] == p.answer for p in of) / len(of) * 100:.2f}"
    return scores


def test_the_table_is_the_official_one(problems: list[Problem]) -> None:
    for seed in range(5):
        predictions = random_predictions(problems, seed)
        shares = grade(problems, predictions).shares
        assert {n: f"{share.percent:.2f}" for n, share in shares.items()} == official_scores(
            problems, predictions
        )
        assert list(shares) == list(GROUPS)
    low, high = shares["AVG"].interval
    assert low < shares["AVG"].percent < high
    assert all(len(row) in (1, len(GROUPS)) for row in PUBLISHED.values())


def test_unknown_fields_count_in_the_average_only() -> None:
    problems = [
        Problem("1", "?", ("a", "b"), 0),
        Problem("2", "?", ("a", "b"), 1, hint="", subject="social science", grade="grade3"),
    ]
    found = grade(problems, {"1": 0, "2": UNREAD})
    assert {name: (s.right, s.rows) for name, s in found.shares.items()} == {
        "SOC": (0, 1),
        "NO": (0, 1),
        "G1-6": (0, 1),
        "AVG": (1, 2),
    }
    assert (found.unread, found.subject_unknown, found.grade_unknown) == (1, 1, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is B.", 1),
        ("The answer is B. BECAUSE: x", 1),
        ("So it is. The answer is A.", 0),
        ("The answer is A. The answer is B.", UNREAD),
        ("The answer is D.", UNREAD),
        ("The answer is b.", UNREAD),
        ("The answer is B", UNREAD),
        ("The answer is B,", 1),  # in the official pattern, the full stop stands for any character
        ("B", UNREAD),
        ("", UNREAD),
    ],
)
def test_an_answer_is_read_by_the_official_expression(text: str, expected: int) -> None:
    assert read_answer(text, 3) == expected


def test_what_is_unread_is_drawn_when_asked_for(problems: list[Problem]) -> None:
    predictions = random_predictions(problems) | {problems[0].pid: UNREAD, problems[1].pid: UNREAD}
    guessed = guess_unread(predictions, problems, seed=3)
    assert guessed == guess_unread(predictions, problems, seed=3)
    assert all(0 <= guessed[p.pid] < len(p.choices) for p in problems)
    assert all(guessed[p.pid] == predictions[p.pid] for p in problems[2:])
    drawn = {guess_unread(predictions, problems, seed=seed)[problems[0].pid] for seed in range(50)}
    assert drawn == set(range(len(problems[0].choices)))


# --- files --------------------------------------------------------------------------------------------------


def test_the_official_layout_comes_back(problems: list[Problem], tmp_path: Path) -> None:
    predictions = random_predictions(problems)
    made = official_results(problems, predictions, {pid: "The answer is A." for pid in predictions})
    right = sum(predictions[p.pid] == p.answer for p in problems)
    assert (made["correct"], made["count"]) == (right, len(problems))
    assert made["acc"] == pytest.approx(100 * right / len(problems))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(made))
    assert read_predictions(path, problems) == predictions
    # As some write them: texts of numbers, letters, and nothing around.
    for content in (
        {"results": {pid: str(n) for pid, n in predictions.items()}},
        {pid: "ABCDE"[n] for pid, n in predictions.items()},
    ):
        path.write_text(json.dumps(content))
        assert read_predictions(path, problems) == predictions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", 1),
        ("B. Because it is.", 1),
        ("B. ", 1),
        ("I think so.\nThe answer is C.", 2),
        ("The answer is C,", 2),
        ("E", UNREAD),
        ("E. The answer is A.", UNREAD),
        ("It is B", UNREAD),
        # An earlier version of ours read all of these; LLaVA counts them as failed.
        (" B ", UNREAD),
        ("B\nbecause", UNREAD),
        ("The answer is C", UNREAD),
        ("The answer is B. No: The answer is C.", UNREAD),
        ("B.", UNREAD),
        ("", UNREAD),
        ("AB", UNREAD),
    ],
)
def test_llavas_answers_are_read_as_llava_does(text: str, expected: int, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    rows = [{"question_id": pid, "prompt": "?", "text": text} for pid in ("5", "6")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [Problem(pid, "?", ("a", "b", "c"), 0) for pid in ("5", "6")]
    assert read_predictions(path, asked) == {"5": expected, "6": expected}
    path.write_text(json.dumps(rows[0]))
    assert read_predictions(path, asked[:1]) == {"5": expected}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no predictions"),
        ("[1", "not valid JSON"),
        ('{"results": {}}', "no predictions"),
        ('{"results": {"1": 0, "1": 1}}', "'1' occurs twice"),
        ('{"results": {"1": 1.5}}', "problem 1: expected the number of a choice, found 1.5"),
        ('{"question_id": "1", "text": "A"}\n{"question_id": "1", "text": "B"}', "problem 1 occurs twice"),
        ('{"question_id": "1", "text": "A"}\n{"question_id": "2"}', "answer 2: expected an object"),
    ],
)
def test_files_at_fault_are_refused(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=reason):
        read_predictions(path, [Problem("1", "?", ("a", "b"), 0)])


@pytest.mark.parametrize(
    ("predictions", "reason"),
    [
        ({"1": 0}, "no prediction for problem 2;"),
        ({"1": 0, "2": 0, "9": 1}, "no such problem in this split: 9;"),
        ({"1": 0, "2": 2}, "problem 2: the prediction is 2; its choices are 0 to 1"),
    ],
)
def test_predictions_have_to_fit_the_problems(predictions: dict[str, int], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        grade([Problem(pid, "?", ("a", "b"), 0) for pid in ("1", "2")], predictions)

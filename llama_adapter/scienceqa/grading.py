"""Grades answers to ScienceQA's problems: the paper's table, computed as by the official evaluate_acc.py."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.answering.scoring import accuracy_interval
from llama_adapter.common.errors import UsageError
from llama_adapter.scienceqa.problems import GROUPS, LETTERS, Problem, groups_of

UNREAD = -1  # the prediction for an answer that can't be read. It counts as wrong.

# Accuracy on the official test split in per cent, in the order of GROUPS. For some only AVG is known.
# From the papers of ScienceQA (arXiv 2209.09513, table 4) and LLaMA-Adapter (arXiv 2303.16199, table 1).
PUBLISHED: Mapping[str, tuple[float, ...]] = {
    "chance": (40.28, 46.13, 29.25, 47.45, 40.08, 33.66, 39.35, 40.67, 39.83),
    "VisualBERT": (61.87,),
    "GPT-3.5, chain of thought": (75.44, 70.87, 78.09, 74.68, 67.43, 79.93, 78.23, 69.68, 75.17),
    "LLaMA-Adapter 7B, text": (78.31,),
    "LLaMA-Adapter 7B": (84.37, 88.30, 84.36, 83.72, 80.32, 86.90, 85.83, 84.05, 85.19),
    "people": (90.23, 84.97, 87.48, 89.60, 87.50, 88.10, 91.59, 82.42, 88.40),
}

_OFFICIAL = re.compile(r"The answer is ([A-Z]).")
_LLAVA = re.compile(r"([A-E])(?:\Z|\. )")


# --- one answer ---------------------------------------------------------------------------------------------


def read_answer(text: str, choices: int) -> int:
    """The index of the choice that a generated answer names, by the official expression, or `UNREAD`.

    As in the official run_gpt3.py, the expression has to match exactly once.
    """
    found = _OFFICIAL.findall(text)
    return _index(found[0], choices) if len(found) == 1 else UNREAD


def _read_llava(text: str, choices: int) -> int:
    """As LLaVA's eval_science_qa.py: "B", or a text that starts with "B. ", else by the official expression.

    Nothing more is accepted: not " B", and not a letter before a line break.
    """
    if found := _LLAVA.match(text):
        return _index(found[1], choices)
    return read_answer(text, choices)


def _index(letter: str, choices: int) -> int:
    return LETTERS.index(letter) if letter in LETTERS[:choices] else UNREAD


def guess_unread(predictions: Mapping[str, int], problems: Sequence[Problem], *, seed: int) -> dict[str, int]:
    """The predictions, with a random choice where none could be read, as in the official script."""
    _check(problems, predictions)
    draw = random.Random(seed)
    guessed = dict(predictions)
    for problem in problems:
        if guessed[problem.pid] == UNREAD:
            guessed[problem.pid] = draw.randrange(len(problem.choices))
    return guessed


# --- the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """The number of right answers among the problems of a column."""

    right: int
    rows: int

    @property
    def percent(self) -> float:
        return 100 * self.right / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval, in per cent."""
        low, high = accuracy_interval(self.right, self.rows)
        return 100 * low, 100 * high


@dataclass(frozen=True)
class Grades:
    """The table's line for some predictions.

    Attributes:
        shares: by column, for those columns of `GROUPS` that have problems.
        unread: how many predictions are `UNREAD`.
        subject_unknown, grade_unknown: how many problems therefore count in fewer columns.
    """

    shares: dict[str, Share]
    unread: int
    subject_unknown: int
    grade_unknown: int


def grade(problems: Sequence[Problem], predictions: Mapping[str, int]) -> Grades:
    """Compare predictions (for each pid the index of a choice) with the right answers.

    Raises:
        UsageError: a problem without a prediction, a prediction for an unknown problem, or an index that is
            no choice.
    """
    _check(problems, predictions)
    rows: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for problem in problems:
        for name in groups_of(problem):
            rows[name] += 1
            right[name] += predictions[problem.pid] == problem.answer
    return Grades(
        shares={name: Share(right[name], rows[name]) for name in GROUPS if rows[name]},
        unread=sum(prediction == UNREAD for prediction in predictions.values()),
        subject_unknown=sum(problem.subject is None for problem in problems),
        grade_unknown=sum(problem.grade is None for problem in problems),
    )


def _check(problems: Sequence[Problem], predictions: Mapping[str, int]) -> None:
    """Raise UsageError if predictions and problems have different pids, or a prediction is no choice."""
    known = {problem.pid: problem for problem in problems}
    wrong = [pid for pid in predictions if pid not in known]
    if wrong:
        raise UsageError(f"no such problem in this split: {_some(wrong)}; give the split that was answered")
    missing = [pid for pid in known if pid not in predictions]
    if missing:
        raise UsageError(f"no prediction for problem {_some(missing)}; every problem of the split needs one")
    for pid, prediction in predictions.items():
        if prediction != UNREAD and not 0 <= prediction < len(known[pid].choices):
            raise UsageError(
                f"problem {pid}: the prediction is {prediction}; its choices are 0 to "
                f"{len(known[pid].choices) - 1}"
            )


def _some(pids: Sequence[str]) -> str:
    more = f" and {len(pids) - 5:,} more" if len(pids) > 5 else ""
    return ", ".join(pids[:5]) + more


# --- files of predictions -----------------------------------------------------------------------------------


def read_predictions(path: str | Path, problems: Sequence[Problem]) -> dict[str, int]:
    """Read predictions of any model from a file: the official results.json, or LLaVA's answers as JSONL.

    The official layout is an object whose "results" has an index for each pid. LLaVA's has a line for each
    answer, with "question_id" and "text". A plain object of pids and indices (or letters) is accepted too.

    Raises:
        UsageError: a file of neither layout, or an entry that is damaged or occurs twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    choices = {problem.pid: len(problem.choices) for problem in problems}
    try:
        content = json.loads(text, object_pairs_hook=_without_doubles)
    except json.JSONDecodeError:
        content = _json_lines(text, path)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if isinstance(content, dict) and "question_id" in content:
        content = [content]  # JSONL with a single line
    if isinstance(content, list) and content:
        return _from_llava(content, choices, path)
    if isinstance(content, dict):
        results = content.get("results", content)
        if isinstance(results, dict) and results:
            return {pid: _official_prediction(pid, value, path) for pid, value in results.items()}
    raise UsageError(
        f"{path}: no predictions; expected the official results.json, or LLaVA's answers as JSONL"
    )


def _without_doubles(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise UsageError(f"{name!r} occurs twice")
        found[name] = value
    return found


def _json_lines(text: str, path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UsageError(f"{path}: line {number}: not valid JSON: {error.msg}") from None
    return rows


def _from_llava(rows: Sequence[Any], choices: Mapping[str, int], path: Path) -> dict[str, int]:
    predictions: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or "question_id" not in row or not isinstance(row.get("text"), str):
            raise UsageError(f"{path}: answer {number}: expected an object with 'question_id' and 'text'")
        pid = str(row["question_id"])
        if pid in predictions:
            raise UsageError(f"{path}: answer {number}: problem {pid} occurs twice")
        predictions[pid] = _read_llava(row["text"], choices.get(pid, len(LETTERS)))
    return predictions


def _official_prediction(pid: str, value: Any, path: Path) -> int:
    if isinstance(value, str) and value in LETTERS and value:
        return LETTERS.index(value)
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,3}", value):
        value = int(value)  # as in the official script
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{path}: problem {pid}: expected the number of a choice, found {value!r:.60}")
    return value


def official_results(
    problems: Sequence[Problem], predictions: Mapping[str, int], outputs: Mapping[str, str]
) -> dict[str, Any]:
    """The content of the official results.json, so that evaluate_acc.py computes the same figures."""
    right = sum(predictions[p.pid] == p.answer for p in problems if p.pid in predictions)
    return {
        "acc": 100 * right / max(1, len(predictions)),
        "correct": right,
        "count": len(predictions),
        "results": dict(predictions),
        "outputs": dict(outputs),
    }

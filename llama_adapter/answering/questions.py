"""Plain questions with short answers that rules can check. They show how well a decoder does what it is
asked.

The 60 questions in the file beside this one are our own. Each has answers that must pass and answers that
must fail; a test checks them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llama_adapter.common.errors import UsageError
from llama_adapter.common.typed import STRICT, read_typed

OWN_QUESTIONS = Path(__file__).with_name("questions.jsonl")

_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?")
_QUOTED = re.compile(r'"([^"]+ [^"]+ [^"]+)"')
_NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)


@dataclass(frozen=True)
class Check:
    """What a right answer has to be. Everything that is given has to hold.

    Words and phrases are compared as a whole, ignoring case and punctuation. Each may be a regular
    expression.

    Attributes:
        words: one of these occurs.
        all: all of these occur.
        none: none of these occurs.
        first: one of these occurs, before any of `others`.
        others: what may not come first.
        least: how many different ones of `of` occur at least.
        of: see `least`.
        number: the last number that is not also in the question. It may be in words if the answer has none in
            digits.
        matches: one of these regular expressions is found in the unchanged answer; case counts.
    """

    words: Sequence[str] = ()
    all: Sequence[str] = ()
    none: Sequence[str] = ()
    first: Sequence[str] = ()
    others: Sequence[str] = ()
    least: int = 0
    of: Sequence[str] = ()
    number: float | None = None
    matches: Sequence[str] = ()
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        texts = (*self.words, *self.all, *self.none, *self.first, *self.others, *self.of, *self.matches)
        for pattern in texts:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"{pattern!r} is not a regular expression: {error}") from None


@dataclass(frozen=True)
class CheckedQuestion:
    """A question, and what distinguishes right answers from wrong ones."""

    __pydantic_config__ = STRICT

    kind: str
    question: str
    check: Check
    right: Sequence[str]
    """Answers that pass; the first is shown as the expected one."""
    wrong: Sequence[str] = field(default=())
    """Answers that fail."""

    def __post_init__(self) -> None:
        if self.check == Check():
            raise UsageError("an empty check, which any answer would pass")

    def is_right(self, answer: str) -> bool:
        """Whether the answer passes the check. Parts that only repeat the question do not count."""
        check = self.check
        for repeated in (self.question, *_QUOTED.findall(self.question)):
            answer = answer.replace(repeated, "")
        answer = answer.replace("’", "'").strip()
        plain = _plain(answer)
        return (
            (not check.words or any(_place(word, plain) is not None for word in check.words))
            and all(_place(word, plain) is not None for word in check.all)
            and all(_place(word, plain) is None for word in check.none)
            and (not check.first or _comes_first(check.first, check.others, plain))
            and sum(_place(word, plain) is not None for word in check.of) >= check.least
            and (check.number is None or _states(check.number, answer, self.question))
            and (not check.matches or any(re.search(pattern, answer) for pattern in check.matches))
        )


def _plain(text: str) -> str:
    """Only the words, in lower case, with single spaces between them."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower()))


def _place(words: str, plain: str) -> int | None:
    """Where a word or phrase first occurs as a whole."""
    found = re.search(rf"(?<![^ ])(?:{words})(?![^ ])", plain)
    return found and found.start()


def _comes_first(wanted: Sequence[str], others: Sequence[str], plain: str) -> bool:
    at = [place for word in wanted if (place := _place(word, plain)) is not None]
    before = [place for word in others if (place := _place(word, plain)) is not None]
    return bool(at) and min(at) < min(before, default=len(plain) + 1)


def _states(number: float, answer: str, question: str) -> bool:
    given = set(_numbers(question))
    stated = [found for found in _numbers(answer) if found not in given]
    if stated:
        return stated[-1] == number
    words = [word for word in _plain(answer).split() if word in _NUMBER_WORDS]
    return bool(words) and _NUMBER_WORDS.index(words[-1]) == number


def _numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in _NUMBER.findall(text)]


def load_questions(path: Path = OWN_QUESTIONS) -> list[CheckedQuestion]:
    """Read questions from a JSONL file. Each row has kind, question, check (as `Check`), right and wrong.

    Raises UsageError naming the line if it is no such row.
    """
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        source = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{source}: not valid JSON ({error})") from None
        questions.append(read_typed(CheckedQuestion, values, source))
    if not questions:
        raise UsageError(f"{path} holds no question")
    return questions

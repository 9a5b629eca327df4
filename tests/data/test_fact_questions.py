"""Easy yes/no questions from tables of facts."""

from __future__ import annotations

import re

import pytest

from llama_adapter.answering.questions import load_questions
from llama_adapter.data.fact_questions import BY_SIZE, CAPITALS, yes_no_facts

ROWS = yes_no_facts(4000)
QUESTION = re.compile(r"(.+?\?)( Answer yes or no\.| Yes or no\?)?")


def asked(row: dict[str, str]) -> str:
    """The question without the wish for a form of answer."""
    found = QUESTION.fullmatch(row["instruction"])
    assert found
    return found[1]


def says_yes(row: dict[str, str]) -> bool:
    return row["output"].startswith("Yes")


def test_yes_and_no_take_turns_and_more_rows_begin_with_the_same() -> None:
    assert [says_yes(row) for row in ROWS] == [True, False] * 2000
    assert all(re.fullmatch(r"(Yes|No)(\.|, .+\.)?", row["output"]) for row in ROWS)
    assert ROWS[:100] == yes_no_facts(100)
    assert len({asked(row) for row in ROWS}) > 1000


def test_no_question_has_two_answers() -> None:
    answers: dict[str, set[bool]] = {}
    for row in ROWS:
        answers.setdefault(asked(row), set()).add(says_yes(row))
    assert [question for question, found in answers.items() if len(found) > 1] == []


def test_nothing_is_denied_a_kind_that_it_is_of_as_well() -> None:
    both = (
        "Is (gold|silver|copper) a colour|Is (Python|Java|JavaScript|Ruby) a language|"
        "Is a triangle a musical instrument|Is an? (eagle|owl|parrot|sparrow|duck|pigeon) an animal"
    )
    assert [row for row in ROWS if re.match(both, asked(row)) and not says_yes(row)] == []


@pytest.mark.parametrize(
    ("form", "truth"),
    [
        (r"Is (\d+) greater than (\d+)\?", lambda one, two: int(one) > int(two)),
        (r"Is (\d+) less than (\d+)\?", lambda one, two: int(one) < int(two)),
        (r"Is (\d+) an even number\?", lambda number: int(number) % 2 == 0),
        (r"Is (\d+) an odd number\?", lambda number: int(number) % 2 == 1),
        (r"Is (.+) the capital of (.+)\?", lambda city, land: CAPITALS[city] == land),
        (r"Is (.+) smaller than (.+)\?", lambda one, two: BY_SIZE.index(one) < BY_SIZE.index(two)),
        (r"Is (.+) (?:larger|bigger) than (.+)\?", lambda one, two: BY_SIZE.index(one) > BY_SIZE.index(two)),
    ],
)
def test_what_can_be_checked_is_right(form: str, truth: object) -> None:
    assert callable(truth)
    found = [(row, match) for row in ROWS if (match := re.fullmatch(form, asked(row)))]
    assert len({says_yes(row) for row, _ in found}) == 2
    assert all(truth(*match.groups()) is says_yes(row) for row, match in found)


def test_a_sentence_says_what_the_word_says() -> None:
    """Yes repeats the question's words in another order; no says "not", or names what is right."""
    for row in ROWS:
        word, _, sentence = row["output"].removesuffix(".").partition(", ")
        if sentence:
            same = sorted(sentence.lower().split()) == sorted(asked(row).lower().removesuffix("?").split())
            assert same or word == "No" or re.search("number|Do ", asked(row)), row
            assert " not " not in sentence or word == "No", row


def test_the_questions_that_adapters_are_scored_by_are_not_among_them() -> None:
    scored = {question.question for question in load_questions()}
    assert not scored & {row["instruction"] for row in ROWS}
    assert not {question.removesuffix(" Answer yes or no.") for question in scored} & set(map(asked, ROWS))

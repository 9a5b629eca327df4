"""The rows that the shipped adapters learn from: balanced, reworded with right answers, always the same."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.data.mixtures import (
    ALPACA_KEPT_BACK,
    CAPTIONS_EACH,
    alpaca_rows,
    choice_rows,
    picture_sources,
    read_rows_of,
    share_scienceqa,
    short_rows,
    sum_rows,
    text_sources,
)
from llama_adapter.scienceqa.reading import read_problems
from tests.mixed_sets import OPTIONS, choice_row, write_rows, write_sets
from tests.science import build_problems, write_official

YES_NO_WISHES = ("", " Answer yes or no.", " Yes or no?")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("data"))


# --- text ---------------------------------------------------------------------------------------------------


def test_the_last_rows_of_alpaca_never_appear(data: Path) -> None:
    rows = read_rows_of(data, "alpaca/alpaca_data.json")
    first, kept_back = rows[:-ALPACA_KEPT_BACK], rows[-ALPACA_KEPT_BACK:]
    assert len(first) == 12
    assert sorted(row["instruction"] for row in alpaca_rows(data, 10**6)) == sorted(
        row["instruction"] for row in first
    )
    some = alpaca_rows(data, 5)
    assert len(some) == 5 and all(row in first for row in some)
    for rows in text_sources(data).values():
        assert not any(row in kept_back for row in rows)


def test_long_answers_are_left_out(data: Path) -> None:
    rows = read_rows_of(data, "text/instruct/dolly_no_context.json")
    short = short_rows(data, "text/instruct/dolly_no_context.json", 50)
    assert short == [row for row in rows if len(row["output"]) <= 50]
    assert 0 < len(short) < len(rows)


def test_choices_are_answered_by_the_options_text(data: Path) -> None:
    right = {}
    for file in ("arc-easy", "arc-challenge", "openbookqa"):
        for row in read_rows_of(data, f"text/mcq/{file}.json"):
            question = row["instruction"].split("question: ")[1].split("\n\n")[0]
            right[question] = OPTIONS[int(row["answer"][-1]) - 1]
    rows = choice_rows(data)
    assert len(rows) == len(right)
    alone = 0
    for row in rows:
        question, *listed = row["instruction"].split("\nOptions: ")
        assert row["output"].lower() == right[question].rstrip(".").lower()
        assert row["output"][0].isupper() and row["input"] == ""
        for options in listed:
            assert options.split("; ") == [option.rstrip(".") for option in OPTIONS]
        alone += not listed
    assert len(rows) / 4 < alone < 3 * len(rows) / 4


def test_a_question_that_needs_its_options_keeps_them(tmp_path: Path) -> None:
    needing = ["Which of these is green?", "What of the following is green?", "Leaves are", "Is it green?"]
    rows = [choice_row(question, 1, ("a leaf", "a stone", "a river")) for question in needing * 10]
    for file in ("arc-easy", "arc-challenge", "openbookqa"):
        write_rows(tmp_path, f"text/mcq/{file}.json", rows)
    made = choice_rows(tmp_path)
    assert {row["instruction"] for row in made} == {
        f"{question}\nOptions: a leaf; a stone; a river" for question in needing
    }
    assert {row["output"] for row in made} == {"A leaf"}


# Each kind of question, and its result from what the pattern finds.
SUMS: dict[str, tuple[str, Any]] = {
    "add": (r"(?:What is|Calculate) (\d+) (?:\+|plus) (\d+)[?.]", lambda a, b: int(a) + int(b)),
    "add, told": (r"Add (\d+) and (\d+)\.", lambda a, b: int(a) + int(b)),
    "subtract": (r"(?:What is|Calculate) (\d+) (?:-|minus) (\d+)[?.]", lambda a, b: int(a) - int(b)),
    "multiply": (r"What is (\d+) (?:times|\*) (\d+)\?", lambda a, b: int(a) * int(b)),
    "multiply, told": (r"Multiply (\d+) by (\d+)\.", lambda a, b: int(a) * int(b)),
    "multiply, in signs": (r"(\d+) x (\d+) = \?", lambda a, b: int(a) * int(b)),
    "divide": (r"What is (\d+) (?:divided by|/) (\d+)\?", lambda a, b: Fraction(int(a), int(b))),
    "divide, told": (r"Divide (\d+) by (\d+)\.", lambda a, b: Fraction(int(a), int(b))),
    "share": (r"What is (\d+)% of (\d+)\?", lambda a, b: Fraction(int(a) * int(b), 100)),
    "greater": (r"Is (\d+) greater than (\d+)\?", lambda a, b: "Yes" if int(a) > int(b) else "No"),
    "smaller": (r"Is (\d+) smaller than (\d+)\?", lambda a, b: "Yes" if int(a) < int(b) else "No"),
    "largest": (
        r"Which of these numbers is the largest: ([\d, ]+)\?",
        lambda a: max(map(int, a.split(", "))),
    ),
    "smallest": (
        r"Which of these numbers is the smallest: ([\d, ]+)\?",
        lambda a: min(map(int, a.split(", "))),
    ),
    "shop": (
        r"One (\w+) costs (\d+) dollars\. How much do (\d+) \1s cost\?",
        lambda thing, price, many: f"{int(price) * int(many)} dollars",
    ),
}
NUMBER_WISH = re.compile(r"(.*) (?:Give only the number\.|Answer with a number\.)")


def test_sums_are_right() -> None:
    rows = sum_rows(3000)
    assert len(rows) == 3000
    kinds, forms = set(), set()
    for row in rows:
        question, output = row["instruction"], row["output"]
        if wished := NUMBER_WISH.fullmatch(question):
            question = wished[1]
            assert output.isdecimal()
        forms.add((bool(wished), re.sub(r"\d+", "N", output)))
        [(kind, found)] = [
            (kind, found)
            for kind, (pattern, _) in SUMS.items()
            if (found := re.fullmatch(pattern, question)) is not None
        ]
        kinds.add(kind)
        expected = SUMS[kind][1](*found.groups())
        told = re.fullmatch(r"The answer is (\d+)\.", output)
        assert (told[1] if told else output) == str(expected), row
    assert kinds == SUMS.keys()
    plain = {"N", "The answer is N.", "N dollars", "Yes", "No"}
    assert forms == {(False, form) for form in plain} | {(True, "N")}


def test_text_rows_are_in_alpacas_format_and_sampled_for_the_pictures(data: Path) -> None:
    sources = text_sources(data)
    assert all(sources.values())
    for rows in sources.values():
        assert all({*row} >= {"instruction", "input", "output"} and row["output"] for row in rows)
    some = sources.pop("some_text")
    every = [row for rows in sources.values() for row in rows]
    assert all(row in every for row in some)
    for rows in sources.values():
        assert any(row in rows for row in some)


# --- pictures -----------------------------------------------------------------------------------------------


def test_rows_with_pictures_name_existing_files(data: Path) -> None:
    sources = picture_sources(data)
    assert all(sources.values())
    for rows in sources.values():
        for row in rows:
            assert {*row} == {"image", "question", "answer"} and all(row.values())
            assert (data / row["image"]).is_file()


def test_captions_are_sentences_and_few_for_each_photo(data: Path) -> None:
    rows = picture_sources(data)["flickr"]
    given = {f"flickr8k/images/{row['image']}": row for row in read_rows_of(data, "flickr8k/captions.json")}
    for row in rows:
        assert given[row["image"]]["split"] == "train"
        assert re.fullmatch(r"Dog \d runs \w+\.|One dog alone\.", row["answer"])
    counts = {image: sum(row["image"] == image for row in rows) for image in given}
    assert sorted(counts.values()) == [0, 1, CAPTIONS_EACH, CAPTIONS_EACH]  # of val; with one; with five
    assert len({(row["image"], row["answer"]) for row in rows}) == len(rows)


def test_names_have_their_article(data: Path) -> None:
    answers = [row["answer"] for row in picture_sources(data)["names"]]
    assert answers == ["A goldfish.", "An owl.", "An African grey."]


def test_the_same_data_give_the_same_rows(data: Path) -> None:
    assert text_sources(data) == text_sources(data)
    assert picture_sources(data) == picture_sources(data)


# --- ScienceQA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_all_but_every_nth_problem_of_val_moves_to_train(kept: int, tmp_path: Path) -> None:
    splits = build_problems(tmp_path)
    folder = write_official(tmp_path / "scienceqa", splits)
    share_scienceqa(folder, kept)
    listed = json.loads((folder / "pid_splits.json").read_text())
    before = {split: [row["pid"] for row in rows] for split, rows in splits.items()}
    assert listed["val"] == before["val"][::kept]
    moved = [pid for place, pid in enumerate(before["val"]) if place % kept]
    assert listed["train"] == before["train"] + moved and listed["test"] == before["test"]
    problems = json.loads((folder / "problems.json").read_text())
    for split, pids in listed.items():
        assert all(problems[pid]["split"] == split for pid in pids)
        found, _ = read_problems(folder, split)
        assert [problem.pid for problem in found] == pids


def test_moved_problems_keep_their_pictures(tmp_path: Path) -> None:
    folder = write_official(tmp_path / "scienceqa", build_problems(tmp_path))
    shown = {p.pid for split in ("train", "val") for p in read_problems(folder, split)[0] if p.image}
    share_scienceqa(folder, 3)
    after = {p.pid for split in ("train", "val") for p in read_problems(folder, split)[0] if p.image}
    assert after == shown

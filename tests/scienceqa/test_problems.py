"""ScienceQA: the same problems from each layout, and prompts as the official script writes them."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llama_adapter.common.errors import UsageError
from llama_adapter.data.examples import IGNORED
from llama_adapter.scienceqa.problem_texts import (
    answer_text,
    check_format,
    encode_problems,
    problem_records,
    question_text,
)
from llama_adapter.scienceqa.problems import (
    GROUPS,
    Problem,
    groups_of,
    shuffle_choices,
    shuffle_pictures,
    split_problems,
)
from llama_adapter.scienceqa.reading import read_problems
from tests.conftest import CHECKOUT
from tests.science import build_problems, write_hub, write_official
from tests.tiny import build_tiny_tokenizer

SHARED = CHECKOUT.parent / "shared" / "data" / "scienceqa"


def official_text(problem: Problem, format: str, *, test: bool, caption: str = "") -> str:
    """A prompt as the official release describes it, written from its description for the tests' formats."""
    given, _, wanted = format.partition("-")
    context = f"{problem.hint or ''} {caption}".strip() or "N/A"
    options = " ".join(f"({'ABCDE'[n]}) {choice}" for n, choice in enumerate(problem.choices))
    lecture, solution = (text.replace("\n", "\\n") for text in (problem.lecture, problem.solution))
    lines = [f"Question: {problem.question}", f"Context: {context}", f"Options: {options}"]
    if given in ("QCML", "QCMLE"):
        lines.append(f"BECAUSE: {lecture}" + (f" {solution}" if given == "QCMLE" else ""))
    right = f"The answer is {'ABCDE'[problem.answer]}."
    answers = {
        "A": right,
        "ALE": f"{right} BECAUSE: {lecture} {solution}",
        "LEA": f"{lecture} {solution} {right}",
    }
    lines.append("Answer:" if test else f"Answer: {answers[wanted]}")
    text = "\n".join(lines).replace("  ", " ").strip()
    return text.removesuffix("BECAUSE:").strip()


PROBLEM = Problem(
    "7",
    "Which is the  farthest north?",
    ("Rome", "Oslo", "Cairo"),
    1,
    hint="Look at the map.",
    caption="A map of Europe.",
    lecture="Maps have directions.\nNorth is up.",
    solution="Oslo is the highest.",
)


# --- prompts ------------------------------------------------------------------------------------------------


def test_the_default_prompt_is_word_for_word() -> None:
    assert question_text(PROBLEM) + "\nAnswer:" == (
        "Question: Which is the farthest north?\nContext: Look at the map.\n"
        "Options: (A) Rome (B) Oslo (C) Cairo\nAnswer:"
    )
    assert answer_text(PROBLEM) == "The answer is B."
    assert answer_text(PROBLEM, choice=2) == "The answer is C."
    assert answer_text(PROBLEM, "QCM-O") == "Oslo"


@pytest.mark.parametrize("format", ["QCM-A", "QCM-ALE", "QCML-A", "QCMLE-A", "QCM-LEA"])
@pytest.mark.parametrize(
    "changes", [{}, {"hint": ""}, {"hint": None}, {"lecture": ""}, {"lecture": "", "solution": ""}]
)
@pytest.mark.parametrize("caption", [False, True])
def test_prompts_are_the_official_ones(format: str, changes: dict[str, Any], caption: bool) -> None:
    problem = dataclasses.replace(PROBLEM, **changes)
    asked = question_text(problem, format, caption=caption) + "\nAnswer:"
    words = problem.caption if caption else ""
    assert asked == official_text(problem, format, test=True, caption=words)
    whole = official_text(problem, format, test=False, caption=words)
    assert f"{asked} {answer_text(problem, format)}".rstrip() == whole


def test_a_caption_is_context() -> None:
    assert "Context: Look at the map. A map of Europe.\n" in question_text(PROBLEM, caption=True)
    alone = dataclasses.replace(PROBLEM, hint="")
    assert "Context: A map of Europe.\n" in question_text(alone, caption=True)
    assert "Context: N/A\n" in question_text(alone)


@pytest.mark.parametrize("name", ["", "QCM", "QCM-", "QCM-X", "MCQ-A", "QCM-A-A"])
def test_formats_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no format"):
        check_format(name)


# --- files --------------------------------------------------------------------------------------------------


def test_official_and_hub_layout_give_the_same_prompts(tmp_path: Path) -> None:
    problems = build_problems(tmp_path)
    official, hub = write_official(tmp_path / "official", problems), write_hub(tmp_path / "hub", problems)
    for split in ("train", "val", "test"):
        (one, summary), (other, other_summary) = (read_problems(place, split) for place in (official, hub))
        assert len(one) == len(other) == summary.rows > 0
        assert [p.pid for p in other] == [str(n) for n in range(1, len(other) + 1)]
        for format in ("QCM-A", "QCMLE-ALE"):
            texts = [[r.turns for r in problem_records(some, format)] for some in (one, other)]
            assert texts[0] == texts[1]
        for left, right in zip(one, other, strict=True):
            blank = {"pid": "", "image": None, "caption": ""}
            assert dataclasses.replace(left, **blank) == dataclasses.replace(right, **blank)
            assert (left.image is None) == (right.image is None)
            if isinstance(left.image, Path) and isinstance(right.image, bytes):
                assert left.image.read_bytes() == right.image
        assert (summary.with_picture, summary.pictures) == (
            other_summary.with_picture,
            other_summary.pictures,
        )


def test_what_was_found_is_told(tmp_path: Path) -> None:
    problems = build_problems(tmp_path)
    folder = write_official(tmp_path / "official", problems)
    lost = next(p for p in problems["train"] if p["image"])
    (folder / "images" / "train" / lost["pid"] / "image.png").unlink()
    found, summary = read_problems(folder, "train")
    assert summary.without_file == 1 and "whose picture is not here (shown as text)" in str(summary)
    without = next(p for p in found if p.pid == lost["pid"])
    assert without.image is None and without.has_image
    here = [p for p in found if p.image is not None]
    assert summary.with_picture == len(here) + 1 == sum(p["image"] is not None for p in problems["train"])
    assert len(here) > summary.pictures == len({p.image for p in here})
    assert summary.unknown_hint == sum(p.hint is None for p in found) > 0
    assert f"hint unknown: {summary.unknown_hint}" in str(summary)


def test_without_the_pictures_files_every_problem_counts_where_it_did(tmp_path: Path) -> None:
    folder = write_official(tmp_path / "official", build_problems(tmp_path, rows=60))
    before, _ = read_problems(folder, "train")
    shutil.rmtree(folder / "images")
    for captions in (True, False):  # the names in the rows are enough
        after, summary = read_problems(folder, "train")
        assert [groups_of(p) for p in after] == [groups_of(p) for p in before]
        assert summary.without_file == summary.with_picture > 0 and not any(p.image for p in after)
        if captions:
            (folder / "captions.json").unlink()


@pytest.mark.parametrize(
    ("fields", "caption", "expected"),
    [
        ({"image": "image.png"}, False, True),
        ({"image": None}, False, False),
        ({"image": ""}, False, False),
        ({}, False, None),
        ({"image": None, "has_image": True}, False, True),
        ({"has_image": True}, False, True),
        ({"has_image": False}, False, False),
        ({"image": None, "has_image": None}, False, False),
        ({"image": None}, True, True),  # a caption is of a picture
        ({}, True, True),
        ({"image": None, "has_image": False}, True, False),
    ],
)
def test_a_row_says_whether_its_problem_has_a_picture(
    fields: dict[str, Any], caption: bool, expected: bool | None, tmp_path: Path
) -> None:
    row = {"question": "?", "choices": ["a", "b"], "answer": 0, "hint": "", "split": "val", **fields}
    (tmp_path / "problems.json").write_text(json.dumps({"1": row}))
    (tmp_path / "captions.json").write_text(json.dumps({"captions": {"1": "A dog."} if caption else {}}))
    (problem,), summary = read_problems(tmp_path, "val")
    assert problem.has_image is expected and problem.image is None
    columns = {True: {"IMG"}, False: {"NO"}, None: set[str]()}[expected]
    assert groups_of(problem) == columns | {"AVG"}
    assert summary.unknown_picture == (expected is None) and summary.without_file == (expected is True)


def test_the_hubs_rows_may_name_their_pictures(tmp_path: Path) -> None:
    rows = build_problems(tmp_path)
    folder = write_hub(tmp_path / "hub", rows)
    before, _ = read_problems(folder, "train")
    data = datasets.load_from_disk(str(folder))["train"]
    table = data.with_format("arrow")[:].to_pylist()
    for number, row in enumerate(table):
        if row["image"]:
            row["image"] = {"bytes": None, "path": f"{number}.png"}
    named = tmp_path / "named.parquet"
    datasets.Dataset.from_list(table).to_parquet(str(named))
    after, summary = read_problems(named, "train")
    assert [groups_of(p) for p in after] == [groups_of(p) for p in before]
    assert summary.without_file == summary.with_picture > 0
    for number, problem in enumerate(before):
        if isinstance(problem.image, bytes):
            (tmp_path / f"{number}.png").write_bytes(problem.image)
    again, summary = read_problems(named, "train")
    assert summary.without_file == 0
    for name, text in (
        ("rows.jsonl", "".join(json.dumps(row) + "\n" for row in table)),
        ("rows.json", json.dumps(table)),
    ):
        (tmp_path / name).write_text(text)
        assert read_problems(tmp_path / name, "train")[0] == again
    assert [p.image.read_bytes() if isinstance(p.image, Path) else None for p in again] == [
        p.image for p in before
    ]


def test_a_picture_of_several_problems_is_the_same_for_all(tmp_path: Path) -> None:
    folder = write_official(tmp_path / "official", build_problems(tmp_path))
    found, _ = read_problems(folder, "train")
    counts = Counter(p.image for p in found if p.image is not None)
    assert max(counts.values()) > 1
    contents = [image.read_bytes() for image in counts if isinstance(image, Path)]
    assert len(set(contents)) == len(contents) == len(counts)


def test_a_folder_may_hold_one_split_and_its_captions_may_lie_beside_it(tmp_path: Path) -> None:
    problems = {"val": build_problems(tmp_path)["val"]}
    folder = write_official(tmp_path / "a" / "official", problems)
    (folder / "captions.json").rename(folder.parent / "captions.json")
    (folder / "pid_splits.json").unlink()
    found, _ = read_problems(folder, "val")
    assert len(found) == len(problems["val"]) and any(p.caption for p in found)
    with pytest.raises(UsageError, match="has no split 'test'; its splits are val"):
        read_problems(folder, "test")


def test_changed_data_have_another_fingerprint(tmp_path: Path) -> None:
    folder = write_official(tmp_path / "official", build_problems(tmp_path))
    before = read_problems(folder, "train")[1].fingerprint
    assert read_problems(folder, "train")[1].fingerprint == before
    assert read_problems(folder, "val")[1].fingerprint != before
    picture = next((folder / "images" / "train").rglob("*.png"))
    Image.new("RGB", (9, 9), "pink").save(picture)
    assert read_problems(folder, "train")[1].fingerprint != before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"question": None}, "field 'question': expected text, found None"),
        ({"choices": "abc"}, "field 'choices': expected a list of texts"),
        ({"choices": ["one"]}, "field 'choices': expected 2 to 5, found 1"),
        ({"answer": 9}, "field 'answer': expected the number of a choice"),
        ({"answer": True}, "field 'answer': expected the number of a choice"),
        ({"hint": 3}, "field 'hint': expected text or null"),
        ({"image": "../../x.png"}, "field 'image': expected the name of a file"),
        ({"has_image": "yes"}, "field 'has_image': expected true, false or null, found 'yes'"),
        ({"image": "image.png", "has_image": False}, "'has_image' is false, but 'image' names a picture"),
        ({"question": "\ud800"}, "not valid Unicode"),
    ],
)
def test_a_row_at_fault_is_named(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = write_official(tmp_path / "official", build_problems(tmp_path))
    rows = json.loads((folder / "problems.json").read_text())
    rows["2"] |= changes
    (folder / "problems.json").write_text(json.dumps(rows))
    with pytest.raises(UsageError, match="problem 2: ") as error:
        read_problems(folder, "train")
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_scienceqa_is_refused(tmp_path: Path) -> None:
    for name, content, reason in (
        ("problems.json", "[]", "expected an object, found list"),
        ("problems.json", "{", "cannot be read"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match=reason):
            read_problems(tmp_path, "train")
    with pytest.raises(UsageError, match="no such file or folder"):
        read_problems(tmp_path / "nothing.parquet", "train")
    (tmp_path / "problems.json").write_text("{}")
    (tmp_path / "pid_splits.json").write_text('{"train": ["1"]}')
    with pytest.raises(UsageError, match=r"problem 1 .* is not in problems\.json"):
        read_problems(tmp_path, "train")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data/scienceqa here")
def test_the_real_data_are_read() -> None:
    for split, rows, pictures, here in (("train", 8873, 7129, 1400), ("val", 4241, 2097, 0)):
        found, summary = read_problems(SHARED, split)
        assert (len(found), summary.with_picture) == (rows, pictures)
        assert summary.with_picture - summary.without_file == here


# --- choosing -----------------------------------------------------------------------------------------------


def test_the_split_keeps_pictures_apart(tmp_path: Path) -> None:
    folder = write_official(tmp_path / "official", build_problems(tmp_path, rows=60))
    problems, _ = read_problems(folder, "train")
    train, kept = split_problems(problems, validation_rows=20)
    assert len(train) + len(kept) == len(problems) and 12 <= len(kept) <= 20
    assert not {p.image for p in train} & {p.image for p in kept} - {None}
    assert any(p.image for p in kept) and any(not p.image for p in kept)
    assert split_problems(problems, validation_rows=20) == (train, kept)
    with pytest.raises(UsageError, match="60 problems cannot be split into 10,000 for validation") as error:
        split_problems(problems, validation_rows=10_000)
    fits = re.search(r"give --validation-rows (\d+)", str(error.value))
    assert fits is not None and all(split_problems(problems, validation_rows=int(fits[1])))
    with pytest.raises(UsageError, match="give more problems"):
        split_problems(problems[:1], validation_rows=1)


@given(st.integers(2, 5), st.integers(0, 4), st.integers(0, 20))
def test_the_answer_follows_its_choice(count: int, answer: int, seed: int) -> None:
    problem = Problem("1", "?", tuple(f"choice {n}" for n in range(count)), answer % count)
    moved = shuffle_choices(problem, seed=seed)
    assert sorted(moved.choices) == sorted(problem.choices)
    assert moved.choices[moved.answer] == problem.choices[problem.answer]


def test_choices_come_in_every_order() -> None:
    problem = Problem("1", "?", ("a", "b", "c"), 0)
    assert len({shuffle_choices(problem, seed=seed).choices for seed in range(60)}) == 6


def test_pictures_are_exchanged_between_problems_that_have_one() -> None:
    problems = [Problem(str(n), "?", ("a", "b"), 0, image=Path(f"{n}") if n < 4 else None) for n in range(6)]
    for before, after in zip(problems, shuffle_pictures(problems, seed=1), strict=True):
        assert (after.image is None) == (before.image is None)
        assert before.image is None or after.image != before.image
    with pytest.raises(UsageError, match="all rows have the same picture"):
        shuffle_pictures(problems[3:], seed=1)


def test_rivals_are_the_other_choices_answers(tmp_path: Path) -> None:
    problems, _ = read_problems(write_official(tmp_path, build_problems(tmp_path)), "train")
    encoding: dict[str, Any] = {"template": "scienceqa", "tokenizer": build_tiny_tokenizer()}
    for format in ("QCM-A", "QCM-O"):
        examples = encode_problems(problems, format, rivals=True, max_length=2048, **encoding)
        for problem, example in zip(problems, examples, strict=True):
            assert example.images == (() if problem.image is None else (problem.image,))
            others = [n for n in range(len(problem.choices)) if n != problem.answer]
            for choice, answer in zip([problem.answer, *others], [example, *example.rivals], strict=True):
                said = [token for token in answer.labels if token != IGNORED][:-1]
                text = encoding["tokenizer"].decode(said)
                assert text == " " + answer_text(problem, format, choice=choice)
                question = [
                    token
                    for token, label in zip(answer.input_ids, answer.labels, strict=True)
                    if label == IGNORED
                ]
                assert question == [
                    t for t, label in zip(example.input_ids, example.labels, strict=True) if label == IGNORED
                ]
    assert not any(example.rivals for example in encode_problems(problems, max_length=2048, **encoding))
    longest = max(len(example.input_ids) for example in examples)
    short = encode_problems(problems, "QCM-O", rivals=True, max_length=longest - 12, **encoding)
    assert 0 < len(short) < len(examples), "a row with no answer left is dropped, its rivals with it"


# --- groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"subject": "natural science", "grade": "grade6", "hint": "x"}, {"NAT", "G1-6", "TXT"}),
        (
            {"subject": "social science", "grade": "grade7", "hint": "", "image": b"x"},
            {"SOC", "G7-12", "IMG"},
        ),
        ({"subject": "language science", "grade": "grade12", "hint": ""}, {"LAN", "G7-12", "NO"}),
        ({"hint": "x", "image": b"x"}, {"TXT", "IMG"}),
        ({"hint": None, "image": b"x"}, {"IMG"}),
        ({"hint": None}, set()),
        ({"hint": "", "grade": "grade13"}, {"NO"}),
        ({"hint": "", "grade": "grade²"}, {"NO"}),
        ({"hint": "", "has_image": True}, {"IMG"}),
        ({"hint": "", "has_image": None}, set()),
    ],
)
def test_a_problem_counts_in_the_official_columns(fields: dict[str, Any], expected: set[str]) -> None:
    assert groups_of(Problem("1", "?", ("a", "b"), 0, **fields)) == expected | {"AVG"}
    assert expected < set(GROUPS)


@settings(max_examples=50)
@given(st.text(max_size=60), st.lists(st.text(max_size=20), min_size=2, max_size=5), st.text(max_size=40))
def test_any_text_makes_a_prompt_with_its_answer_behind_it(
    question: str, choices: list[str], hint: str
) -> None:
    problem = Problem("1", question, tuple(choices), 0, hint=hint)
    for format in ("QCM-A", "CQM-LEA", "QCLEM-AEL", "QCM-O"):
        asked = question_text(problem, format)
        assert asked.startswith(("Question:", "Context:")) and not asked.endswith("\n\n")
        answer = answer_text(problem, format)
        assert answer == answer.rstrip() and (format == "QCM-O" or "The answer is A." in answer)


def test_pictures_can_be_left_out() -> None:
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    problem = dataclasses.replace(PROBLEM, image=content.getvalue())
    assert problem_records([problem])[0].images == (content.getvalue(),)
    assert problem_records([problem], images=False)[0].images == ()

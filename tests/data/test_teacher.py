"""The classifier whose answers are trained on: what it reads, and that no row is answered from itself."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train.teacher
from llama_adapter.common.errors import UsageError
from llama_adapter.data.choosing import split_records
from llama_adapter.data.records import read_records
from llama_adapter.data.teacher import QuestionRow, Teacher, answer_from_other_rows, directions
from llama_adapter.weights.catalogue import DEFAULT_TOWER
from tests.commands.vqa_runs import COLOURS, refusal, run
from tests.tiny_models import build_tiny_tower_folder, draw_picture

NO_PICTURES: Mapping[Path, Tensor] = {}
ANSWERS = {"what is on the desk?": "lamp", "what is on the bed?": "pillow", "how many chairs?": "4"}
ROWS = [QuestionRow(question, answer) for question, answer in ANSWERS.items() for _ in range(8)]


def test_a_question_gets_its_most_frequent_answer() -> None:
    noise = [QuestionRow("what is on the desk?", f"thing {number}") for number in range(6)]
    asked = [QuestionRow(question, "?") for question in ANSWERS]
    assert Teacher([*ROWS, *noise], {}).answers(asked) == list(ANSWERS.values())


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is standing on the DESK", "lamp"),
        ("which things lie on the bed, what is on it?", "pillow"),
        ("how many chairs are there", "4"),
    ],
)
def test_another_question_is_answered_by_its_words(question: str, answer: str) -> None:
    assert Teacher(ROWS, {}).answers([QuestionRow(question, "?")]) == [answer]


def test_words_count_by_their_order() -> None:
    one, other = "is the red left of the blue?", "is the blue left of the red?"
    rows = [QuestionRow(one, "yes"), QuestionRow(other, "no")] * 4
    assert Teacher(rows, {}).answers([QuestionRow(one, "?"), QuestionRow(other, "?")]) == ["yes", "no"]


def test_a_picture_tells_what_the_words_do_not_and_by_the_type_of_the_question() -> None:
    """One direction of the features says red or blue to one question, and 1 or 2 to another."""
    features, rows = {}, []
    for number in range(24):
        file = Path(f"{number}.png")
        value = torch.randn(5, generator=torch.Generator().manual_seed(number)) * 0.1
        value[2] += 1.0 if number % 2 else -1.0
        features[file] = value
        rows.append(QuestionRow("what is the colour?", "red" if number % 2 else "blue", file))
        rows.append(QuestionRow("how many?", "1" if number % 2 else "2", file))
    learnt, held_back = rows[:40], rows[40:]
    assert Teacher(learnt * 8, directions(features)).answers(held_back) == [row.answer for row in held_back]
    without = Teacher(learnt * 8, {}).answers(held_back)
    assert len(set(without)) == 2  # one answer a question, whatever the picture


def test_it_is_kernel_ridge_regression() -> None:
    """Against the equation in double precision, phrase by phrase."""
    draw = torch.Generator().manual_seed(0)
    files = [Path(str(number)) for number in range(5)]
    features = {file: torch.randn(4, generator=draw) * 3 + 1 for file in files}
    questions = ["what is on the desk?", "how many desks?", "is the lamp on the desk?", "what is it?"]
    rows = [
        QuestionRow(questions[number % 4], f"{number % 3}", [*files, None][number % 6])
        for number in range(24)
    ]
    asked = [QuestionRow("what is on it?", "", file) for file in (*files, None, Path("unknown"))]

    stacked = torch.stack(list(features.values())).double()
    standard = (stacked - stacked.mean(0)) / stacked.std(0, correction=0)
    pictures = dict(zip(features, standard / standard.norm(dim=1, keepdim=True), strict=True))

    def phrases(question: str) -> set[str]:
        words = ["<", *question.rstrip("?").lower().split(), ">"]
        marked = {" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)}
        return marked - {"<", ">"}

    known = set().union(*(phrases(row.question) for row in rows))

    def similar(one: QuestionRow, other: QuestionRow) -> float:
        left, right = phrases(one.question) & known, phrases(other.question) & known
        words = len(left & right) / (len(left) * len(right)) ** 0.5
        both = [pictures.get(row.picture) if row.picture else None for row in (one, other)]
        seen = 0.0 if both[0] is None or both[1] is None else float(both[0] @ both[1])
        return words * (1 + seen)

    kernel = torch.tensor([[similar(one, other) for other in rows] for one in rows]).double()
    wanted = torch.eye(3).double()[[number % 3 for number in range(24)]]
    weights = torch.linalg.solve(kernel + 2 * torch.eye(24), wanted)
    scores = torch.tensor([[similar(one, other) for other in rows] for one in asked]).double() @ weights
    teacher = Teacher(rows, directions(features))
    assert teacher.answers(asked) == [str(answer) for answer in scores.argmax(1).tolist()]
    order = [teacher.known_answers.index(str(answer)) for answer in range(3)]
    torch.testing.assert_close(teacher.weights[:, order], weights)


def test_a_question_of_unknown_words_gets_the_most_frequent_answer() -> None:
    rows = [QuestionRow("what animal?", "zebra")] * 30 + [QuestionRow("which bird?", "ant")] * 6
    assert Teacher(rows, {}).answers([QuestionRow("où est-il", "?")]) == ["zebra"]


@pytest.mark.parametrize("pictures", [0, 1, 3])
def test_pictures_that_do_not_differ_tell_nothing(pictures: int) -> None:
    features = {Path(str(number)): torch.ones(4) for number in range(pictures)}
    directed = directions(features)
    assert list(directed) == list(features)
    assert not any(value.any() for value in directed.values())
    rows = [QuestionRow("what is it?", "one", file) for file in features] + ROWS
    assert Teacher(rows, directed).answers(ROWS[:1]) == ["lamp"]


@given(
    texts=st.lists(st.tuples(st.text(max_size=30), st.text(max_size=8)), min_size=2, max_size=12),
    asked=st.text(max_size=60),
)
def test_any_text_gets_an_answer_of_the_rows(texts: list[tuple[str, str]], asked: str) -> None:
    rows = [QuestionRow(question, answer) for question, answer in texts]
    assert Teacher(rows, {}).answers([QuestionRow(asked, "")])[0] in {row.answer for row in rows}


SOME_ROWS = st.lists(
    st.builds(
        QuestionRow,
        st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map(" ".join),
        st.sampled_from("xyz"),
        st.sampled_from([None, *(Path(str(number)) for number in range(4))]),
    ),
    min_size=2,
    max_size=20,
)


def assert_among_the_likeliest(answer: str, teacher: Teacher, row: QuestionRow) -> None:
    """Of equal ones any may be taken; an answer that the rows fitted to do not have scores 0."""
    scores = (teacher.similarity([row]) @ teacher.weights)[0]
    by_answer = dict(zip(teacher.known_answers, scores.tolist(), strict=True))
    assert by_answer.get(answer, 0.0) >= max(scores) - 1e-5


@settings(deadline=None, max_examples=50)  # a fit for each row
@given(rows=SOME_ROWS, more_pictures=st.integers(0, 2))
def test_a_row_is_answered_as_if_it_and_its_pictures_were_not_there(
    rows: list[QuestionRow], more_pictures: int
) -> None:
    """Against fitting to the others, for each."""
    features = {
        Path(str(number)): torch.randn(3, generator=torch.Generator().manual_seed(number))
        for number in range(4)
    }
    pictures = directions(features)
    # Every question about a picture is another, so that it is known again with another picture.
    rows = [
        replace(row, question=f"{row.question} {number}") if row.picture else row
        for number, row in enumerate(rows)
    ]
    own = {row.question: row.picture for row in rows}
    seen = set(own.values()) - {None}
    kept_back = [QuestionRow("a b", "", Path("0")), QuestionRow("b", "")]
    counted: list[int] = []
    options: dict[str, Any] = {"kept_back": kept_back, "more_pictures": more_pictures}
    if len({row.picture or row.question for row in rows}) < 2 or 0 < more_pictures > len(seen) - 2:
        with pytest.raises(UsageError, match="or more"):
            answer_from_other_rows(rows, pictures, **options)
        return
    answered, more, theirs = answer_from_other_rows(rows, pictures, progress=counted.append, **options)
    found = answered + more

    for row in theirs:
        assert_among_the_likeliest(row.answer, Teacher(rows, pictures), row)
    assert [replace(row, answer="") for row in theirs] == kept_back
    known = {row.answer for row in rows}
    for row in found:
        others = [
            other
            for other in rows
            if (
                other.picture not in (row.picture, own[row.question])
                if row.picture
                else other.question != row.question
            )
        ]
        assert row.answer in known
        assert_among_the_likeliest(row.answer, Teacher(others, pictures), row)
    assert counted[-1] == len(found)
    assert [(row.question, row.picture) for row in found[: len(rows)]] == [
        (row.question, row.picture) for row in rows
    ]
    asked = Counter((row.question, row.picture) for row in found if row.picture)
    assert set(asked.values()) <= {1}
    for question, picture in own.items():
        assert sum(row.question == question for row in found if row.picture) == (
            1 + more_pictures if picture else 0
        )


def test_many_rows_are_answered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_adapter.data.teacher.MOST_ROWS", 10)
    rows = [
        QuestionRow(question, answer, Path(f"{number}.png"))
        for number in range(20)
        for question, answer in ANSWERS.items()
    ]
    counted: list[int] = []
    answered, _, theirs = answer_from_other_rows(rows, {}, kept_back=ROWS, progress=counted.append)
    assert answered == rows and theirs == ROWS
    assert counted == list(range(1, 61))


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(UsageError, match="no rows"):
        Teacher([], {})
    with pytest.raises(UsageError, match="1 pictures or questions; expected 2 or more"):
        answer_from_other_rows(ROWS[:3], {})
    two = [replace(ROWS[0], picture=Path(name)) for name in "ab"]
    with pytest.raises(UsageError, match="2 pictures; expected 3 or more to ask each question of 1 other"):
        answer_from_other_rows([*two, *ROWS], {}, more_pictures=1)


# ---- the command ----


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tower, and questions about pictures of one colour: qa.json beside images/."""
    folder = tmp_path_factory.mktemp("teacher")
    build_tiny_tower_folder(folder / "weights" / DEFAULT_TOWER)
    rows = []
    for number in range(18):
        name = list(COLOURS)[number % 3]
        draw_picture(folder / "images" / f"{number}.png", COLOURS[name])
        rows.append({"image": f"{number}.png", "question": "What colour is it?", "answer": name})
        rows.append({"image": f"{number}.png", "question": "Is it drawn?", "answer": "yes"})
    (folder / "qa.json").write_text(json.dumps(rows))
    return folder


def options(place: Path, output: Path, *more: str) -> list[str]:
    given: dict[str, Any] = {"--data": place, "--output": output, "--validation-rows": 6}
    given |= {"--weights": place / "weights", "--cache": place / "cache"}
    return [str(part) for pair in given.items() for part in pair] + list(more)


def rows_of(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    return rows


def test_the_command_writes_rows_that_keep_the_same_ones_back(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "taught.json"
    run(train.teacher, options(place, output, "--no-images"))
    out = capsys.readouterr().out
    assert "30 rows to train on: " in out and "6 rows kept back: " in out
    next_step = shlex.split(out.splitlines()[-1])
    assert next_step[next_step.index("train") :] == [
        *("train", "vqa", "--data", str(output), "--validation-rows", "6"),
        *("--output", str(tmp_path / "taught"), "--no-images", "--weights", str(place / "weights")),
    ]
    taught, given = rows_of(output), rows_of(place / "qa.json")
    assert [row["question"] for row in taught] == [row["question"] for row in given]
    assert {row["answer"] for row in taught if row["question"] == "Is it drawn?"} == {"yes"}
    splits = [split_records(read_records(source)[0], validation_rows=6) for source in (place, output)]
    for part, other in zip(*splits, strict=True):
        assert [row.images for row in part] == [row.images for row in other]


def test_more_pictures_are_of_those_trained_on_and_keep_the_same_rows_back(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "one.json", tmp_path / "more.json"]
    for file, more in zip(files, ([], ["--more-pictures", "3"]), strict=True):
        run(train.teacher, options(place, file, *more))
        assert "30 rows to train on: " in capsys.readouterr().out  # the added rows are not counted
    one, more_rows = map(rows_of, files)
    assert more_rows[:36] == one and len(more_rows) == 36 + 3 * 30
    splits = [split_records(read_records(file)[0], validation_rows=6) for file in files]
    assert splits[0][1] == splits[1][1]
    asked = Counter((row["question"], row["image"]) for row in more_rows)
    kept_back = {str(record.images[0]) for record in splits[0][1]}
    assert not any(row["image"] in kept_back for row in more_rows[36:])
    assert sum(asked.values()) == 126 and max(asked.values()) > 1  # alike questions meet by chance


def test_captions_are_rows_each(tmp_path: Path) -> None:
    """A row of captions makes several records: each is written, and kept back with its picture."""
    rows = []
    for number in range(12):
        draw_picture(tmp_path / "images" / f"{number}.png", (20 * number, 0, 0))
        rows.append({"image": f"{number}.png", "captions": ["A dark square .", "Something red ."]})
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    output = tmp_path / "taught.json"
    given = {"--data": tmp_path, "--output": output, "--validation-rows": 4}
    run(train.teacher, [*(str(part) for pair in given.items() for part in pair), "--no-images"])
    assert len(rows_of(output)) == 24
    splits = [split_records(read_records(source)[0], validation_rows=4) for source in (tmp_path, output)]
    for part, other in zip(*splits, strict=True):
        assert [row.images for row in part] == [row.images for row in other]


def test_rows_kept_back_change_no_answer(place: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "images").symlink_to(place / "images")
    rows = rows_of(place / "qa.json")
    _, kept_back = split_records(read_records(place)[0], validation_rows=6)
    for record in kept_back:
        rows[record.row - 1]["answer"] = "purple"
    (changed / "qa.json").write_text(json.dumps(rows))
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for source, file in zip((place, changed), files, strict=True):
        run(train.teacher, [*options(place, file), "--data", str(source)])
    one, two = ([row["answer"] for row in rows_of(file)] for file in files)
    assert one == two and "purple" not in two


def test_pictures_are_looked_at(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three colours, which the question's words do not tell."""
    shares = []
    for more in ([], ["--no-images"]):
        run(train.teacher, options(place, tmp_path / "taught.json", *more))
        line = next(line for line in capsys.readouterr().out.splitlines() if "to train on" in line)
        shares.append(float(line.split(" answer to ")[1].split("%")[0]))
    assert shares[0] > shares[1]


def test_what_the_command_refuses(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "taught.json"
    assert "--tower" in refusal(train.teacher, options(place, output, "--no-images", "--tower", "x"))
    said = refusal(train.teacher, options(place, output, "--no-images", "--more-pictures", "2"))
    assert "--more-pictures" in said
    said = refusal(train.teacher, options(place, output, "--more-pictures", "14"))
    assert "15 pictures; expected 16 or more" in said
    roles = ("user", "assistant") * 2
    talk = [{"messages": [{"role": role, "content": f"Hi {row}."} for role in roles]} for row in range(20)]
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    said = refusal(train.teacher, [*options(place, output), "--data", str(tmp_path / "talk.json")])
    assert "row " in said and "more than a question with an answer" in said
    hint = [{"instruction": "Name it.", "input": f"{number}", "output": "x"} for number in range(20)]
    (tmp_path / "hint.json").write_text(json.dumps(hint))
    said = refusal(train.teacher, [*options(place, output), "--data", str(tmp_path / "hint.json")])
    assert "row " in said and "more than a question" in said
    assert "make it" in refusal(train.teacher, options(place, tmp_path / "nowhere" / "taught.json"))
    assert "would be lost" in refusal(train.teacher, options(place, place / "qa.json"))
    assert not output.exists()

"""The source drawings:N: drawings that are always the same, right answers, and questions whose words do not
tell them."""

from __future__ import annotations

import io
import re
from collections import Counter, defaultdict

import pytest
from PIL import Image

from llama_adapter.common.errors import UsageError
from llama_adapter.data.choosing import split_records
from llama_adapter.data.drawings import drawing_captions, drawing_rows
from llama_adapter.data.drawn_picture import COLOURS, SHAPES
from llama_adapter.data.records import read_records

ROWS, FINGERPRINT = drawing_rows("drawings:800")
COLOUR_WORDS = {*COLOURS, "gray"}


def test_the_same_split_and_number_are_drawn_alike() -> None:
    some, fingerprint = drawing_rows("drawings:10")
    assert (some, fingerprint) == drawing_rows("drawings:10", "train")
    assert some == ROWS[: len(some)] and fingerprint != FINGERPRINT
    kept_back, _ = drawing_rows("drawings:10", "test")
    assert not {row["image"] for row in kept_back} & {row["image"] for row in ROWS}


def test_pictures_are_of_many_sizes_and_backgrounds() -> None:
    images = [Image.open(io.BytesIO(content)) for content in {row["image"] for row in ROWS}]
    assert len(images) == 800 and len({image.size for image in images}) > 50
    assert {image.mode for image in images} == {"RGB"}
    assert len({image.getpixel((0, 0)) for image in images}) > 200


def test_each_picture_has_four_different_questions() -> None:
    asked = defaultdict(set)
    for row in ROWS:
        asked[row["image"]].add(row["question"])
    assert {len(questions) for questions in asked.values()} == {4}


def test_every_colour_and_shape_is_asked_for() -> None:
    answers = Counter(row["answer"] for row in ROWS)
    assert set(answers) >= COLOUR_WORDS | set(SHAPES) | {"yes", "no", "one", "two", "three", "four"}
    assert {answer for answer in answers if " " not in answer} <= {
        *(COLOUR_WORDS | set(SHAPES)),
        *("yes", "no", "one", "two", "three", "four"),
    }


def test_a_sentence_answers_what_the_picture_shows() -> None:
    things = "|".join(f"(?:{colour}) (?:{shape})" for colour in COLOUR_WORDS for shape in SHAPES)
    sentence = re.compile(rf"An? (?:{things})(?:(?:,| and) an? (?:{things}))*\.")
    told = [row for row in ROWS if " " in row["answer"]]
    assert len(told) > 100 and all(sentence.fullmatch(row["answer"]) for row in told)
    assert all(re.match(r"(?i)what|describe", row["question"]) for row in told)


def test_grey_is_spelt_as_the_question_spells_colour() -> None:
    for row in ROWS:
        words = set(re.findall(r"\w+", row["question"]))
        if row["answer"] in ("gray", "grey") and words & {"color", "colour"}:
            assert row["answer"] == ("gray" if "color" in words else "grey"), row["question"]
        assert not {"color", "grey"} <= words and not {"colour", "gray"} <= words


def test_colours_first_asks_about_colours_of_large_shapes() -> None:
    rows, _ = drawing_rows("drawings:200:colours")
    assert len(rows) == 800 and not {row["image"] for row in rows} & {row["image"] for row in ROWS}
    one_word = [row for row in rows if row["answer"] in COLOUR_WORDS]
    assert len(one_word) >= 600
    assert {row["answer"] for row in one_word} == COLOUR_WORDS
    assert sum("background" in row["question"] for row in one_word) > 150
    sentences = {row["answer"] for row in rows} - COLOUR_WORDS - {"yes", "no"}
    assert sentences and all(re.fullmatch(r"An? \w+ \w+\.", sentence) for sentence in sentences)
    for content in {
        row["image"] for row in rows
    }:  # the most frequent colour is the shape's or the background's
        image = Image.open(io.BytesIO(content))
        counts = sorted((count for count, _ in image.getcolors(image.width * image.height)), reverse=True)
        assert sum(counts[:3]) > 0.6 * image.width * image.height


def test_words_do_not_tell_yes_from_no() -> None:
    yes_or_no = [row for row in ROWS if row["answer"] in ("yes", "no")]
    share = Counter(row["answer"] for row in yes_or_no)["yes"] / len(yes_or_no)
    assert 0.45 < share < 0.55
    by_word = defaultdict(list)
    for row in yes_or_no:
        for word in {*re.findall(r"\w+", row["question"].lower())}:
            by_word[word].append(row["answer"] == "yes")
    often = {word: answers for word, answers in by_word.items() if len(answers) > 60}
    assert {"circle", "square", "shape", "not"} <= set(often)
    for word, answers in often.items():
        assert 0.33 < sum(answers) / len(answers) < 0.67, word


def test_what_is_said_of_a_picture_agrees() -> None:
    """The sentence about a picture of one shape names the colour and shape that other answers name."""
    said = defaultdict(list)
    for row in ROWS:
        said[row["image"]].append(row)
    compared = 0
    for rows in said.values():
        sentences = [re.fullmatch(r"An? (\w+) (\w+)\.", row["answer"]) for row in rows]
        one = next((match for match in sentences if match), None)
        if one is None:
            continue
        colour, shape = one[1], one[2]
        for row in rows:
            question, answer = row["question"].lower(), row["answer"].replace("grey", "gray")
            if re.search(r"outline|edge|border|background", question):
                continue
            if answer in COLOUR_WORDS:
                assert answer == colour, row["question"]
            elif answer in SHAPES:
                assert answer == shape, row["question"]
            elif answer == "yes" and not re.search(r"\b(not|no|without)\b(?!\?)", question):
                named = set(re.findall(r"\w+", question.replace("grey", "gray")))
                assert named & COLOUR_WORDS <= {colour} and named & set(SHAPES) <= {shape}, row["question"]
            compared += 1
    assert compared > 250


def test_they_are_read_as_records_and_kept_back_by_picture() -> None:
    records, summary = read_records("drawings:50", split="train")
    assert len(records) == summary.rows == 200 and not summary.skipped
    train, validation = split_records(records, validation_rows=40)
    assert len(validation) == 40
    assert not {record.images for record in train} & {record.images for record in validation}


def test_an_unknown_kind_of_drawings_is_refused() -> None:
    with pytest.raises(UsageError, match="'colors' is unknown; expected drawings:9:colours"):
        read_records("drawings:9:colors", split="train")


@pytest.mark.parametrize("source", ["drawings:", "drawings:0", "drawings:-3", "drawings:many"])
def test_a_source_without_a_number_is_refused(source: str) -> None:
    with pytest.raises(UsageError, match=r"is not a number of drawings; expected drawings:N"):
        read_records(source, split="train")


def test_captions_describe_the_same_pictures() -> None:
    captions = dict(drawing_captions("drawings:800"))
    assert list(captions) == list(dict.fromkeys(row["image"] for row in ROWS))
    for row in ROWS:
        with_ground, shapes, of_picture = captions[row["image"]]
        assert with_ground.startswith(shapes.rstrip(".")) and of_picture.endswith(f" of {with_ground}")
        if " " in row["answer"]:
            assert row["answer"].lower().replace("grey", "gray") == shapes.replace("grey", "gray")
        if "background" in row["question"] and row["answer"] in COLOUR_WORDS:
            assert f" {row['answer']} background." in with_ground.replace("grey", row["answer"])
    assert {text.split()[1] for text, _, _ in captions.values()} == COLOUR_WORDS
    with pytest.raises(UsageError, match="'few' is not a number of drawings"):
        next(drawing_captions("drawings:few"))

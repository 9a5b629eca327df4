"""The tab "ScienceQA": a question with options and perhaps a picture, and how likely each option is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gradio as gr
import torch

from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import PictureFile
from llama_adapter.data.templates import check_unicode, question_turn
from llama_adapter.decoding.question import Question
from llama_adapter.model import LlamaAdapter
from llama_adapter.page.checks import check_length, warn
from llama_adapter.page.uploads import PICTURE_EXAMPLES, open_given, picture_file
from llama_adapter.scienceqa.examining import Examination, trained_on_scienceqa
from llama_adapter.scienceqa.problems import LETTERS, Problem, question_text

# Our own questions in the style of ScienceQA: text, options (one a line), context, and perhaps a picture.
_SHAPE, _COLOUR = PICTURE_EXAMPLES
EXAMPLES = (
    ("Which of these animals lays eggs?", "cat\nhen\ndog\ncow", "", None),
    (
        "Which cup of tea cools down faster?",
        "the one outside\nthe one in the kitchen",
        "Two cups of tea are equally hot. One stands in a warm kitchen, the other outside in the snow.",
        None,
    ),
    (_SHAPE, "circle\nsquare\ntriangle", "", _SHAPE),
    (_COLOUR, "red\ngreen\nblue", "", _COLOUR),
)


def score(
    model: LlamaAdapter, question: Any, options: Any, context: Any, image: Any, adapter: str | None
) -> list[float]:
    """The probability of each option, from its likelihood. They add up to 1.

    It is the likelihood of the option's letter or of its text, whichever the adapter is better at
    (`best_for`).

    Args:
        options: 2 to 5 texts.
        image: anything that `open_given` takes; at most one picture.

    Raises:
        UsageError: something that is not text or too long, too many or too few options, or a picture for an
            adapter that can't use it.
    """
    if not isinstance(options, list):
        raise UsageError("the options are no list of texts")
    choices = tuple(check_length(option).strip() for option in options)
    if not 2 <= len(choices) <= len(LETTERS) or not all(choices):
        raise UsageError(f"{len(choices)} options; expected 2 to {len(LETTERS)}, none of them empty")
    check_unicode("".join(choices))
    pictures = open_given(image)
    if len(pictures) > 1:
        raise UsageError(f"{len(pictures)} pictures with one question; leave out all but one")
    name: PictureFile = b"the picture"
    features: dict[PictureFile, torch.Tensor] = {}
    if pictures:
        features[name] = model.encode_images(pictures[0], adapter=adapter)[0]
    problem = Problem(
        pid="1",
        question=question_turn(check_length(question)).text,
        choices=choices,
        answer=0,
        hint=check_length(context).strip(),
        image=name if pictures else None,
    )
    examination = Examination.best_for(model, adapter)
    # Raises UsageError if the base can't read it.
    model.prepare_request(Question.of(question_text(problem, examination.format), adapter=adapter))
    if examination.way == "generate":  # this way has no likelihoods
        examination = replace(examination, way="letter")
    (found,) = examination.likelihoods(model, [problem], features=features, adapter=adapter)
    return [float(share) for share in torch.tensor(found, dtype=torch.double).softmax(0)]


def trained_for_it(model: LlamaAdapter) -> list[str]:
    """The names of the adapters that train.scienceqa made."""
    return [name for name in model.adapters if trained_on_scienceqa(model, name)]


def labelled(options: list[str], probabilities: list[float]) -> dict[str, float]:
    """The probability of each option, under its letter and text."""
    return {
        f"({letter}) {option}": share
        for letter, option, share in zip(LETTERS, options, probabilities, strict=False)
    }


# --- what the tab's events call -----------------------------------------------------------------------------


def answer(model: LlamaAdapter, box: dict[str, Any], options: str, context: str, adapter: str) -> Any:
    """The options with their probabilities, from the fields of the form."""
    try:
        choices = [line.strip() for line in check_length(options).splitlines() if line.strip()]
        shares = score(model, box["text"], choices, context, box["files"], adapter)
    except UsageError as error:
        warn(error)
        return gr.skip()
    return labelled(choices, shares)


def fill(number: int | None) -> tuple[Any, ...]:
    """Put an example into the form."""
    if number is None:
        return (gr.skip(),) * 4
    question, options, context, picture = EXAMPLES[number]
    files = [] if picture is None else [picture_file(PICTURE_EXAMPLES[picture])]
    return {"text": question, "files": files}, options, context, None

"""The tab "ScienceQA": a question with options and perhaps a picture, and how likely each option is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
import torch

from llama_adapter.common.errors import UsageError
from llama_adapter.data.records import PictureFile
from llama_adapter.data.templates import check_unicode, question_turn
from llama_adapter.decoding.question import Question
from llama_adapter.model import LlamaAdapter
from llama_adapter.page.checks import check_length, warn
from llama_adapter.page.display import named, shown
from llama_adapter.page.suggestions import SCIENCE_EXAMPLES
from llama_adapter.page.uploads import open_given, picture_file
from llama_adapter.scienceqa.examining import Examination, trained_on_scienceqa
from llama_adapter.scienceqa.problem_texts import question_text
from llama_adapter.scienceqa.problems import LETTERS, Problem
from llama_adapter.surface.named_adapters import AUTO


@dataclass(frozen=True)
class Scores:
    """How likely each option is.

    Attributes:
        shares: the probability of each option, in their order. They add up to 1.
        adapter: the name of the adapter that was asked.
        favourites: the likeliest option of each rotation of the options that was asked. Where they differ,
            the choice depends on the order.
    """

    shares: tuple[float, ...]
    adapter: str
    favourites: tuple[int, ...]


def score(
    model: LlamaAdapter,
    question: Any,
    options: Any,
    context: Any,
    image: Any,
    adapter: str | None,
    *,
    every_order: bool = True,
) -> Scores:
    """Score the options of a question by their likelihood.

    It is the likelihood of the option's letter or of its text, in the options' own order or as the mean over
    their rotations: whichever the adapter is better at (`best_for`).

    Args:
        options: 2 to 5 texts.
        image: anything that `open_given` takes; at most one picture.
        adapter: a name; "auto" is the adapter that was trained on ScienceQA, if there is one.
        every_order: ask in every rotation of the options, for `Scores.favourites`. Otherwise the adapter is
            asked in their own order alone, unless the mean is taken.

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
    adapter = _scoring_adapter(model, adapter, pictured=bool(pictures))
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
    if every_order or examination.rotations:
        (orders,) = examination.rotated_shares(model, [problem], features=features, adapter=adapter)
        shares = torch.tensor(orders, dtype=torch.double)
    else:
        own = examination.likelihoods(model, [problem], features=features, adapter=adapter)
        shares = torch.tensor(own, dtype=torch.double).softmax(1)
    found = shares.mean(0) if examination.rotations else shares[0]
    return Scores(tuple(found.tolist()), adapter, tuple(shares.argmax(1).tolist()))


def _scoring_adapter(model: LlamaAdapter, adapter: str | None, *, pictured: bool) -> str:
    asked = model.active_adapter if adapter is None else adapter
    if asked == AUTO:
        fit = [name for name in trained_for_it(model) if model.sees(name) or not pictured]
        asked = fit[0] if fit else asked
    return model.answering_adapter(asked, pictured=pictured)


def trained_for_it(model: LlamaAdapter) -> list[str]:
    """The names of the adapters that train.scienceqa made."""
    return [name for name in model.adapters if trained_on_scienceqa(model, name)]


def labelled(options: Sequence[str], probabilities: Sequence[float]) -> dict[str, float]:
    """The probability of each option, under its letter and text."""
    return {
        f"({letter}) {option}": share
        for letter, option, share in zip(LETTERS, options, probabilities, strict=False)
    }


# --- what the tab's events call -----------------------------------------------------------------------------


def answer(
    model: LlamaAdapter, box: dict[str, Any], options: str, context: str, adapter: str
) -> tuple[Any, Any]:
    """The options with their probabilities, and a note, from the fields of the form."""
    try:
        choices = [line.strip() for line in check_length(options).splitlines() if line.strip()]
        found = score(model, box["text"], choices, context, box["files"], adapter)
    except UsageError as error:
        warn(error)
        return gr.skip(), gr.skip()
    return labelled(choices, found.shares), shown(note(choices, found))


def note(options: Sequence[str], found: Scores) -> str:
    """Who answered, and whether the order of the options decided."""
    who = f"{named(found.adapter)} answered."
    chosen = max(range(len(options)), key=found.shares.__getitem__)
    others = [options[other] for other in dict.fromkeys(found.favourites) if other != chosen]
    if not others:
        return f"{who} The order of the options makes no difference."
    said = " or ".join(f"“{other}”" for other in others)
    return f"{who} **The choice depends on the order of the options**: in another order it is {said}."


def fill(number: int | None) -> tuple[Any, ...]:
    """Put an example into the form."""
    if number is None:
        return (gr.skip(),) * 5
    example = SCIENCE_EXAMPLES[number]
    files = [] if example.picture is None else [picture_file(example.picture)]
    return {"text": example.text, "files": files}, "\n".join(example.options), example.context, None, ""

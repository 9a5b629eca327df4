"""Every example on the page is answered rightly by what is shipped, at the default settings."""

from __future__ import annotations

import pytest
from PIL import Image

from llama_adapter.answering.questions import CheckedQuestion
from llama_adapter.model import LlamaAdapter
from llama_adapter.page.about import describe_limits
from llama_adapter.page.experts import load_experts
from llama_adapter.page.science import score
from llama_adapter.page.suggestions import (
    PICTURE_EXAMPLES,
    SCIENCE_EXAMPLES,
    TEXT_EXAMPLES,
    Example,
    ScienceExample,
    fitting,
)
from llama_adapter.page.uploads import data_url
from llama_adapter.surface.named_adapters import AUTO
from llama_adapter.weights.catalogue import DEFAULT_BASE, SMALL_BASE
from tests.conftest import CHECKOUT, SEEDS

CHAT_EXAMPLES = (*TEXT_EXAMPLES, *PICTURE_EXAMPLES)
BASES = (DEFAULT_BASE, SMALL_BASE)


@pytest.fixture(scope="module", params=BASES)
def model(request: pytest.FixtureRequest) -> LlamaAdapter:
    """The page's model: a base with every adapter that fits it."""
    request.getfixturevalue("default_base" if request.param == DEFAULT_BASE else "base_folder")
    model = LlamaAdapter.from_pretrained(base=request.param, quantize="auto")  # as `demo` does
    load_experts(model)
    return model


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("example", CHAT_EXAMPLES, ids=lambda example: example.text)
def test_the_chats_examples_are_answered_rightly(example: Example, seed: int, model: LlamaAdapter) -> None:
    if not fitting([example], model.base):
        pytest.skip(f"too hard for {model.base}, so the page does not offer it there")
    answer = model.chat(example.text, image=example.picture, adapter=AUTO, seed=seed)
    question = CheckedQuestion("example", example.text, example.check, right=())
    assert question.is_right(answer), answer


@pytest.mark.parametrize("example", SCIENCE_EXAMPLES, ids=lambda example: example.text)
def test_the_problems_are_answered_rightly(example: ScienceExample, model: LlamaAdapter) -> None:
    if not fitting([example], model.base):
        pytest.skip(f"too hard for {model.base}, so the page does not offer it there")
    image = None if example.picture is None else data_url(example.picture)
    found = score(model, example.text, list(example.options), example.context, image, AUTO)
    chosen = max(range(len(example.options)), key=found.shares.__getitem__)
    assert example.options[chosen] == example.right, found
    assert len(set(found.favourites)) == 1, f"the order of the options decides: {found}"


@pytest.mark.parametrize("model", [DEFAULT_BASE], indirect=True)
def test_the_readmes_picture_shows_these_adapters(model: LlamaAdapter) -> None:
    with Image.open(CHECKOUT / "docs" / "page.png") as picture:
        shown = picture.info["limits"]
    redraw = "redraw it: pytest -m slow -k picture_for_the_readme tests/page/test_browser.py"
    assert shown == describe_limits(model, AUTO), redraw


def test_a_base_is_offered_what_is_not_too_hard_for_it() -> None:
    assert fitting(CHAT_EXAMPLES, DEFAULT_BASE) == list(CHAT_EXAMPLES)
    assert fitting(CHAT_EXAMPLES, "a base of somebody else") == list(CHAT_EXAMPLES)
    small = fitting(CHAT_EXAMPLES, SMALL_BASE)
    assert 3 < len(small) < len(CHAT_EXAMPLES) and fitting(SCIENCE_EXAMPLES, SMALL_BASE)


def test_the_right_answers_are_among_the_options() -> None:
    assert all(example.right in example.options for example in SCIENCE_EXAMPLES)

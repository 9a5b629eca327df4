"""The one object that asks: made from a text, from turns, or from another question."""

from __future__ import annotations

import pytest
import torch

from llama_adapter.common.errors import UsageError
from llama_adapter.data.templates import Turn
from llama_adapter.decoding.question import Question
from llama_adapter.decoding.sampling import Sampling


def test_a_question_is_made_from_a_text_and_options() -> None:
    features = torch.zeros(1, 4)
    asked = Question.of("Hi", image=features, adapter="one", max_new_tokens=3)
    assert asked.turns == [Turn("user", "Hi")]
    assert asked.image is features and asked.adapter == "one"
    assert asked.sampling == Sampling(max_new_tokens=3)


def test_options_change_a_question_and_leave_the_rest() -> None:
    asked = Question.of([Turn("user", "Hi")], adapter="one", sampling=Sampling(top_k=5), temperature=0)
    other = Question.of(asked, adapter="two", sampling=None, seed=1)
    assert (other.turns, other.adapter) == (asked.turns, "two")
    assert other.sampling == Sampling(top_k=5, temperature=0, seed=1)
    assert Question.of(asked, adapter=None).adapter == "one"


def test_known_tokens_stay_unless_the_adapter_changes() -> None:
    asked = Question([Turn("user", "Hi")], adapter="one", tokens=[1, 2])
    assert Question.of(asked, adapter="one", seed=1).tokens == [1, 2]
    assert Question.of(asked, adapter="two").tokens is None


@pytest.mark.parametrize("option", ["turns", "max_length", "images"])
def test_an_unknown_option_is_refused_with_those_there_are(option: str) -> None:
    with pytest.raises(UsageError, match=f"no option '{option}' of a question; there are image, adapter"):
        Question.of("Hi", **{option: 1})


def test_an_empty_question_is_refused() -> None:
    with pytest.raises(UsageError, match="the question is empty"):
        Question.of([Turn("system", "Be brief."), Turn("user", " ")])

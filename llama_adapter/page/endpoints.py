"""The endpoints for programs: `/answer` and `/chat` stream a text, `/score` gives options' probabilities.

None of them keeps any state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import gradio as gr

from llama_adapter.answering.engine import Engine
from llama_adapter.common.errors import UsageError
from llama_adapter.data.templates import Turn, question_turn
from llama_adapter.decoding.answer import Answer
from llama_adapter.decoding.question import Question
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.page.checks import MAX_MESSAGES, check_length, read_sampling
from llama_adapter.page.display import pace
from llama_adapter.page.science import score
from llama_adapter.page.uploads import open_given

# The forms in which a program can send a picture. `open_given` reads them.
Given = str | dict[str, Any] | list[str | dict[str, Any]] | None


class Endpoints:
    """The endpoints that `gr.api` offers, under the names of these methods."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def answer(
        self,
        message: str,
        image: Given = None,
        adapter: str | None = None,
        system: str = "",
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        top_k: int = Sampling.top_k,
        repetition_penalty: float = Sampling.repetition_penalty,
        max_new_tokens: int = Sampling.max_new_tokens,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Answer one question. Each value is the text so far; the last one is complete. `image`: a picture
        that the question is about, or a list of pictures, for adapters that see. A picture is
        `handle_file("photo.jpg")` of gradio_client, a data URL ("data:image/jpeg;base64,..."), or {"path":
        the answer of /gradio_api/upload}. `adapter`: a name that the page offers; by default the one that the
        page starts with. "none" is the bare base."""
        # If a caller disconnects, Gradio stops the work only between two values.
        knobs = (temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed)
        yield from self.chat(message, None, image, adapter, system, *knobs)

    def chat(
        self,
        message: str,
        history: list[dict[str, str]] | None = None,
        image: Given = None,
        adapter: str | None = None,
        system: str = "",
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        top_k: int = Sampling.top_k,
        repetition_penalty: float = Sampling.repetition_penalty,
        max_new_tokens: int = Sampling.max_new_tokens,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Answer the latest message of a conversation. Each value is the text so far. `history`: the earlier
        messages, as {"role": "user" or "assistant", "content": text}. `image`: what the conversation is
        about. All else is as in `/answer`."""
        knobs = (temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed)
        with _refused(), closing(self._ask(message, history or [], image, adapter, system, knobs)) as answer:
            for _ in pace(answer):
                yield answer.text
            yield answer.text

    def score(
        self,
        question: str,
        options: list[str],
        context: str = "",
        image: Given = None,
        adapter: str | None = None,
    ) -> list[float]:
        """The probability of each of 2 to 5 options, in their order. It comes from the likelihood of the
        option's letter, or of its text if the adapter is better at that, in ScienceQA's text format.
        `context`: facts that are needed for the answer. `image` and `adapter` are those of `/answer`."""
        with _refused():
            return score(self.engine.model, question, options, context, image, adapter)

    def _ask(
        self, message: Any, history: Any, image: Any, adapter: str | None, system: Any, knobs: tuple[Any, ...]
    ) -> Answer:
        before = [Turn("system", check_length(system))] if system else []
        if not isinstance(history, list):
            raise UsageError("the history is no list of messages")
        if len(history) > MAX_MESSAGES:
            raise UsageError(f"the history has {len(history):,} messages; leave out all but {MAX_MESSAGES}")
        for said in history:
            if not (isinstance(said, dict) and {"role", "content"} <= set(said)):
                raise UsageError("a message of the history is no object with a role and a content")
            before.append(Turn(str(said["role"]), check_length(said["content"])))
        turns = [*before, question_turn(check_length(message))]
        pictures = open_given(image) or None
        return self.engine.stream_chat(Question(turns, pictures, adapter, read_sampling(*knobs)))


@contextmanager
def _refused() -> Iterator[None]:
    """Turn a caller's mistake into an error that Gradio passes on."""
    try:
        yield
    except UsageError as error:
        raise gr.Error(str(error), print_exception=False) from None

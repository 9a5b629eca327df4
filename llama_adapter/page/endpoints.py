"""The endpoints for programs.

`/answer` and `/chat` stream a text, `/ask` a text with its facts, `/score` gives options' probabilities.

None of them keeps any state.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
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
        page starts with. "none" is the bare base, "auto" the adapter that sees where there is a picture, else
        the text adapter. `/ask` also says who answered and why the answer ended."""
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
        with closing(self.ask(message, history, image, adapter, system, *knobs)) as answers:
            for facts in answers:
                yield facts["answer"]

    def ask(
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
    ) -> Generator[dict[str, Any], None, None]:
        """Answer as `/chat` does, with facts. Each value is an object: "answer" (the text so far), "tokens",
        "tokens_per_second", "adapter" (who answers), "base" and "finish_reason". That is null while the
        answer grows, then "stop" where it is complete, "length" where it was cut off at the limit of tokens,
        and "closed" where it was stopped."""
        knobs = (temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed)
        with _refused():
            question = _question(message, history or [], image, adapter, system, knobs)
            name = self.engine.model.answering_adapter(adapter, pictured=question.image is not None)
            with closing(self.engine.stream_chat(question)) as answer:
                for _ in pace(answer):
                    yield self._facts(answer, name)
                yield self._facts(answer, name)

    def _facts(self, answer: Answer, adapter: str) -> dict[str, Any]:
        return {
            "answer": answer.text,
            "tokens": answer.tokens,
            "tokens_per_second": round(answer.tokens_per_second, 2),
            "finish_reason": answer.finish_reason,
            "adapter": adapter,
            "base": self.engine.model.base,
        }

    def score(
        self,
        question: str,
        options: list[str],
        context: str = "",
        image: Given = None,
        adapter: str | None = None,
    ) -> list[float]:
        """The probability of each of 2 to 5 options, in their order. It comes from the likelihood of the
        option's letter, or of its text if the adapter is better at that, in ScienceQA's text format. It is
        the mean over rotations of the options if the adapter is better with it. `context`: facts that are
        needed for the answer. `image` and `adapter` are those of `/answer`; "auto" is the adapter that was
        trained on ScienceQA, if there is one."""
        with _refused():
            model = self.engine.model
            return list(score(model, question, options, context, image, adapter, every_order=False).shares)


def _question(
    message: Any, history: Any, image: Any, adapter: str | None, system: Any, knobs: tuple[Any, ...]
) -> Question:
    before = [Turn("system", check_length(system))] if system else []
    if not isinstance(history, list):
        raise UsageError("the history is no list of messages")
    if len(history) > MAX_MESSAGES:
        raise UsageError(f"the history has {len(history):,} messages; leave out all but {MAX_MESSAGES}")
    for said in history:
        if not (isinstance(said, dict) and {"role", "content"} <= set(said)):
            raise UsageError("a message of the history is not an object with a role and a content")
        before.append(Turn(str(said["role"]), check_length(said["content"])))
    turns = [*before, question_turn(check_length(message))]
    return Question(turns, open_given(image) or None, adapter, read_sampling(*knobs))


@contextmanager
def _refused() -> Iterator[None]:
    """Turn a caller's mistake into an error that Gradio passes on."""
    try:
        yield
    except UsageError as error:
        raise gr.Error(str(error), print_exception=False) from None

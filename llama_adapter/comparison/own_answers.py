"""Forgetting: how much worse an adapter is at what its base was good at.

It is measured on the bare base's own text: its greedy answers to the plain questions of
`llama_adapter.answering.questions`, in the base's own chat template. The base finds these answers likely by
construction, since each token is the one that it found most likely. They are never in the training rows: the
questions are our own, and one that a row also asks is left out.

Forgetting is how much the mean cross-entropy of these answers, in nats a token, rises from the bare base to
the base with the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama_adapter.answering.questions import load_questions
from llama_adapter.answering.records_answered import answer_requests
from llama_adapter.data.examples import IGNORED, Example
from llama_adapter.data.records import Record
from llama_adapter.decoding.question import Question
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.packing.losses import mean_answer_loss

MAX_NEW_TOKENS = 32


def kept_apart(records: Sequence[Record]) -> list[str]:
    """Those of our own questions that none of these rows asks; case and spaces are ignored."""
    asked = {_plain(turn.text) for record in records for turn in record.turns if turn.role == "user"}
    return [question.question for question in load_questions() if _plain(question.question) not in asked]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def answer_as_base(
    model: LlamaAdapter, questions: Sequence[str], *, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[Example]:
    """The bare base's greedy answers, as rows whose end tokens are not scored.

    An empty answer is left out.
    """
    greedy = Sampling(temperature=0, max_new_tokens=max_new_tokens)
    requests = [
        model.prepare_request(Question.of(text, adapter=NO_ADAPTER, sampling=greedy)) for text in questions
    ]
    examples = []
    for row, (request, said) in enumerate(
        zip(requests, answer_requests(model, requests), strict=True), start=1
    ):
        question = request.tokens[0].tolist()
        if said.tokens:
            labels = [IGNORED] * len(question) + said.tokens
            examples.append(Example(question + said.tokens, labels, (), row))
    return examples


def loss_of_answers(model: LlamaAdapter, answers: Sequence[Example], *, adapter: str) -> float | None:
    """The mean loss of the base's own answers with an adapter, nats a token; None without answers."""
    if not answers:
        return None
    return mean_answer_loss(model, answers, device=model.decoder.device, adapter=adapter)[0]

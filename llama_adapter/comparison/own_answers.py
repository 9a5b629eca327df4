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
from functools import partial

from llama_adapter.answering.questions import load_questions
from llama_adapter.data.records import IGNORED, Example, Record
from llama_adapter.data.templates import end_token_ids
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.decoding.streams import stream_tokens
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.packing.pack import mean_answer_loss

MAX_NEW_TOKENS = 32


def kept_apart(records: Sequence[Record]) -> list[str]:
    """Those of our own questions that none of these rows asks; case and spaces are ignored."""
    asked = {_plain(turn.text) for record in records for turn in record.turns if turn.role == "user"}
    return [question.text for question in load_questions() if _plain(question.text) not in asked]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def answer_as_base(
    model: LlamaAdapter, questions: Sequence[str], *, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[Example]:
    """The bare base's greedy answers, as rows whose end tokens are not scored.

    An empty answer is left out.
    """
    assert model.tokenizer is not None
    ends = end_token_ids(model.template(NO_ADAPTER), model.tokenizer)
    greedy = Sampling(temperature=0, max_new_tokens=max_new_tokens)
    forward = partial(model, adapter=NO_ADAPTER)
    examples = []
    for row, text in enumerate(questions, start=1):
        asked = model.prepare_request(text, adapter=NO_ADAPTER, sampling=greedy)
        tokens = list(stream_tokens(forward, asked.question, asked.sampling, ends))
        if tokens:
            question = asked.question[0].tolist()
            examples.append(Example(question + tokens, [IGNORED] * len(question) + tokens, (), row))
    return examples


def forgetting(model: LlamaAdapter, answers: Sequence[Example], *, adapter: str) -> float | None:
    """How much an adapter raises the loss of the base's own answers, nats a token; None without answers."""
    if not answers:
        return None
    losses = {
        name: mean_answer_loss(model, answers, device=model.decoder.device, adapter=name)[0]
        for name in (NO_ADAPTER, adapter)
    }
    return losses[adapter] - losses[NO_ADAPTER]

"""Forgetting: how much worse an adapter finds what its base was good at.

The text is the bare base's own: its greedy answers to the plain questions of
`llama_adapter.answering.questions`, in the base's own chat template. The base finds them likely by
construction, since each token is the one that it found likeliest. No training row can hold them: the
questions are our own, and one that a row asks as well is left out.

Forgetting is the rise of the mean cross-entropy of these answers, in nats a token, from the bare base to the
base with the adapter.
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
    """Our own questions that none of these rows asks, whatever its case and spaces."""
    asked = {_plain(turn.text) for record in records for turn in record.turns if turn.role == "user"}
    return [question.text for question in load_questions() if _plain(question.text) not in asked]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def answer_as_base(
    model: LlamaAdapter, questions: Sequence[str], *, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[Example]:
    """The bare base's greedy answers, as rows that are scored without their end tokens.

    An answer that ends before its first word is left out.
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
    """The rise of the loss of the base's own answers with an adapter, nats a token; None without answers."""
    if not answers:
        return None
    losses = {
        name: mean_answer_loss(model, answers, device=model.decoder.device, adapter=name)[0]
        for name in (NO_ADAPTER, adapter)
    }
    return losses[adapter] - losses[NO_ADAPTER]

"""Answers many questions in batches, for scoring: by generating text, or by choosing among given answers.

Questions of about the same length are read together, and padding is hidden. So no answer depends on the
others in its batch, except for rounding. Questions about the same pictures share what the adapter adds.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_adapter.common.errors import UsageError
from llama_adapter.data.examples import encode_records
from llama_adapter.data.records import PictureFile, Record
from llama_adapter.data.templates import Turn
from llama_adapter.decoding.answer import Said
from llama_adapter.decoding.question import Question, Request
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.decoding.scheduler import Scheduler, Ticket
from llama_adapter.methods.state import merge_states
from llama_adapter.model import LlamaAdapter
from llama_adapter.packing.losses import answer_losses
from llama_adapter.packing.pack import split_by_tokens


def answer_records(
    model: LlamaAdapter,
    records: Sequence[Record],
    *,
    features: Mapping[PictureFile, Tensor] | None = None,
    adapter: str | None = None,
    max_new_tokens: int = 32,
    beams: int = 1,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The model's own answers to the questions of records, in their order, by greedy or beam search.

    Args:
        features: (F,) for each picture of the records; None without pictures.
        adapter: None takes the active one.
        progress: called with the number of records done.
    """
    requests = _prepare(model, records, features, adapter, max_new_tokens)
    said = answer_requests(model, requests, beams=beams, batch_size=batch_size, progress=progress)
    return [each.text.strip() for each in said]


def answer_requests(
    model: LlamaAdapter,
    requests: Sequence[Request],
    *,
    beams: int = 1,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Said]:
    """The answers to requests, in their order. Arguments are those of `answer_records`."""
    assert model.tokenizer is not None
    tickets = [Ticket(request, model.tokenizer) for request in requests]
    # Longest first, so that rows of the batch do not stay empty for long at the end. Among equal lengths,
    # those with equal pictures are neighbours (ordered by where the pictures first occurred).
    first: dict[int, int] = {}
    for request in requests:
        first.setdefault(id(request.features), len(first))
    waiting = deque(
        sorted(tickets, key=lambda t: (-t.request.tokens.shape[1], first[id(t.request.features)]))
    )
    if beams == 1:
        ended = _greedily(model, waiting, batch_size)
    else:
        ended = _by_beams(model, waiting, batch_size, beams)
    done = 0
    for left in ended:
        for _ in left:
            done += 1
            progress(done)
    return [ticket.said for ticket in tickets]


def _prepare(
    model: LlamaAdapter,
    records: Sequence[Record],
    features: Mapping[PictureFile, Tensor] | None,
    adapter: str | None,
    max_new_tokens: int,
) -> list[Request]:
    """The questions of records as requests. Equal pictures are the same tensor of features."""
    greedy = Sampling(temperature=0, max_new_tokens=max_new_tokens)
    seen: dict[tuple[PictureFile, ...], Tensor | None] = {(): None}
    requests = []
    for record in records:
        if record.images not in seen:
            assert features is not None
            seen[record.images] = torch.stack([features[image] for image in record.images])
        question = Question(record.turns[:-1], seen[record.images], adapter, greedy)
        try:
            requests.append(model.prepare_request(question))
        except UsageError as error:
            raise UsageError(f"row {record.row}: {error}") from None
    return requests


@torch.no_grad()
def answer_likelihoods(
    model: LlamaAdapter,
    records: Sequence[Record],
    answers: Sequence[Sequence[str]],
    *,
    features: Mapping[PictureFile, Tensor] | None = None,
    adapter: str | None = None,
    max_tokens: int = 1024,
) -> list[list[float]]:
    """How likely a model finds each of some answers to each record's question.

    A question is computed once for all of its answers. Questions are packed into one sequence, without
    padding and without seeing each other.

    Args:
        records: the questions. Their own last turns are not used.
        answers: for each record, the texts to compare.
        max_tokens: of such a sequence; a question is counted with each of its answers.
        features, adapter: as in `answer_records`.

    Returns:
        for each record the log-probability of each answer, including its end token.
    """
    assert model.tokenizer is not None
    asked = [
        replace(record, turns=(*_as_context(record.turns[:-1]), Turn("assistant", answer)))
        for record, several in zip(records, answers, strict=True)
        for answer in several
    ]
    examples = encode_records(
        asked,
        template=model.template(adapter),
        tokenizer=model.tokenizer,
        max_length=sys.maxsize,
        date=model.template_date(adapter),
    )
    found: list[float] = []
    for run in split_by_tokens(examples, max_tokens):
        losses, _ = answer_losses(model, run, device=model.decoder.device, features=features, adapter=adapter)
        found += (-losses).tolist()
    rest = iter(found)
    return [list(islice(rest, len(several))) for several in answers]


def _as_context(turns: Sequence[Turn]) -> list[Turn]:
    """The turns, with no answer learnt."""
    return [replace(turn, learnt=False) for turn in turns]


def _greedily(model: LlamaAdapter, waiting: deque[Ticket], batch_size: int) -> Iterator[list[Ticket]]:
    """Make the answers, `batch_size` at once. Yields those that ended; others take their place."""

    def admit(answering: int) -> list[Ticket]:
        # Reading several at once is faster than one by one, so it waits until half of the batch is free.
        return _take_alike(waiting, batch_size - answering) if 2 * answering <= batch_size else []

    return Scheduler(model, model.project_requests, admit).run()


def _by_beams(
    model: LlamaAdapter, waiting: deque[Ticket], batch_size: int, beams: int
) -> Iterator[list[Ticket]]:
    """As `_greedily`, with transformers' beam search. There all answers of a batch end together."""
    while some := _take_alike(waiting, batch_size):
        requests = [ticket.request for ticket in some]
        longest = max(request.tokens.shape[1] for request in requests)
        ends = list(requests[0].end_ids)

        def padded(tokens: Tensor, value: int, longest: int = longest) -> Tensor:
            return F.pad(tokens, (longest - tokens.shape[1], 0), value=value)

        output = model.generate(
            torch.cat([padded(request.tokens, ends[0]) for request in requests]),
            adapter=merge_states(model.project_requests(requests)),
            attention_mask=torch.cat([padded(torch.ones_like(request.tokens), 0) for request in requests]),
            do_sample=False,
            num_beams=beams,
            repetition_penalty=1.0,  # a base may have another default
            max_new_tokens=max(request.sampling.max_new_tokens for request in requests),
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        for ticket, tokens in zip(some, output[:, longest:].tolist(), strict=True):
            for token in tokens:  # after the end of an answer there is only padding
                ticket.take(token)
            ticket.said.end()
        yield some


def _take_alike(waiting: deque[Ticket], most: int) -> list[Ticket]:
    """The next questions, longest first: as many as can be read with at most a quarter of padding."""
    taken: list[Ticket] = []
    while waiting and len(taken) < most:
        length, longest = (ticket.request.tokens.shape[1] for ticket in (waiting[0], (taken or waiting)[0]))
        if 4 * length < 3 * longest:
            break
        taken.append(waiting.popleft())
    return taken

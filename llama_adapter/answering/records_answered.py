"""Many questions answered in batches, for scoring: in the model's own words, or by choosing among answers.

Questions of about the same length are read together, and what padding there is nobody sees: no answer
depends on what it was batched with but for rounding. Questions about the same pictures share what the adapter
adds.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from llama_adapter.data.records import PictureFile, Record, encode_records
from llama_adapter.data.templates import Turn, encode_question, end_token_ids, stop_strings
from llama_adapter.decoding.batch import Batch, Row
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.decoding.streams import Said, stream_text
from llama_adapter.methods.state import AdapterState, merge_states
from llama_adapter.model import LlamaAdapter
from llama_adapter.packing.pack import answer_losses, split_by_tokens

# A question's number, its tokens, and what the adapter adds to it.
_Asked = tuple[int, list[int], AdapterState]


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
        features: (F,) of each picture of the records; None where they have none.
        adapter: None takes the active one.
        progress: gets the number of records that are done.
    """
    assert model.tokenizer is not None
    template, tokenizer = model.template(adapter), model.tokenizer
    date = model.template_date(adapter)
    questions = [encode_question(record.turns[:-1], template, tokenizer, date=date) for record in records]
    ends, stops = end_token_ids(template, tokenizer), stop_strings(template)
    # Longest first, so that the last ones leave no places empty for long; of equal length those with equal
    # pictures side by side (by where they first came up).
    first: dict[tuple[PictureFile, ...], int] = {}
    for record in records:
        first.setdefault(record.images, len(first))
    waiting = deque(sorted(range(len(records)), key=lambda i: (-len(questions[i]), first[records[i].images])))

    def take(most: int) -> list[_Asked]:
        if not waiting:
            return []
        some = _take_alike(waiting, questions, most)
        states = _states(model, adapter, [records[i].images for i in some], features)
        return [(i, questions[i], own) for i, own in zip(some, states, strict=True)]

    if beams == 1:
        said = _greedily(model, take, ends, max_new_tokens, batch_size)
    else:
        said = _by_beams(model, take, ends, max_new_tokens, batch_size, beams)
    answers = [""] * len(records)
    for done, (i, tokens) in enumerate(said, start=1):
        answers[i] = "".join(stream_text(tokens, tokenizer, stops)).strip()
        progress(done)
    return answers


def answer_questions(
    model: LlamaAdapter,
    questions: Sequence[list[int]],
    ends: Sequence[int],
    *,
    adapter: str | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 16,
) -> list[list[int]]:
    """The greedy answers to questions of text, in their order, both as tokens.

    Args:
        ends: tokens that end an answer, and are no part of it.
        adapter: None takes the active one.
    """
    waiting = deque(sorted(range(len(questions)), key=lambda i: -len(questions[i])))
    state = model.project(adapter)

    def take(most: int) -> list[_Asked]:
        some = [waiting.popleft() for _ in range(min(most, len(waiting)))]
        return [(i, questions[i], state) for i in some]

    said = dict(_greedily(model, take, ends, max_new_tokens, batch_size))
    return [said[i] for i in range(len(questions))]


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

    The question is computed once for all of its answers; questions stand side by side in one sequence without
    padding and without seeing each other.

    Args:
        records: what is asked; their own last turn does not count.
        answers: for each record the texts to compare.
        max_tokens: of such a sequence, the question counted with each of its answers.
        features, adapter: as in `answer_records`.

    Returns:
        for each record the log-probability of each answer, its end token included.
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
    """Turns of which no answer counts."""
    return [replace(turn, learnt=False) for turn in turns]


def _greedily(
    model: LlamaAdapter,
    take: Callable[[int], list[_Asked]],
    ends: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
) -> Iterator[tuple[int, list[int]]]:
    """The number and the tokens of each question's answer as soon as it ends; others take its place.

    Args:
        take: gives the next questions, so many at most; none where nothing waits any more.
    """
    greedy = Sampling(temperature=0, max_new_tokens=max_new_tokens)
    batch, device = Batch(model), model.decoder.device
    rows: dict[int, Row] = {}
    said: dict[int, Said] = {}
    while True:
        # Several are read in less time than one by one, so it waits until half of the places are free.
        if 2 * len(rows) <= batch_size and (asked := take(batch_size - len(rows))):
            some = [i for i, _, _ in asked]
            joining = [(torch.tensor([ids], device=device), state, greedy) for _, ids, state in asked]
            rows |= zip(some, batch.join_together(joining), strict=True)
        elif rows:
            batch.step()
            some = list(rows)
        else:
            return
        tokens = torch.cat([rows[i].token for i in some]).flatten().tolist()
        for i, token in zip(some, tokens, strict=True):
            said.setdefault(i, Said(max_new_tokens, ends)).take(token)
        ended = [i for i in some if said[i].ended]
        if ended:
            batch.leave(*(rows.pop(i) for i in ended))
        for i in ended:
            yield i, said.pop(i).tokens


def _by_beams(
    model: LlamaAdapter,
    take: Callable[[int], list[_Asked]],
    ends: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    beams: int,
) -> Iterator[tuple[int, list[int]]]:
    """As `_greedily`, by transformers' beam search, where a batch ends together."""
    while asked := take(batch_size):
        longest = max(len(ids) for _, ids, _ in asked)
        padding = [longest - len(ids) for _, ids, _ in asked]
        padded = torch.tensor(
            [[ends[0]] * pad + ids for pad, (_, ids, _) in zip(padding, asked, strict=True)]
        )
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        output = model.generate(
            padded.to(model.decoder.device),
            adapter=merge_states([state for _, _, state in asked]),
            attention_mask=mask.to(model.decoder.device),
            do_sample=False,
            num_beams=beams,
            repetition_penalty=1.0,  # a base may come with another
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        for (i, _, _), tokens in zip(asked, output[:, longest:].tolist(), strict=True):
            said = Said(max_new_tokens, ends)
            for token in tokens:  # behind the end of an answer the batch is filled up
                said.take(token)
            yield i, said.tokens


def _take_alike(waiting: deque[int], questions: Sequence[Sequence[int]], most: int) -> list[int]:
    """The next questions, longest first, as many as are read with no more than a quarter of padding."""
    taken = [waiting.popleft()]
    longest = len(questions[taken[0]])
    while waiting and len(taken) < most and 4 * len(questions[waiting[0]]) >= 3 * longest:
        taken.append(waiting.popleft())
    return taken


def _states(
    model: LlamaAdapter,
    adapter: str | None,
    sets: Sequence[tuple[PictureFile, ...]],
    features: Mapping[PictureFile, Tensor] | None,
) -> list[AdapterState]:
    """What the adapter adds for each set of pictures; equal sets are computed once."""
    different = list(dict.fromkeys(sets))
    pictures = [picture for images in different for picture in images]
    if pictures:
        assert features is not None
        owners = torch.tensor([number for number, images in enumerate(different) for _ in images])
        seen = torch.stack([features[picture] for picture in pictures])
        projected = model.project(adapter, image_features=seen, image_owners=owners, rows=len(different))
    else:
        projected = model.project(adapter)
    if len(different) == 1:
        return [projected] * len(sets)
    of = {images: projected.of_row(number) for number, images in enumerate(different)}
    return [of[images] for images in sets]

"""Many questions answered in batches, for scoring: in the model's own words, or by choosing among answers.

Questions of about the same length are answered together, and what padding there is nobody sees: no answer
depends on what it was batched with but for rounding. Questions about the same pictures share their prompts'
keys and values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from llama_adapter.data import PictureFile, Record, encode_records
from llama_adapter.generate import stream_text
from llama_adapter.model import LlamaAdapter
from llama_adapter.packing import answer_losses, split_by_tokens
from llama_adapter.template import Turn, encode_question, end_token_ids, stop_strings


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
    questions = [encode_question(record.turns[:-1], template, tokenizer) for record in records]
    ends, stops = end_token_ids(template, tokenizer), stop_strings(template)
    # Shortest first, of equal length those with equal pictures side by side (by where they first came up).
    first: dict[tuple[PictureFile, ...], int] = {}
    for record in records:
        first.setdefault(record.images, len(first))
    order = sorted(range(len(records)), key=lambda i: (len(questions[i]), first[records[i].images]))
    answers = [""] * len(records)
    done = 0
    for batch in _batches(order, questions, batch_size):
        sets = list(dict.fromkeys(records[i].images for i in batch))
        prompts = _prompts(model, adapter, sets, features)
        rows = torch.tensor([sets.index(records[i].images) for i in batch], device=model.decoder.device)
        longest = max(len(questions[i]) for i in batch)
        padding = [longest - len(questions[i]) for i in batch]
        ids = torch.tensor(
            [[ends[0]] * pad + questions[i] for i, pad in zip(batch, padding, strict=True)],
            device=model.decoder.device,
        )
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=ids.device)
        output = model.generate(
            ids,
            adapter=adapter,
            attention_mask=mask,
            do_sample=False,
            num_beams=beams,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=ends[0],
            **{name: tensor.expand(len(sets), *tensor.shape[1:])[rows] for name, tensor in prompts.items()},
        )
        for i, tokens in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            answers[i] = "".join(stream_text(_until(tokens, ends), tokenizer, stops)).strip()
        done += len(batch)
        progress(done)
    return answers


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
        replace(record, turns=(*record.turns[:-1], Turn("assistant", answer)))
        for record, several in zip(records, answers, strict=True)
        for answer in several
    ]
    template = model.template(adapter)
    examples = encode_records(asked, template=template, tokenizer=model.tokenizer, max_length=sys.maxsize)
    found: list[float] = []
    for run in split_by_tokens(examples, max_tokens):
        losses, _ = answer_losses(model, run, device=model.decoder.device, features=features, adapter=adapter)
        found += (-losses).tolist()
    rest = iter(found)
    return [list(islice(rest, len(several))) for several in answers]


def _batches(order: Sequence[int], questions: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """The questions, shortest first, in batches of which no more than a quarter would be padding."""
    batches: list[list[int]] = []
    for i in order:
        length = len(questions[i])
        if not batches or len(batches[-1]) == size or 4 * len(questions[batches[-1][0]]) < 3 * length:
            batches.append([])
        batches[-1].append(i)
    return batches


def _prompts(
    model: LlamaAdapter,
    adapter: str | None,
    sets: Sequence[tuple[PictureFile, ...]],
    features: Mapping[PictureFile, Tensor] | None,
) -> dict[str, Tensor]:
    """The prompts' keys and values for each set of pictures."""
    pictures = [picture for images in sets for picture in images]
    if not pictures:
        return model.project(adapter)
    assert features is not None
    owners = torch.tensor([number for number, images in enumerate(sets) for _ in images])
    seen = torch.stack([features[picture] for picture in pictures])
    return model.project(adapter, image_features=seen, image_owners=owners, rows=len(sets))


def _until(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """What was said before the end token, behind which a batch is filled up."""
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:stop])

"""Questions answered in batches: the same answers as one question at a time, in the same order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_adapter.answering.records_answered import answer_records
from llama_adapter.data.records import PictureFile, Record
from llama_adapter.data.templates import Turn, encode_question
from llama_adapter.model import LlamaAdapter
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import VISION, build_tiny_model

CAT, DOG, COW = Path("cat.png"), Path("dog.png"), b"a cow"
FEATURES: dict[PictureFile, Tensor] = dict(
    zip((CAT, DOG, COW), torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), strict=True)
)


def record(question: str, *images: PictureFile, answer: str = "!") -> Record:
    return Record((Turn("user", question), Turn("assistant", answer)), 1, images)


# Lengths that occur once and several times; pictures that come alone, together, in both orders, and not at
# all.
RECORDS = [
    record("What is it?", CAT),
    record("What?"),
    record("Who is it?", DOG),
    record("What is it?"),
    record("What is it?", DOG, CAT),
    record("What is it?", CAT, DOG),
    record("Is that really a cow?", COW),
    record("What is it?", COW),
    record("Who is it?", DOG),
    record("Who is it?", CAT),
    Record((Turn("system", "Be brief."), *record("What?", COW).turns), 1, (COW,)),
]


@pytest.fixture(scope="module")
def model() -> LlamaAdapter:
    """A model whose answers end after a few tokens, and differ from picture to picture."""
    tokenizer = build_tiny_tokenizer()
    model = build_tiny_model(
        dtype=torch.float64, tokenizer=tokenizer, vision=VISION, max_position_embeddings=512
    )
    projection = model.get_adapter("tiny").projection
    assert projection is not None
    torch.nn.init.normal_(projection.up.weight, generator=torch.Generator().manual_seed(1))
    model.decoder.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= 1.8
    return model


def answer_alone(model: LlamaAdapter, asked: Record, *, adapter: str | None = None, **options: Any) -> str:
    """The answer of generate to one question at a time."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = torch.tensor([encode_question(asked.turns[:-1], model.template(adapter), tokenizer)])
    seen: dict[str, Any] = {}
    if asked.images:
        seen["image_features"] = torch.stack([FEATURES[image] for image in asked.images])
        seen["image_owners"] = torch.zeros(len(asked.images), dtype=torch.long)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": tokenizer.eos_token_id, **options}
    said = model.generate(ids, attention_mask=torch.ones_like(ids), adapter=adapter, **seen, **options)
    return str(tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_to_one_question_at_a_time(model: LlamaAdapter, beams: int) -> None:
    expected = [answer_alone(model, asked, num_beams=beams) for asked in RECORDS]
    assert len(set(expected)) >= 7, "else this shows nothing"
    for size in (1, 2, 3, 16):
        done: list[int] = []
        options: dict[str, Any] = {"max_new_tokens": 12, "beams": beams, "batch_size": size}
        said = answer_records(model, RECORDS, features=FEATURES, progress=done.append, **options)
        assert said == expected, size
        assert done == sorted(done) and done[-1] == len(RECORDS)
    backwards = answer_records(model, RECORDS[::-1], features=FEATURES, **options)
    assert backwards[::-1] == expected


def test_some_answers_end_by_themselves(model: LlamaAdapter) -> None:
    """A row of the batch that becomes free is given to another question."""
    for some in (20, 40):
        expected = [answer_alone(model, asked, max_new_tokens=some) for asked in RECORDS]
        for size in (2, 4, 16):
            options: dict[str, Any] = {"max_new_tokens": some, "batch_size": size}
            said = answer_records(model, RECORDS, features=FEATURES, **options)
            assert said == expected, size
    assert model.tokenizer is not None
    lengths = {len(model.tokenizer.encode(answer)) for answer in said}
    assert min(lengths) < 20, "else this shows nothing"


def test_a_repetition_penalty_that_a_base_comes_with_does_not_count(model: LlamaAdapter) -> None:
    for beams in (1, 3):
        options: dict[str, Any] = {"features": FEATURES, "max_new_tokens": 12, "beams": beams}
        expected = answer_records(model, RECORDS, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.generation_config, "repetition_penalty", 3.0)
            assert answer_records(model, RECORDS, **options) == expected


def test_without_pictures_any_adapter_and_the_bare_base_answer(model: LlamaAdapter) -> None:
    records = [record("What is it?"), record("Who?"), record("What is he?")]
    for adapter in ("tiny", "none", None):
        said = answer_records(model, records, adapter=adapter, max_new_tokens=12)
        assert said == [answer_alone(model, asked, adapter=adapter) for asked in records]
    assert answer_records(model, []) == []


def test_questions_about_the_same_pictures_share_their_prompts(
    model: LlamaAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    projected: list[int] = []
    project = model.project

    def counted(*args: Any, rows: int = 1, **kwargs: Any) -> dict[str, Tensor]:
        projected.append(rows)
        return project(*args, rows=rows, **kwargs)

    monkeypatch.setattr(model, "project", counted)
    records = [record("What is it?", picture) for picture in (CAT, DOG, CAT, DOG, CAT)]
    said = answer_records(model, records, features=FEATURES, max_new_tokens=4)
    assert projected == [2]
    assert said[0] == said[2] == said[4] != said[1] == said[3]


def test_an_answer_ends_before_its_end_token_and_before_a_stop_string(
    model: LlamaAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    texts = ("Red.<|im_end|>Blue.", " Green. \n\n### Instruction:\nMore?", "Grey and bl")

    def generate(ids: Tensor, **_: Any) -> Tensor:
        answers = [tokenizer.encode(text) for text in texts]
        longest = max(map(len, answers))
        filled = [answer + [tokenizer.eos_token_id] * (longest - len(answer)) for answer in answers]
        return torch.cat([ids, torch.tensor(filled)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    said = answer_records(model, [record("What is it?")] * 3, beams=2)
    assert said == ["Red.", "Green.", "Grey and bl"]

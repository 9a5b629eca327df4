"""Records turned into labelled tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.common.errors import UsageError
from llama_adapter.data.examples import IGNORED, balance_yes_no, encode_and_count, encode_records
from llama_adapter.data.records import Record
from llama_adapter.data.templates import Turn, encode_question
from tests.tiny import build_tiny_tokenizer

TINY = build_tiny_tokenizer()


def record(question: str, answer: str = "!", *images: str, row: int = 1) -> Record:
    return Record((Turn("user", question), Turn("assistant", answer)), row, tuple(map(Path, images)))


ALPACA_512: dict[str, Any] = {"template": "alpaca", "tokenizer": TINY, "max_length": 512}


def test_only_the_answer_and_its_end_token_are_labelled() -> None:
    [example] = encode_records([record("Name a colour.", "Red.", "a.jpg", row=7)], **ALPACA_512)
    answer = TINY("Red.<|im_end|>")["input_ids"]
    assert example.input_ids[-len(answer) :] == answer
    assert example.labels == [IGNORED] * (len(example.input_ids) - len(answer)) + answer
    assert (example.row, example.images) == (7, (Path("a.jpg"),))


def test_a_long_row_is_cut_and_one_without_an_answer_left_is_dropped() -> None:
    records = [record("short", "answer", row=1), record("long " * 600, "lost", row=2)]
    records.append(record("short", "long " * 600, row=3))
    short, cut = encode_records(records, **ALPACA_512)
    assert (short.row, cut.row) == (1, 3)
    assert short.labels[-1] == TINY.eos_token_id
    assert len(cut.input_ids) == len(cut.labels) == 512
    assert cut.labels[-1] == cut.input_ids[-1] != TINY.eos_token_id


def test_a_length_that_leaves_no_answer_is_refused() -> None:
    with pytest.raises(UsageError, match="no answer starts within 8 tokens"):
        encode_records([record("short")], template="alpaca", tokenizer=TINY, max_length=8)


def test_what_became_of_rows_is_counted() -> None:
    records = [record("short", "answer", "a.jpg", row=1), record("long " * 600, "lost", row=2)]
    records += [record("short", "long " * 600, "a.jpg", "b.jpg", row=3)]
    examples, summary = encode_and_count(records, **ALPACA_512)
    assert [example.cut for example in examples] == [False, True]
    assert summary.facts() == {
        "max_length": 512,
        "rows": 3,
        "dropped": 1,
        "cut": 1,
        "pictures": 2,
        "tokens": sum(len(example.input_ids) for example in examples),
        "learnt_tokens": sum(label != IGNORED for example in examples for label in example.labels),
    }
    assert str(summary).startswith(
        "2 rows, 1 of 3 dropped (no answer within 512 tokens), 1 cut at 512 tokens, 2 pictures, "
    )
    assert summary.warning == (
        "warning: of 3 rows 1 are dropped and 1 cut, which are longer than --max-length 512; "
        "give a larger one"
    )
    _, fine = encode_and_count(records[:1], **ALPACA_512)
    assert fine.warning is None and "dropped" not in str(fine) and "cut" not in str(fine)


def test_answers_that_cannot_be_learnt_in_one_row_are_learnt_apart() -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = (  # in the manner of Qwen3
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ '<think></think>' if m.role == 'assistant' and loop.last else '' }}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think></think>' }}{% endif %}"
    )
    turns = (*record("a", "A").turns, *record("b", "B").turns, *record("c", "C").turns)
    records = [Record(turns, 1, (Path("x.jpg"),)), record("d", "D", row=2)]
    examples, summary = encode_and_count(records, template="chat", tokenizer=tokenizer, max_length=512)
    learnt = [tokenizer.decode([i for i in e.labels if i != IGNORED]) for e in examples]
    assert sorted(learnt) == [f"{answer}<|im_end|>" for answer in "ABCD"]
    assert (summary.rows, summary.dropped) == (4, 0)
    for example, answer in zip(examples, learnt, strict=True):
        if answer != "D<|im_end|>":
            place = "ABC".index(answer[0])
            question = encode_question(turns[: 2 * place + 1], "chat", tokenizer)
            assert example.input_ids[: len(question)] == question
            assert example.images == (Path("x.jpg"),) and example.row == 1


def test_a_row_that_the_chat_template_refuses_is_named() -> None:
    tokenizer = build_tiny_tokenizer()
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    tokenizer.chat_template = strict + str(tokenizer.chat_template)
    refused = replace(record("a"), turns=(Turn("system", "Be brief."), *record("a").turns), row=7)
    with pytest.raises(UsageError, match=r"^row 7: this base's chat template refuses .*: No system role"):
        encode_records([record("a"), refused], template="chat", tokenizer=tokenizer, max_length=512)


def test_rows_keep_their_order_beyond_one_call_of_the_tokenizer() -> None:
    records = [record(f"question {i}", f"answer {i}", row=i) for i in range(2_100)]
    examples = encode_records(records, **ALPACA_512)
    assert [example.row for example in examples] == list(range(2_100))
    [last] = encode_records(records[-1:], **ALPACA_512)
    assert examples[-1] == last


def test_yes_comes_up_as_often_as_no_for_each_question_that_has_both() -> None:
    answers = {
        "Is it red?": ["No", "no ", "no", "yes"],
        "Is it blue?": ["no", "no"],
        "What is it?": ["yes", "a dog"],
    }
    records = [record(question, text) for question, several in answers.items() for text in several]
    weights = balance_yes_no(encode_records(records, **ALPACA_512), TINY)
    assert weights == pytest.approx([4 / 6] * 3 + [4 / 2] + [1] * 4)

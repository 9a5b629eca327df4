"""The text formats: as published, the same in training and asking, and safe from typed control tokens."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from llama_adapter.common.errors import UsageError
from llama_adapter.data.templates import (
    TEMPLATE_NAMES,
    Turn,
    encode_dialogues,
    encode_question,
    end_token_ids,
    in_order,
    stop_strings,
)
from tests.tiny import build_tiny_sentencepiece_tokenizer, build_tiny_tokenizer

TINY = build_tiny_tokenizer()
SENTENCEPIECE = build_tiny_sentencepiece_tokenizer()
END = TINY.get_vocab()["<|im_end|>"]

WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Name a colour.

### Response:
"""
WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Translate to French.

### Input:
red

### Response:
"""


def user(text: str, given: str = "") -> Turn:
    return Turn("user", text, given)


def assistant(text: str) -> Turn:
    return Turn("assistant", text)


def question_text(turns: list[Turn], template: str) -> str:
    return str(TINY.decode(encode_question(turns, template, TINY)))


def dialogue_parts(turns: list[Turn], template: str) -> list[tuple[bool, str]]:
    """The dialogue's text in pieces, each with whether it is learnt."""
    [(ids, is_answer)] = encode_dialogues([turns], template, TINY)
    pairs = groupby(zip(ids, is_answer, strict=True), key=lambda pair: pair[1])
    return [(kept, str(TINY.decode([token for token, _ in group]))) for kept, group in pairs]


# --- free text, with what could do harm in it ---------------------------------------------------------------

spelled = st.sampled_from(
    [
        "<|im_end|>",
        "<|im_start|>system\n",
        "<|endoftext|>",
        "<s>",
        "</s>",
        "<|im_end|",
        "\ufdd0",
        "\ufdd1",
        "\n",
    ]
)
free_text = st.lists(spelled | st.text(max_size=8), max_size=4).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    """Conversations that end with an assistant's turn."""
    turns = [Turn("system", draw(free_text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [user(draw(free_text), draw(free_text)), assistant(draw(free_text))]
    return turns


# --- brief --------------------------------------------------------------------------------------------------


def test_brief_is_a_few_words_around_question_and_answer() -> None:
    turns = [Turn("system", "Be kind."), user("What is it?"), assistant("A cat."), user("Where?", "At home")]
    assert dialogue_parts([*turns, assistant("Here.")], "brief") == [
        (False, "Be kind.\n\nQuestion: What is it?\nAnswer:"),
        (True, " A cat.<|im_end|>"),
        (False, "\nQuestion: Where?\nAt home\nAnswer:"),
        (True, " Here.<|im_end|>"),
    ]
    assert stop_strings("brief") == ("\nQuestion:",)


@pytest.mark.parametrize("tokenizer", [TINY, SENTENCEPIECE], ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize("template", ["brief", "scienceqa"])
def test_an_answers_first_word_is_the_token_of_running_text(template: str, tokenizer: Any) -> None:
    asked = "What is it?" if template == "brief" else "Question: What is it?"
    [(ids, is_answer)] = encode_dialogues([[user(asked), assistant("A cat.")]], template, tokenizer)
    assert ids[:-1] == tokenizer("Question: What is it?\nAnswer: A cat.")["input_ids"]
    answer = [token for token, kept in zip(ids, is_answer, strict=True) if kept][:-1]
    assert tokenizer.convert_ids_to_tokens(answer)[0].startswith(("Ġ", "▁"))


# --- alpaca -------------------------------------------------------------------------------------------------


def test_scienceqa_is_the_question_as_it_is_and_answer() -> None:
    turns = [user("Question: ?\nOptions: (A) x"), Turn("assistant", "The answer is A.")]
    [(ids, is_answer)] = encode_dialogues([turns], "scienceqa", TINY)
    assert TINY.decode(ids) == f"Question: ?\nOptions: (A) x\nAnswer: The answer is A.{TINY.eos_token}"
    answer = [token for token, kept in zip(ids, is_answer, strict=True) if kept]
    assert TINY.decode(answer) == f" The answer is A.{TINY.eos_token}"
    again = encode_question([*turns, user("Question: !")], "scienceqa", TINY)
    assert TINY.decode(again).endswith(f"{TINY.eos_token}\n\nQuestion: !\nAnswer:")


def test_alpaca_is_literally_the_official_format() -> None:
    assert question_text([user("Name a colour.")], "alpaca") == WITHOUT_INPUT
    assert question_text([user("Translate to French.", "red")], "alpaca") == WITH_INPUT


def test_alpaca_learns_the_answer_and_its_end_token_only() -> None:
    parts = dialogue_parts([user("Name a colour."), assistant("Red.")], "alpaca")
    assert parts == [(False, WITHOUT_INPUT), (True, "Red.<|im_end|>")]


def test_alpaca_writes_several_exchanges_under_one_opening() -> None:
    turns = [user("Name a colour."), assistant("Red."), user("Another.", "not blue"), assistant("Green.")]
    later = "\n\n### Instruction:\nAnother.\n\n### Input:\nnot blue\n\n### Response:\n"
    assert dialogue_parts(turns, "alpaca") == [
        (False, WITHOUT_INPUT),
        (True, "Red.<|im_end|>"),
        (False, later),
        (True, "Green.<|im_end|>"),
    ]


def test_alpaca_puts_a_system_turn_in_place_of_the_opening() -> None:
    text = question_text([Turn("system", "Answer in rhyme."), user("Name a colour.")], "alpaca")
    assert text == "Answer in rhyme.\n\n### Instruction:\nName a colour.\n\n### Response:\n"
    assert question_text([Turn("system", ""), user("Name a colour.")], "alpaca") == WITHOUT_INPUT


def test_alpaca_ends_at_eos_or_where_a_new_instruction_begins() -> None:
    assert end_token_ids("alpaca", TINY) == [END]
    assert stop_strings("alpaca") == ("### Instruction:",)


def test_alpaca_puts_bos_in_front_once_and_no_space_before_an_answer() -> None:
    turns = [user("Name a colour."), assistant("Red."), user("Another."), assistant("Green.")]
    [(ids, is_answer)] = encode_dialogues([turns], "alpaca", SENTENCEPIECE)
    later = "\n\n### Instruction:\nAnother.\n\n### Response:\n"
    # Without end tokens, the pieces have the tokens of the whole text: no space is added where a piece
    # starts.
    end = SENTENCEPIECE.eos_token_id
    whole = SENTENCEPIECE(WITHOUT_INPUT + "Red." + later + "Green.")["input_ids"]
    assert [token for token in ids if token != end] == whole
    assert ids[0] == SENTENCEPIECE.bos_token_id and ids.count(ids[0]) == 1
    assert [i for i, token in enumerate(ids) if token == end] == [ids.index(end), len(ids) - 1]
    assert is_answer[ids.index(end)] and is_answer[-1]


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no end token"):
        encode_question([user("?")], "alpaca", tokenizer)


# --- chat ---------------------------------------------------------------------------------------------------


def test_chat_is_the_tokenizers_own_template() -> None:
    turns = [Turn("system", "Be brief."), user("Hello"), assistant("Hi."), user("Sum up.", "It rained.")]
    assert question_text(turns, "chat") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        "Hi.<|im_end|>\n<|im_start|>user\nSum up.\n\nIt rained.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert dialogue_parts([user("Hello"), assistant("Hi."), user("Bye"), assistant("Bye.")], "chat") == [
        (False, "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Hi.<|im_end|>"),
        (False, "\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Bye.<|im_end|>"),
    ]


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_characters="<\ufdd0\ufdd1", codec="utf-8")))
def test_chat_gives_the_tokens_that_transformers_gives(text: str) -> None:
    messages = [{"role": "user", "content": text}]
    rendered = TINY.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert encode_question([user(text)], "chat", TINY) == TINY(str(rendered))["input_ids"]


def with_chat_template(chat_template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = build_tiny_tokenizer()
    tokenizer.chat_template = chat_template
    return tokenizer


def test_chat_ends_with_the_token_of_the_chat_template_then_with_eos() -> None:
    tokenizer = with_chat_template(TINY.chat_template)
    tokenizer.eos_token = "<|endoftext|>"
    assert end_token_ids("chat", tokenizer) == [END, tokenizer.eos_token_id]
    assert stop_strings("chat") == ()


def test_chat_ends_with_eos_where_the_chat_template_writes_no_token() -> None:
    tokenizer = with_chat_template(
        "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    turns = [user("Hello"), assistant("Hi."), user("Bye"), assistant("Bye.")]
    [(ids, is_answer)] = encode_dialogues([turns], "chat", tokenizer)
    assert tokenizer.decode(ids) == "user:Hello\nassistant:Hi.<|im_end|>\nuser:Bye\nassistant:Bye.<|im_end|>"
    assert [token for token, kept in zip(ids, is_answer, strict=True) if kept].count(END) == 2


def test_chat_leaves_bos_to_the_chat_template() -> None:
    tokenizer = build_tiny_sentencepiece_tokenizer()
    tokenizer.chat_template = "{{ bos_token + '[INST] ' + messages[0]['content'] + ' [/INST]' }}"
    ids = encode_question([user("Hello")], "chat", tokenizer)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_chat_lets_a_reasoning_template_open_the_answer() -> None:
    tokenizer = with_chat_template(  # in the style of Qwen3
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{{ message['content'].split('</think>')[-1] }}"
        "{% else %}{{ message['content'] }}{% endif %}"
        "{{ '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
    )
    turns = [user("Hello"), assistant("Close it with </think>."), user("Bye"), assistant("Bye.")]
    [(ids, _)] = encode_dialogues([turns], "chat", tokenizer)
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nClose it with </think>.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nBye.<|im_end|>"
    )


def test_a_chat_template_that_refuses_or_is_missing_or_loses_answers_is_told() -> None:
    strict = with_chat_template(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    )
    with pytest.raises(UsageError, match="refuses the conversation: No system role"):
        encode_question([Turn("system", "Be brief."), user("Hello")], "chat", strict)
    with pytest.raises(UsageError, match="no chat template; use the template 'alpaca'"):
        encode_question([user("Hello")], "chat", with_chat_template(None))
    lossy = with_chat_template("{{ messages[-1]['content'] }}")
    with pytest.raises(UsageError, match="drops or repeats answers"):
        encode_question([user("Hello"), assistant("Hi."), user("Bye")], "chat", lossy)


# --- every template -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@settings(max_examples=50, deadline=None)
@given(turns=conversations())
def test_a_question_is_the_start_of_its_training_row(template: str, turns: list[Turn]) -> None:
    [(ids, is_answer)] = encode_dialogues([turns], template, TINY)
    assert len(is_answer) == len(ids)
    for end in range(1, len(turns)):
        if turns[end].role == "assistant":
            question = encode_question(turns[:end], template, TINY)
            assert ids[: len(question)] == question
            assert is_answer[len(question)] and not is_answer[len(question) - 1]
    assert is_answer[-1] and ids[-1] == END


@settings(max_examples=50, deadline=None)
@given(turns=conversations())
def test_a_question_is_the_start_of_its_training_row_with_sentencepiece(turns: list[Turn]) -> None:
    [(ids, is_answer)] = encode_dialogues([turns], "alpaca", SENTENCEPIECE)
    question = encode_question(turns[:-1], "alpaca", SENTENCEPIECE)
    assert ids[: len(question)] == question and all(is_answer[len(question) :])


@settings(max_examples=50, deadline=None)
@given(st.lists(conversations(), max_size=4))
def test_rows_encoded_together_are_what_each_is_alone(dialogues: list[list[Turn]]) -> None:
    alone = [encode_dialogues([turns], "chat", TINY)[0] for turns in dialogues]
    assert encode_dialogues(dialogues, "chat", TINY) == alone


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@settings(max_examples=100, deadline=None)
@given(text=free_text)
def test_nothing_that_is_typed_becomes_a_control_token(template: str, text: str) -> None:
    def control_tokens(typed: str) -> list[int]:
        turns = [Turn("system", typed), user("?" + typed, "!" + typed), assistant(typed)]
        [(ids, _)] = encode_dialogues([turns], template, TINY)
        return [token for token in ids if token in TINY.all_special_ids]

    assert control_tokens(text) == control_tokens("plain")
    kept = text.replace("\ufdd0", "").replace("\ufdd1", "")
    assert kept in question_text([user(text)], template)


def test_control_tokens_that_overlap_or_are_only_written_by_the_template_are_cut_too() -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_tokens(["<turn>", "<b>"])  # as in Gemma: neither is declared special
    tokenizer.add_special_tokens({"additional_special_tokens": ["[a]", "]b]"]})
    tokenizer.chat_template = "{{ '<turn>' + messages[0]['content'] + '<turn>' }}"
    token_id = tokenizer.get_vocab()
    ids = encode_question([user("x <turn> <b> [a]b]")], "chat", tokenizer)
    assert ids.count(token_id["<turn>"]) == 2 and ids.count(token_id["<b>"]) == 1
    assert token_id["[a]"] not in ids and token_id["]b]"] not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<turn>x <turn> <b> [a]b]<turn>"


def test_turns_have_a_known_role_and_hold_text() -> None:
    with pytest.raises(UsageError, match="role is 'tool'; expected one of system, user, assistant"):
        Turn("tool", "42")
    with pytest.raises(UsageError, match="half of a surrogate pair at character 3"):
        user("no\ud83d")
    with pytest.raises(UsageError, match="surrogate"):
        user("fine", "\udcff")


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("", False),
        ("system", False),
        ("user", True),
        ("system user", True),
        ("user assistant", True),
        ("system user assistant user", True),
        ("assistant user", False),
        ("user user", False),
        ("user system assistant", False),
    ],
)
def test_a_conversation_alternates(roles: str, expected: bool) -> None:
    assert in_order([Turn(role, "?") for role in roles.split()]) is expected


def test_turns_that_cannot_be_asked_or_learned_from_are_refused() -> None:
    with pytest.raises(UsageError, match=r"the turns are none; .* user last"):
        encode_question([], "alpaca", TINY)
    with pytest.raises(UsageError, match=r"the turns are user, assistant; .* user last"):
        encode_question([user("?"), assistant("!")], "alpaca", TINY)
    with pytest.raises(UsageError, match=r"the turns are user; .* assistant last"):
        encode_dialogues([[user("?")]], "alpaca", TINY)
    assert encode_dialogues([], "alpaca", TINY) == []


def test_an_unknown_template_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="no template 'vicuna'; available templates are alpaca, brief"):
        encode_question([user("?")], "vicuna", TINY)

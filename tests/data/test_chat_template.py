"""Chat templates of many forms: training and asking give the base's own tokens."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
import transformers.utils.chat_template_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama_adapter.common.errors import UsageError
from llama_adapter.data.chat_template import writes_date
from llama_adapter.data.templates import (
    Turn,
    encode_dialogues,
    encode_question,
    encode_whole_dialogues,
    end_token_ids,
)
from tests.tiny import CHAT_TEMPLATE, build_tiny_sentencepiece_tokenizer, build_tiny_tokenizer

# Forms that are in use, each with its control tokens.
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set loop_messages = messages[1:] %}"
    "{% else %}{% set system = none %}{% set loop_messages = messages %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system is not none %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message.content %}"
    "{% else %}{% set content = message.content %}{% endif %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ ' [INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'system' %}{{ m.content + '\n\n' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
OLD_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'system' %}{{ m.content }}"
    "{% else %}{{ m.content + eos_token + ' ' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
    "+ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% elif m.role == 'system' %}{{ m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SHAPES = {
    "chatml": (CHAT_TEMPLATE, ["<|im_start|>", "<|im_end|>"]),
    "llama 2": (LLAMA_2, []),
    "mistral": (MISTRAL, []),
    "old mistral": (OLD_MISTRAL, []),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "phi 3": (PHI_3, ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
    "llama 3": (LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "vicuna": (VICUNA, []),
}


def byte_level(template: str, specials: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "</s>", *specials]})
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece(template: str, specials: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = build_tiny_sentencepiece_tokenizer(words=["▁yes", "▁no", "yes", "▁▁"], specials=specials)
    tokenizer.chat_template = template
    return tokenizer


def metaspace(template: str, specials: list[str]) -> PreTrainedTokenizerFast:
    """SentencePiece without a space after control tokens, as in newer LLaMA tokenizers."""
    tokenizer = sentencepiece(template, specials)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


TOKENIZERS = {
    f"{name}, {kind.__name__}": kind(*shape)
    for name, shape in SHAPES.items()
    for kind in (byte_level, sentencepiece, metaspace)
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=list(TOKENIZERS))

words = st.sampled_from(["yes", "no", " ", "\n", "\n\n", ".", "ok", "é", "  "])
texts = st.lists(words, max_size=4).map("".join)


@st.composite
def conversations(draw: st.DrawFn, said: st.SearchStrategy[str] = texts) -> list[Turn]:
    turns = [Turn("system", draw(said))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [Turn("user", draw(said)), Turn("assistant", draw(said))]
    return turns


def own_ids(tokenizer: Any, turns: list[Turn], *, ask: bool) -> list[int]:
    """The text that transformers makes of a conversation."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)
    return ids


def learnt(ids: list[int], mask: list[bool]) -> list[list[int]]:
    """The pieces of text that are learnt."""
    stretches: list[list[int]] = []
    for place, (token, kept) in enumerate(zip(ids, mask, strict=True)):
        if kept:
            if not place or not mask[place - 1]:
                stretches.append([])
            stretches[-1].append(token)
    return stretches


@each_tokenizer
@settings(max_examples=30, deadline=None)
@given(turns=conversations())
def test_training_up_to_each_answer_is_asking(tokenizer: Any, turns: list[Turn]) -> None:
    [(ids, mask)] = encode_dialogues([turns], "chat", tokenizer)
    end = end_token_ids("chat", tokenizer)[0]
    assert ids[-1] == end and mask[-1]
    for place, turn in enumerate(turns):
        if turn.role == "assistant":
            question = encode_question(turns[:place], "chat", tokenizer)
            assert ids[: len(question)] == question
            assert mask[len(question)] and not mask[len(question) - 1]
    assert [stretch[-1] for stretch in learnt(ids, mask)] == [end] * sum(t.role == "assistant" for t in turns)


plain = st.lists(st.sampled_from(["yes", "no", "ok", "é", "."]), min_size=1, max_size=4).map(" ".join)


@each_tokenizer
@settings(max_examples=30, deadline=None)
@given(turns=conversations(plain))
def test_training_and_asking_give_the_bases_own_tokens(tokenizer: Any, turns: list[Turn]) -> None:
    [(ids, _)] = encode_dialogues([turns], "chat", tokenizer)
    whole = own_ids(tokenizer, turns, ask=False)
    assert ids == whole[: len(ids)], "up to what stands behind the last end token"
    asked = encode_question(turns[:-1], "chat", tokenizer)
    assert asked == own_ids(tokenizer, turns[:-1], ask=True)


@pytest.mark.parametrize("name", ["llama 2", "mistral"])
def test_the_space_that_a_template_writes_is_learnt_with_the_answers_first_word(name: str) -> None:
    tokenizer = sentencepiece(*SHAPES[name])
    turns = [Turn("user", "Hi"), Turn("assistant", "yes"), Turn("user", "ok"), Turn("assistant", "no")]
    one, two = encode_dialogues([turns[:2], turns], "chat", tokenizer)
    after = ["▁", "</s>"] if name == "llama 2" else ["</s>"]
    said = [tokenizer.convert_ids_to_tokens(ids) for ids in learnt(*two)]
    assert said == [["▁yes", *after], ["▁no", *after]]
    assert learnt(*one) == learnt(*two)[:1]


def test_answers_are_trimmed_where_the_template_trims() -> None:
    turns = [Turn("user", "Hi"), Turn("assistant", " \n yes\n")]
    for name, said in (("llama 3", "yes<|eot_id|>"), ("phi 3", " \n yes\n<|end|>")):
        tokenizer = byte_level(*SHAPES[name])
        [(ids, mask)] = encode_dialogues([turns], "chat", tokenizer)
        assert [tokenizer.decode(stretch) for stretch in learnt(ids, mask)] == [said]


def test_a_token_that_reaches_into_the_question_is_not_made() -> None:
    tokenizer = build_tiny_sentencepiece_tokenizer(words=["]▁", "▁yes"])
    tokenizer.chat_template = OLD_MISTRAL
    turns = [Turn("user", "Hi"), Turn("assistant", " yes")]
    [(ids, mask)] = encode_dialogues([turns], "chat", tokenizer)
    assert tokenizer.convert_ids_to_tokens(learnt(ids, mask)[0]) == ["▁yes", "</s>"]
    assert "]▁" in tokenizer.convert_ids_to_tokens(own_ids(tokenizer, turns, ask=False))


# --- templates that write an answer otherwise than they ask for it ------------------------------------------

REASONING = (  # in the style of Qwen3
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
CHANNELS = (  # in the style of gpt-oss: another end token in the history, and a channel that is not asked for
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}"
    "{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}{{ '\n' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
TWO = [Turn("user", "Hi"), Turn("assistant", "yes"), Turn("user", "ok"), Turn("assistant", "no")]


@pytest.mark.parametrize("template", [REASONING, CHANNELS], ids=["reasoning", "channels"])
def test_an_earlier_answer_that_is_written_otherwise_is_not_learnt_there(template: str) -> None:
    tokenizer = byte_level(template, ["<|im_start|>", "<|im_end|>", "<|return|>", "<|channel|>"])
    dialogue, alone = encode_whole_dialogues([TWO, TWO[:2]], "chat", tokenizer)
    assert dialogue.untaught == (1,) and alone.untaught == ()
    question = encode_question(TWO[:3], "chat", tokenizer)
    assert dialogue.ids[: len(question)] == question
    assert dialogue.is_learnt == [False] * len(question) + [True] * (len(dialogue.ids) - len(question))
    end = tokenizer.convert_ids_to_tokens(end_token_ids("chat", tokenizer)[0])
    assert tokenizer.decode(dialogue.ids[len(question) :]) == f"no{end}"
    assert dialogue.ids == own_ids(tokenizer, TWO, ask=False)[: len(dialogue.ids)]


def test_a_role_that_the_generation_prompt_leaves_out_is_no_part_of_the_answer() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    )
    tokenizer = byte_level(template, ["<|im_start|>", "<|im_end|>"])
    [(ids, mask)] = encode_dialogues([TWO], "chat", tokenizer)
    assert [tokenizer.decode(stretch) for stretch in learnt(ids, mask)] == ["yes<|im_end|>", "no<|im_end|>"]
    assert tokenizer.decode(encode_question(TWO[:1], "chat", tokenizer)).endswith("<|im_start|>assistant\n")
    assert ids == own_ids(tokenizer, TWO, ask=False)[:-1]


# --- what is learnt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["alpaca", "brief", "scienceqa", "chat"])
def test_an_answer_that_is_not_to_be_learnt_is_context(template: str) -> None:
    tokenizer = build_tiny_tokenizer()
    shown = [TWO[0], Turn("assistant", "yes", learnt=False), *TWO[2:]]
    (ids, mask), (all_ids, all_mask) = encode_dialogues([shown, TWO], template, tokenizer)
    assert ids == all_ids
    assert learnt(ids, mask) == learnt(all_ids, all_mask)[1:]


# --- dates --------------------------------------------------------------------------------------------------

DATED = {
    "system turn": "<|im_start|>system\nToday: {{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHAT_TEMPLATE,
    "default system text": '{% set default %}It is {{ strftime_now("%B %d, %Y") }}.{% endset %}'
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n' + default + '<|im_end|>\n' }}{% endif %}"
    + CHAT_TEMPLATE,
    "where there is a clock": "{% if not date_string is defined %}{% if strftime_now is defined %}"
    '{% set date_string = strftime_now("%d %b %Y") %}{% else %}'
    '{% set date_string = "26 Jul 2024" %}{% endif %}'
    "{% endif %}{{ 'Today Date: ' + date_string + '\n' }}" + CHAT_TEMPLATE,
    "inside a macro": "{% macro opening() %}{{ strftime_now('%Y-%m-%d') }}\n{% endmacro %}{{ opening() }}"
    + CHAT_TEMPLATE,
}


@pytest.mark.parametrize("template", DATED.values(), ids=list(DATED))
def test_a_date_that_is_given_stays(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(template, ["<|im_start|>", "<|im_end|>"])
    assert writes_date(tokenizer)
    [(ids, _)] = encode_dialogues([TWO], "chat", tokenizer, date="2025-02-03")
    asked = encode_question(TWO[:1], "chat", tokenizer, date="2025-02-03")
    assert asked == ids[: len(asked)] and "2025" in tokenizer.decode(ids)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2025, 2, 3)

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Clock)
    assert asked == own_ids(tokenizer, TWO[:1], ask=True)
    assert encode_question(TWO[:1], "chat", tokenizer, date="2025-02-04") != asked


@pytest.mark.parametrize("template", DATED.values(), ids=list(DATED))
def test_without_a_date_it_is_today(template: str) -> None:
    tokenizer = byte_level(template, ["<|im_start|>", "<|im_end|>"])
    today = datetime.date.today().isoformat()
    assert encode_question(TWO[:1], "chat", tokenizer) in (
        encode_question(TWO[:1], "chat", tokenizer, date=today),
        encode_question(TWO[:1], "chat", tokenizer, date=datetime.date.today().isoformat()),
    )


def test_a_template_without_a_date_does_not_change_with_it() -> None:
    tokenizer = build_tiny_tokenizer()
    assert not writes_date(tokenizer)
    tokens = {tuple(encode_question(TWO[:1], "chat", tokenizer, date=date)) for date in ("2025-02-03", None)}
    assert len(tokens) == 1


def test_a_date_format_that_is_computed_is_refused() -> None:
    tokenizer = byte_level("{{ strftime_now('%d' ~ '%m') }}" + CHAT_TEMPLATE, ["<|im_start|>", "<|im_end|>"])
    with pytest.raises(UsageError, match="its date format %d%m is computed; expected a literal one"):
        encode_question(TWO[:1], "chat", tokenizer)

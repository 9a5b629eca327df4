"""Every text format in one place: turns of a conversation -> the token ids a decoder reads.

A dialogue is written as stretches of text with the answers between them:

    text, answer, end token, text, answer, end token, ... text | answer, end token

What stands before the bar is the question (`encode_question`, what generation feeds); with the last answer it
is a training row (`encode_dialogues`). Both are made by the same code, so training sees exactly the tokens
that generation will. An answer is tokenised apart from the text before it for the same reason.

Nothing a person types becomes a control token: where a text spells one out (`<|im_end|>`, `</s>`), it is cut
inside the spelling and tokenised as ordinary characters. All other text goes through the tokenizer as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from llama_adapter.common.errors import UsageError

if TYPE_CHECKING:  # slow to import, and a question is checked before that
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")

# Unicode noncharacters: they never stand in a text that is meant to be exchanged.
_CUT = "\ufdd0"  # inside a control token that a person spelled out
_ANSWER = "\ufdd1"  # in place of an answer while a chat template is rendered
_OURS = str.maketrans("", "", _CUT + _ANSWER)


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    `role` is "system", "user" or "assistant". `input` is Alpaca's second field, what a user's instruction is
    about; it is empty for most turns. Raises UsageError for another role and for text that is not Unicode.
    """

    role: str
    text: str
    input: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(f"role is {self.role!r}; expected one of {', '.join(ROLES)}")
        check_unicode(self.text)
        check_unicode(self.input)


def question_turn(text: str) -> Turn:
    """A user's question as a turn. Raises UsageError where it says nothing or is no text."""
    if not text.strip():
        raise UsageError("the question is empty; type one")
    if "\0" in text:
        place = text.index("\0") + 1
        raise UsageError(f"the question is not text: character {place} is a zero byte")
    return Turn("user", text)


def check_unicode(text: str) -> None:
    """Raise UsageError for text that no tokenizer takes: JSON and command lines let such in."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"half of a surrogate pair at character {error.start + 1:,}"
        raise UsageError(f"the text is not valid Unicode: {place}") from None


def in_order(turns: Sequence[Turn]) -> bool:
    """True when `turns` are a conversation: perhaps a system turn, then user and assistant in alternation."""
    roles = [turn.role for turn in turns]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    return bool(roles) and all(role == ("user", "assistant")[i % 2] for i, role in enumerate(roles))


# What a picture's caption is the answer to, in training by turns; the first one is used for scoring.
CAPTION_QUESTIONS = (
    "Describe the picture.",
    "What is in this picture?",
    "What does the picture show?",
    "Write a caption for this photo.",
)


# --- the formats --------------------------------------------------------------------------------------------

# https://github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT
_ALPACA_OPENING = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_ALPACA_OPENING_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


def _eos_token(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise UsageError("this base's tokenizer has no end token (eos), so an answer could never end")
    return str(tokenizer.eos_token)


def _alpaca_stretches(turns: Sequence[Turn], _: PreTrainedTokenizerBase) -> list[str]:
    """The official format. A system turn takes the place of the opening sentence; later exchanges follow as
    further instruction and response blocks."""
    first, users = turns[0], [turn for turn in turns if turn.role == "user"]
    opening = _ALPACA_OPENING_WITH_INPUT if users[0].input else _ALPACA_OPENING
    if first.role == "system" and first.text:
        opening = first.text
    stretches = []
    for user in users:
        given = f"\n\n### Input:\n{user.input}" if user.input else ""
        stretches.append(f"\n\n### Instruction:\n{user.text}{given}\n\n### Response:\n")
    stretches[0] = opening + stretches[0]
    return stretches


def _brief_stretches(turns: Sequence[Turn], _: PreTrainedTokenizerBase) -> list[str]:
    """A few tokens where Alpaca's opening has forty: for short questions, such as those about pictures."""
    opening = f"{turns[0].text}\n\n" if turns[0].role == "system" and turns[0].text else ""
    stretches = []
    for user in turns:
        if user.role == "user":
            text = f"{user.text}\n{user.input}" if user.input else user.text
            stretches.append(f"Question: {text}\nAnswer:")
    # A line break ends the answer before it, whatever its end token looks like to the decoder.
    return [opening + stretches[0], *(f"\n{text}" for text in stretches[1:])]


def _scienceqa_stretches(turns: Sequence[Turn], _: PreTrainedTokenizerBase) -> list[str]:
    """The official layout: a question with its context and options as one text, then "Answer:". Examples
    before it stand apart by an empty line."""
    opening = f"{turns[0].text}\n\n" if turns[0].role == "system" and turns[0].text else ""
    texts = [f"{turn.text}\nAnswer:" for turn in turns if turn.role == "user"]
    return [opening + texts[0], *(f"\n\n{text}" for text in texts[1:])]


def _render_chat(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, ask: bool) -> str:
    """The chat template's text, a mark in place of every answer. `ask`: end with the generation prompt."""
    if not tokenizer.chat_template:
        raise UsageError("this base's tokenizer has no chat template; use the template 'alpaca'")
    messages = []
    for turn in turns:
        text = f"{turn.text}\n\n{turn.input}" if turn.input else turn.text
        messages.append({"role": turn.role, "content": _ANSWER if turn.role == "assistant" else text})
    try:
        # Reasoning templates (Qwen3, SmolLM3) are told to open the answer itself: the data hold no thoughts.
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=ask, enable_thinking=False
        )
    except TemplateError as error:
        raise UsageError(f"this base's chat template refuses the conversation: {error}") from None
    return str(rendered)


def _chat_end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The control token that the chat template writes after an assistant's message, else eos."""
    rendered = _render_chat([Turn("user", "?"), Turn("assistant", "!")], tokenizer, ask=False)
    after = rendered.partition(_ANSWER)[2].lstrip()
    found = [token for token in _control_tokens(tokenizer) if after.startswith(token)]
    return max(found, key=len) if found else _eos_token(tokenizer)


def _chat_stretches(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    stretches = _render_chat(turns, tokenizer, ask=True).split(_ANSWER)
    answers = sum(turn.role == "assistant" for turn in turns)
    if len(stretches) != answers + 1:
        raise UsageError("this base's chat template drops or repeats answers; use the template 'alpaca'")
    # An answer brings its own end token along, so the template's must not follow it a second time.
    end = _chat_end_token(tokenizer) if answers else ""
    return stretches[:1] + [re.sub(rf"\A\s*{re.escape(end)}", "", text) for text in stretches[1:]]


@dataclass(frozen=True)
class _Template:
    """A text format. `stretches` gives a question's text before, between and after its earlier answers."""

    stretches: Callable[[Sequence[Turn], PreTrainedTokenizerBase], list[str]]
    end_token: Callable[[PreTrainedTokenizerBase], str]
    writes_control_tokens: bool  # if not, the tokenizer's own (LLaMA's BOS) are put in front
    stop_strings: tuple[str, ...] = ()
    before_answer: str = ""  # tokenised with the answer, so that " lamp" is a word and not "l", "amp"


_TEMPLATES = {
    "alpaca": _Template(
        stretches=_alpaca_stretches,
        end_token=_eos_token,
        writes_control_tokens=False,
        stop_strings=("### Instruction:",),
    ),
    "brief": _Template(
        stretches=_brief_stretches,
        end_token=_eos_token,
        writes_control_tokens=False,
        stop_strings=("\nQuestion:",),
        before_answer=" ",
    ),
    "scienceqa": _Template(
        stretches=_scienceqa_stretches,
        end_token=_eos_token,
        writes_control_tokens=False,
        stop_strings=("\nQuestion:",),
        before_answer=" ",
    ),
    "chat": _Template(stretches=_chat_stretches, end_token=_chat_end_token, writes_control_tokens=True),
}
TEMPLATE_NAMES = tuple(_TEMPLATES)


def _template(name: str) -> _Template:
    if name not in _TEMPLATES:
        raise UsageError(f"no template {name!r}; available templates are {', '.join(TEMPLATE_NAMES)}")
    return _TEMPLATES[name]


# --- tokens -------------------------------------------------------------------------------------------------


def encode_dialogues(
    dialogues: Sequence[Sequence[Turn]], template: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of whole dialogues, each with a mask that is True on its answers and their end tokens.

    Every dialogue ends with an assistant's turn. They are tokenised together, which is what makes 50,000 rows
    quick. Raises UsageError for turns out of order and for a tokenizer without what the template needs.
    """
    for turns in dialogues:
        if not in_order(turns) or turns[-1].role != "assistant":
            raise UsageError(f"{_roles(turns)}; expected user and assistant in turn, assistant last")
    return _encode(dialogues, template, tokenizer)


def encode_question(turns: Sequence[Turn], template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a question with the conversation before it, up to where the answer starts.

    `turns` end with a user's turn. Raises UsageError as `encode_dialogues` does.
    """
    if not in_order(turns) or turns[-1].role != "user":
        raise UsageError(f"{_roles(turns)}; expected user and assistant in turn, user last")
    return _encode([turns], template, tokenizer)[0][0]


def end_token_ids(template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the one it was trained to end with first, then the tokenizer's eos."""
    tokens = dict.fromkeys([_template(template).end_token(tokenizer), tokenizer.eos_token])
    return [_token_id(token, tokenizer) for token in tokens if token is not None]


def stop_strings(template: str) -> tuple[str, ...]:
    """Texts that a decoder never trained on this template may write in place of an end token."""
    return _template(template).stop_strings


def _roles(turns: Sequence[Turn]) -> str:
    return "the turns are " + (", ".join(turn.role for turn in turns) or "none")


def _encode(
    dialogues: Sequence[Sequence[Turn]], template: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[bool]]]:
    """Ids and answer masks of dialogues that end with a user's or with an assistant's turn."""
    form = _template(template)
    end = [_token_id(form.end_token(tokenizer), tokenizer)]
    leading = [] if form.writes_control_tokens else _leading_ids(tokenizer)
    cut = _cutter(tokenizer)

    # Of each dialogue its stretches and answers by turns, of each of these the pieces between the cuts.
    segments: list[list[list[str]]] = []
    for turns in dialogues:
        safe = [Turn(turn.role, cut(turn.text), cut(turn.input)) for turn in turns]
        question = safe[:-1] if safe[-1].role == "assistant" else safe
        answers = [form.before_answer + turn.text for turn in safe if turn.role == "assistant"]
        texts = zip_longest(form.stretches(question, tokenizer), answers)
        segments.append([text.split(_CUT) for pair in texts for text in pair if text is not None])

    starts = _encode_texts([pieces[0] for pieces, *_ in segments], tokenizer)
    rest = [piece for first, *others in segments for pieces in (first[1:], *others) for piece in pieces]
    continuations = iter(_encode_continuations(rest, tokenizer))

    encoded = []
    for start, (first, *others) in zip(starts, segments, strict=True):
        ids = leading + start + [i for _ in first[1:] for i in next(continuations)]
        mask = [False] * len(ids)
        for number, pieces in enumerate(others):
            is_answer = number % 2 == 0
            segment = [i for _ in pieces for i in next(continuations)] + (end if is_answer else [])
            ids += segment
            mask += [is_answer] * len(segment)
        encoded.append((ids, mask))
    return encoded


def _encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:  # the tokenizer refuses an empty batch
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _encode_continuations(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of texts that do not stand at the start of a sequence.

    SentencePiece tokenizers put a space before whatever they are given; behind a newline they do not. The
    newline is taken off again; where it melted into the text's own first token, the text is encoded as it is.
    """
    newline = _encode_texts(["\n"], tokenizer)[0]
    encoded = _encode_texts(["\n" + text for text in texts], tokenizer)
    melted = [i for i, ids in enumerate(encoded) if ids[: len(newline)] != newline]
    alone = dict(zip(melted, _encode_texts([texts[i] for i in melted], tokenizer), strict=True))
    return [alone[i] if i in alone else ids[len(newline) :] for i, ids in enumerate(encoded)]


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The control tokens that the tokenizer itself puts in front of a text, such as LLaMA's BOS."""
    sample = tokenizer("a", return_special_tokens_mask=True)
    pairs = zip(sample["input_ids"], sample["special_tokens_mask"], strict=True)
    return [token for token, _ in takewhile(lambda pair: pair[1], pairs)]


def _token_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)  # a list for a list
    return token_id


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What steers a decoder: the special tokens, and added tokens that the chat template writes.

    Other added tokens (Gemma has `<table>`, Qwen code markers) are ordinary text in a short spelling.
    """
    written = str(tokenizer.chat_template)
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if not token.content.isspace() and (token.special or token.content in written)
    ]


def _cutter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """A function that marks, in a person's text, a place inside every spelled-out control token."""
    # Only the first character is consumed, so that control tokens that overlap are all found.
    spelled = [f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in _control_tokens(tokenizer)]
    start = re.compile("|".join(spelled) or "(?!)")
    return lambda text: start.sub(rf"\g<0>{_CUT}", text.translate(_OURS))

"""All text formats: turns of a conversation -> the token ids that a decoder reads.

A dialogue is written as pieces of text with the answers between them:

    text, answer, end token, text, answer, end token, ... text | answer, end token

The part before the bar is the question (`encode_question`): generation starts from it. Together with the last
answer it is a training row (`encode_dialogues`). The same code makes both, so training sees exactly the
tokens that generation will. For the same reason no token spans the border between a text and an answer.

Nothing that a person types becomes a control token. If a text spells one out (`<|im_end|>`, `</s>`), it is
cut inside the spelling and tokenised as ordinary characters. All other text is given to the tokenizer
unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile, zip_longest
from typing import TYPE_CHECKING

from llama_adapter.common.errors import UsageError
from llama_adapter.data.chat_template import (
    CUT,
    ChatTemplate,
    Segment,
    control_tokens,
    eos_token,
    without_marks,
)
from llama_adapter.data.turns import CAPTION_QUESTIONS as CAPTION_QUESTIONS
from llama_adapter.data.turns import Turn as Turn
from llama_adapter.data.turns import check_unicode as check_unicode
from llama_adapter.data.turns import in_order as in_order
from llama_adapter.data.turns import question_turn as question_turn

if TYPE_CHECKING:  # slow to import, and a question is checked before it is needed
    from transformers import PreTrainedTokenizerBase

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


def _alpaca_stretches(turns: Sequence[Turn]) -> list[str]:
    """The official format. A system turn replaces the opening sentence. Later exchanges follow as further
    instruction and response blocks."""
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


def _brief_stretches(turns: Sequence[Turn]) -> list[str]:
    """A few tokens, where Alpaca's opening has forty: for short questions, such as those about pictures."""
    opening = f"{turns[0].text}\n\n" if turns[0].role == "system" and turns[0].text else ""
    stretches = []
    for user in turns:
        if user.role == "user":
            stretches.append(f"Question: {_with_input(user)}\nAnswer:")
    # A line break ends the previous answer, whatever its end token looks like to the decoder.
    return [opening + stretches[0], *(f"\n{text}" for text in stretches[1:])]


def _scienceqa_stretches(turns: Sequence[Turn]) -> list[str]:
    """The official layout: a question with its context and options as one text, then "Answer:". Earlier
    examples are separated by an empty line."""
    opening = f"{turns[0].text}\n\n" if turns[0].role == "system" and turns[0].text else ""
    texts = [f"{_with_input(turn)}\nAnswer:" for turn in turns if turn.role == "user"]
    return [opening + texts[0], *(f"\n\n{text}" for text in texts[1:])]


def _with_input(turn: Turn) -> str:
    return f"{turn.text}\n{turn.input}" if turn.input else turn.text


@dataclass(frozen=True)
class _Template:
    """A text format of this library. Its answers end with the tokenizer's eos.

    Attributes:
        stretches: gives a question's text before, between and after its earlier answers.
        stop_strings: texts that a decoder never trained on this format may write instead of the end token.
        before_answer: text tokenised together with the answer, so that " lamp" is one word and not "l",
            "amp".
    """

    stretches: Callable[[Sequence[Turn]], list[str]]
    stop_strings: tuple[str, ...]
    before_answer: str = ""

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """Question, answer, question ... The text before them does not affect how they are tokenised."""
        training = turns[-1].role == "assistant"
        answers = [turn for turn in turns if turn.role == "assistant"]
        segments: list[Segment] = []
        for text, answer in zip_longest(self.stretches(turns[:-1] if training else turns), answers):
            segments.append(Segment(text, "\n" if segments else ""))
            if answer is not None:
                said = self.before_answer + answer.text
                segments.append(Segment(said, "\n", is_answer=True, is_learnt=answer.learnt, ends=True))
        return segments


_CHAT = "chat"  # the tokenizer's own chat template
_TEMPLATES = {
    "alpaca": _Template(_alpaca_stretches, ("### Instruction:",)),
    "brief": _Template(_brief_stretches, ("\nQuestion:",), before_answer=" "),
    "scienceqa": _Template(_scienceqa_stretches, ("\nQuestion:",), before_answer=" "),
}
TEMPLATE_NAMES = (*_TEMPLATES, _CHAT)


def _own_template(name: str) -> _Template:
    if name not in _TEMPLATES:
        raise UsageError(f"no template {name!r}; available templates are {', '.join(TEMPLATE_NAMES)}")
    return _TEMPLATES[name]


# --- tokens -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodedDialogue:
    """A dialogue as tokens.

    Attributes:
        is_learnt: for each token, whether it belongs to an answer to learn or is its end token.
        untaught: indices of the turns that should be learnt and can't be here, because the chat template
            writes them differently from a last answer. Each can be learnt where it is the last turn.
    """

    ids: list[int]
    is_learnt: list[bool]
    untaught: tuple[int, ...] = ()


def encode_dialogues(
    dialogues: Sequence[Sequence[Turn]],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    date: str | None = None,
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of whole dialogues, each with a mask that is True on its answers and their end tokens.

    The mask is False on answers that are not to be learnt, and on the `untaught` ones of
    `encode_whole_dialogues`. Arguments and errors are the same as there.
    """
    encoded = encode_whole_dialogues(dialogues, template, tokenizer, date=date)
    return [(dialogue.ids, dialogue.is_learnt) for dialogue in encoded]


def encode_whole_dialogues(
    dialogues: Sequence[Sequence[Turn]],
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    date: str | None = None,
) -> list[EncodedDialogue]:
    """Encode dialogues that end with an assistant's turn, to learn from.

    All are tokenised in one call, which makes 50,000 rows fast.

    Args:
        date: such as 2026-11-28, for chat templates that write it. None is today.

    Raises:
        UsageError: turns out of order, or a tokenizer that lacks something the template needs.
    """
    for turns in dialogues:
        if not in_order(turns) or turns[-1].role != "assistant":
            raise UsageError(f"{_roles(turns)}; expected user and assistant in turn, assistant last")
    return _encode(dialogues, template, tokenizer, date)


def encode_question(
    turns: Sequence[Turn], template: str, tokenizer: PreTrainedTokenizerBase, *, date: str | None = None
) -> list[int]:
    """Token ids of a question with the conversation before it, up to where the answer starts.

    `turns` end with a user's turn. `date` and errors are those of `encode_whole_dialogues`.
    """
    if not in_order(turns) or turns[-1].role != "user":
        raise UsageError(f"{_roles(turns)}; expected user and assistant in turn, user last")
    return _encode([turns], template, tokenizer, date)[0].ids


def end_token_ids(template: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: first the one that training uses, then the tokenizer's eos."""
    tokens = dict.fromkeys([_end_token(template, tokenizer), tokenizer.eos_token])
    return [_token_id(token, tokenizer) for token in tokens if token is not None]


def stop_strings(template: str) -> tuple[str, ...]:
    """Texts that a decoder never trained on this template may write instead of an end token."""
    return () if template == _CHAT else _own_template(template).stop_strings


def _end_token(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if template == _CHAT:
        return ChatTemplate(tokenizer).end_token
    _own_template(template)
    return eos_token(tokenizer)


def _roles(turns: Sequence[Turn]) -> str:
    return "the turns are " + (", ".join(turn.role for turn in turns) or "none")


def _encode(
    dialogues: Sequence[Sequence[Turn]], template: str, tokenizer: PreTrainedTokenizerBase, date: str | None
) -> list[EncodedDialogue]:
    """Encode dialogues that end with a user's or an assistant's turn."""
    if not dialogues:
        return []
    form: _Template | ChatTemplate
    leading: list[int] = []
    if template == _CHAT:  # a chat template writes BOS itself
        form = chat = ChatTemplate(tokenizer, date)
        end_token = chat.end_token
    else:
        form = _own_template(template)
        leading, end_token = _leading_ids(tokenizer), eos_token(tokenizer)
    end = [_token_id(end_token, tokenizer)]
    cut = _cutter(tokenizer)
    segments = [
        form.segments([replace(turn, text=cut(turn.text), input=cut(turn.input)) for turn in turns])
        for turns in dialogues
    ]
    stretches = iter(_encode_segments([one for several in segments for one in several], tokenizer))

    encoded = []
    for turns, several in zip(dialogues, segments, strict=True):
        ids, mask, untaught = list(leading), [False] * len(leading), []
        answers = (place for place, turn in enumerate(turns) if turn.role == "assistant")
        for segment in several:
            stretch = next(stretches) + (end if segment.ends else [])
            ids += stretch
            mask += [segment.is_learnt] * len(stretch)
            if segment.is_answer and turns[place := next(answers)].learnt and not segment.is_learnt:
                untaught.append(place)
        encoded.append(EncodedDialogue(ids, mask, tuple(untaught)))
    return encoded


def _encode_segments(segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each segment. The pieces between its cuts are tokenised separately."""
    pieces: list[tuple[str, str]] = []
    counts = []
    for segment in segments:
        first, *others = segment.text.split(CUT)
        pieces += [(segment.after, first), *(("\n", piece) for piece in others)]
        counts.append(1 + len(others))
    encoded = iter(_encode_behind(pieces, tokenizer))
    return [[token for ids in islice(encoded, count) for token in ids] for count in counts]


def _encode_behind(pieces: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts, each given with the text before it ("": it starts a sequence).

    Both are tokenised together, and the tokens of the text before are removed, so the ids are those of
    running text. If the two merge into one token at the border, a newline is used instead: SentencePiece
    tokenizers put a space before any text, but not after a newline. If that merges too, the text is encoded
    by itself.
    """
    contexts = list(dict.fromkeys(context for context, _ in pieces))
    taken_off = dict(zip(contexts, _encode_texts(contexts, tokenizer), strict=True))
    encoded = _encode_texts([context + text for context, text in pieces], tokenizer)
    melted = []
    for place, ((context, _), ids) in enumerate(zip(pieces, encoded, strict=True)):
        before = taken_off[context]
        if ids[: len(before)] == before:
            encoded[place] = ids[len(before) :]
        else:
            melted.append(place)
    if melted:
        again = [("" if pieces[place][0] == "\n" else "\n", pieces[place][1]) for place in melted]
        for place, ids in zip(melted, _encode_behind(again, tokenizer), strict=True):
            encoded[place] = ids
    return encoded


def _encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:  # the tokenizer refuses an empty batch
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The control tokens that the tokenizer puts before every text, such as LLaMA's BOS."""
    sample = tokenizer("a", return_special_tokens_mask=True)
    pairs = zip(sample["input_ids"], sample["special_tokens_mask"], strict=True)
    return [token for token, _ in takewhile(lambda pair: pair[1], pairs)]


def _token_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)  # it gives a list only for a list
    return token_id


def _cutter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """A function that marks a cut inside every control token that a person's text spells out."""
    # Matches only the first character, so that overlapping control tokens are all found.
    spelled = [f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in control_tokens(tokenizer)]
    start = re.compile("|".join(spelled) or "(?!)")
    return lambda text: start.sub(rf"\g<0>{CUT}", without_marks(text))

"""A tokenizer's own chat template: a conversation -> the stretches of text that a decoder reads.

What the template writes is the truth, since the base was trained on it. Three renderings of a conversation
tell where an answer starts and ends:

- up to an answer, with the generation prompt: this is what the decoder is given when it is asked;
- with later turns behind it: the answer starts where the first text ends. Llama 2 and Mistral write a space
  there. It belongs to the answer: " yes" is one token, and the one to learn;
- the whole: the answer ends with the template's end token. What stands before that (in Llama 2 a space)
  belongs to it, too.

What a template writes in front of an answer beside spaces (a role that its generation prompt leaves out, a
channel) is put at the question's end, so that nobody reads it in an answer.

A template may write an earlier answer otherwise than it is asked for: Qwen3 opens an answer with empty
thoughts and leaves them out of the history. Such an answer can be learnt only where it is the last one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateError

from llama_adapter.common.errors import UsageError
from llama_adapter.data.turns import Turn

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

# Unicode noncharacters: they never stand in a text that is meant to be exchanged.
CUT = "\ufdd0"  # inside a control token that a person spelled out
_ANSWER = "\ufdd1"  # in place of an answer while the template is rendered
_OURS = str.maketrans("", "", CUT + _ANSWER)

# transformers gives a template the clock, as strftime_now(format). This takes its place: a date that stays.
_CLOCK = (
    "{% macro strftime_now(format) %}{{ dates_by_format[format] if format in dates_by_format else "
    "raise_exception('its date format ' ~ format ~ ' is computed; expected a literal one') }}{% endmacro +%}"
)


@dataclass(frozen=True)
class Segment:
    """A stretch of a conversation's text, tokenised by itself.

    Attributes:
        text: `CUT` stands inside control tokens that a person spelled out.
        after: the text right before it, which decides how its first characters are tokenised. "": it starts a
            sequence, or with a control token.
        is_answer: whether an assistant's turn is in it.
        is_learnt: whether training learns it.
        ends: whether the answer's end token follows, which is not in the text.
    """

    text: str
    after: str
    is_answer: bool = False
    is_learnt: bool = False
    ends: bool = False


def eos_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's end token. Raises UsageError where it has none."""
    if tokenizer.eos_token is None:
        raise UsageError("this base's tokenizer has no end token (eos), so an answer could never end")
    return str(tokenizer.eos_token)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What steers a decoder: the special tokens, and added tokens that the chat template writes.

    Other added tokens (Gemma has `<table>`, Qwen code markers) are ordinary text in a short spelling.
    """
    written = str(tokenizer.chat_template)
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if not token.content.isspace() and (token.special or token.content in written)
    ]


def without_marks(text: str) -> str:
    """A person's text without the characters that mark places here."""
    return text.translate(_OURS)


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes today's date (Llama 3.2, SmolLM3 and others do)."""
    return bool(tokenizer.chat_template) and "strftime_now" in tokenizer.get_chat_template()


class ChatTemplate:
    """The chat template of a tokenizer, on one date.

    Args:
        date: as 2026-11-28, for templates that write it; None is today.

    Raises:
        UsageError: a tokenizer without a template, and from every method where the template refuses or loses
            a part of the conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise UsageError("this base's tokenizer has no chat template; use the template 'alpaca'")
        self._tokenizer = tokenizer
        self._template = tokenizer.get_chat_template()
        self._dates: dict[str, str] = {}
        if writes_date(tokenizer):
            day = datetime.now() if date is None else datetime.fromisoformat(date)
            self._dates = {form: day.strftime(form) for form in _date_formats(self._template)}
            self._template = _CLOCK + self._template
        tokens = sorted(control_tokens(tokenizer), key=len, reverse=True)
        self._control_token = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self._header = ""
        question, answer = Turn("user", "?"), Turn("assistant", "!")
        asked, whole = self._render([question], ask=True), self._render([question, answer], ask=False)
        before, _, after = whole.partition(_ANSWER)
        if before.startswith(asked) and before[len(asked) :].strip():
            self._header = before[len(asked) :].rstrip(" ")
        found = self._control_token.match(after.lstrip())
        self._writes_end = found is not None
        self.end_token = found.group() if found else eos_token(tokenizer)
        self._end = re.compile(rf"(\s*){re.escape(self.end_token)}")

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """Question, answer, question, answer ... of a conversation that ends with a question or an answer.

        Of an answer that the template writes otherwise than it is asked for, `is_learnt` is False, whatever
        its turn says.
        """
        training = turns[-1].role == "assistant"
        question = turns[:-1] if training else turns
        text = self._render(question, ask=True)
        marks = [found.start() for found in re.finditer(_ANSWER, text)]
        places = [place for place, turn in enumerate(question) if turn.role == "assistant"]
        if len(marks) != len(places):
            raise UsageError("this base's chat template drops or repeats answers; use the template 'alpaca'")

        segments: list[Segment] = []
        start, after = 0, ""
        for mark, place in zip(marks, places, strict=True):
            asked = self._render(question[:place], ask=True)
            as_asked = text.startswith(asked) and start <= len(asked) <= mark
            opening = len(asked) if as_asked else mark
            before = Segment(text[start:opening], after)
            end = self._end.match(text, mark + 1)
            answer = text[opening:mark] + _core(turns[place].text) + (end[1] if end else "")
            closed = end is not None or not self._writes_end  # where it writes none, ours is put there
            learnt = as_asked and closed and turns[place].learnt
            segments += [before, Segment(answer, self._context(before), True, learnt, closed)]
            start = end.end() if end else mark + 1
            after = self.end_token if end else ("" if self._control_token.match(text, start) else "\n")
        segments.append(Segment(text[start:], after))
        if training:
            answer = self._last_answer(turns, text)
            segments.append(Segment(answer, self._context(segments[-1]), True, turns[-1].learnt, True))
        return segments

    def _last_answer(self, turns: Sequence[Turn], asked: str) -> str:
        """The last turn with what the template writes around it, up to its end token."""
        whole = self._render(turns, ask=False)
        before, mark, behind = whole[len(asked) :].partition(_ANSWER)
        if not (mark and whole.startswith(asked)):
            return turns[-1].text  # the generation prompt is no part of what it writes afterwards
        end = self._end.match(behind)
        return before + _core(turns[-1].text) + (end[1] if end else "")

    def _context(self, segment: Segment) -> str:
        """The end of a segment, from its last control token on: all that the tokens behind it depend on."""
        piece = segment.text.rpartition(CUT)[2]
        tokens = list(self._control_token.finditer(piece))
        if tokens:
            return piece[tokens[-1].start() :]
        return ("\n" if CUT in segment.text else segment.after) + piece

    def _render(self, turns: Sequence[Turn], *, ask: bool) -> str:
        """The template's text, a mark in place of every answer. `ask`: end where the next answer starts."""
        messages = []
        for turn in turns:
            text = f"{turn.text}\n\n{turn.input}" if turn.input else turn.text
            if turn.role == "assistant":  # the spaces around it stay, since some templates take them off
                core = _core(text)
                left, _, right = text.partition(core) if core else (text, "", "")
                text = left + _ANSWER + right
            messages.append({"role": turn.role, "content": text})
        try:
            # Reasoning templates (Qwen3, SmolLM3) open the answer itself: the data hold no thoughts.
            rendered = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=ask,
                enable_thinking=False,
                dates_by_format=self._dates,
            )
        except TemplateError as error:
            raise UsageError(f"this base's chat template refuses the conversation: {error}") from None
        return str(rendered) + (self._header if ask else "")


def _core(text: str) -> str:
    """A text without the white space around it."""
    return text.strip()


def _date_formats(template: str) -> list[str]:
    """The formats of dates in a template: its string literals with a %."""
    tokens = Environment().lex(template)
    return [text[1:-1] for _, kind, text in tokens if kind == "string" and "%" in text]  # without the quotes

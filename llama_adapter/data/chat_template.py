"""A tokenizer's own chat template: splits a conversation into the pieces of text that a decoder reads.

The template's own output is always right, since the base was trained on it. Three renderings of a
conversation show where an answer starts and ends:

- up to the answer, with the generation prompt: the decoder is given this text when it is asked;
- with a later turn after it: the answer starts where the first text ends. Llama 2 and Mistral write a space
  there. It belongs to the answer: " yes" is one token, and the one to learn;
- the whole conversation: the answer ends with the template's end token. Anything that the template writes
  before that token (a space in Llama 2) belongs to the answer too.

If the template writes more than spaces before an answer (a role that its generation prompt leaves out, a
channel), that text is moved to the end of the question, so that it is never read as part of an answer.

A template may write an earlier answer differently from the last one: Qwen3 puts empty thoughts before the
last answer and leaves them out of the history. Such an answer can be learnt only where it is the last one.
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

# Unicode noncharacters: text that is meant to be exchanged never contains them.
CUT = "\ufdd0"  # marks a cut inside a control token that a person spelled out
_ANSWER = "\ufdd1"  # stands for an answer while the template is rendered
_OURS = str.maketrans("", "", CUT + _ANSWER)

# transformers gives a template the clock as strftime_now(format). This replaces it by a fixed date.
_CLOCK = (
    "{% macro strftime_now(format) %}{{ dates_by_format[format] if format in dates_by_format else "
    "raise_exception('its date format ' ~ format ~ ' is computed; expected a literal one') }}{% endmacro +%}"
)


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation's text that is tokenised by itself.

    Attributes:
        text: the text, with `CUT` inside control tokens that a person spelled out.
        after: the text right before it, which affects how its first characters are tokenised. "" if it starts
            a sequence or begins with a control token.
        is_answer: whether it is an assistant's turn.
        is_learnt: whether training learns it.
        ends: whether the answer's end token follows. The token is not in the text.
    """

    text: str
    after: str
    is_answer: bool = False
    is_learnt: bool = False
    ends: bool = False


def eos_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's end token. Raises UsageError if it has none."""
    if tokenizer.eos_token is None:
        raise UsageError("this base's tokenizer has no end token (eos), so an answer could never end")
    return str(tokenizer.eos_token)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that steer a decoder: the special tokens, and added tokens that the chat template writes.

    Other added tokens (Gemma's `<table>`, Qwen's code markers) are ordinary text that has one token.
    """
    written = str(tokenizer.chat_template)
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if not token.content.isspace() and (token.special or token.content in written)
    ]


def without_marks(text: str) -> str:
    """A person's text without the characters that this module uses as marks."""
    return text.translate(_OURS)


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes today's date, as those of Llama 3.2, SmolLM3 and others do."""
    return bool(tokenizer.chat_template) and "strftime_now" in tokenizer.get_chat_template()


class ChatTemplate:
    """The chat template of a tokenizer, with a fixed date.

    Args:
        date: such as 2026-11-28, for templates that write it. None is today.

    Raises:
        UsageError: a tokenizer without a template. Every method also raises it if the template refuses the
            conversation or drops a part of it.
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

        `is_learnt` is False, whatever the turn says, for an answer that the template writes differently from
        the last one.
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
            closed = end is not None or not self._writes_end  # if it writes no end token, ours is added
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
        """The last turn with all that the template writes around it, up to its end token."""
        whole = self._render(turns, ask=False)
        before, mark, behind = whole[len(asked) :].partition(_ANSWER)
        if not (mark and whole.startswith(asked)):
            return turns[-1].text  # what it writes afterwards does not contain the generation prompt
        end = self._end.match(behind)
        return before + _core(turns[-1].text) + (end[1] if end else "")

    def _context(self, segment: Segment) -> str:
        """The end of a segment, from its last control token on.

        The tokens after it depend on nothing before.
        """
        piece = segment.text.rpartition(CUT)[2]
        tokens = list(self._control_token.finditer(piece))
        if tokens:
            return piece[tokens[-1].start() :]
        return ("\n" if CUT in segment.text else segment.after) + piece

    def _render(self, turns: Sequence[Turn], *, ask: bool) -> str:
        """The template's text, with a mark for every answer.

        With `ask` it ends where the next answer starts.
        """
        messages = []
        for turn in turns:
            text = f"{turn.text}\n\n{turn.input}" if turn.input else turn.text
            if turn.role == "assistant":  # keep the spaces around it: some templates strip an answer
                core = _core(text)
                left, _, right = text.partition(core) if core else (text, "", "")
                text = left + _ANSWER + right
            messages.append({"role": turn.role, "content": text})
        try:
            # Reasoning templates (Qwen3, SmolLM3) write something before the answer: the data have no
            # thoughts.
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
    """The date formats in a template: its string literals that contain a %."""
    tokens = Environment().lex(template)
    return [text[1:-1] for _, kind, text in tokens if kind == "string" and "%" in text]  # without the quotes

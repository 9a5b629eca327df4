"""An answer while it grows: its tokens, its text, and where it ends.

`Said` has the rule for where an answer ends. The engine, scoring and a single question all use it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from llama_adapter.decoding.question import Request


class Said:
    """The tokens and the text of an answer so far, and the rule for where it ends.

    An answer ends before an end token, which is not part of it, before a stop string, or after
    `max_new_tokens` tokens.

    Attributes:
        tokens: the tokens so far.
        text: their text. Text that a later token could still change is held back: a character of several
            tokens until it is complete, and what may be the start of a stop string until that is clear. White
            space before the first word is left out.
        finish_reason: "stop" (the answer is complete) or "length" (it reached its limit of tokens). None
            while it may still grow.

    Args:
        tokenizer: None if only the tokens are wanted; the text is then empty, and stop strings are ignored.
    """

    def __init__(
        self,
        max_new_tokens: int | None = None,
        end_ids: Collection[int] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._limit, self._end_ids = max_new_tokens, end_ids
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        self._stream = DecodeStream(skip_special_tokens=True)
        self._decoded = ""

    @classmethod
    def to(cls, request: Request, tokenizer: PreTrainedTokenizerBase) -> Said:
        """An answer to a request, still empty."""
        return cls(request.sampling.max_new_tokens, request.end_ids, tokenizer, request.stop_strings)

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    def take(self, token: int) -> str:
        """Add the next token, unless the answer has ended. Returns the new text."""
        if self.ended:
            return ""
        if token in self._end_ids:
            return self.end()
        self.tokens.append(token)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)  # None for tokenizers in pure Python
        self._decoded = (
            self._decode() if backend is None else self._decoded + (self._stream.step(backend, token) or "")
        )
        grown = self._grow(_settled(self._decoded, self._stop_strings))
        return grown + (self.end("length") if len(self.tokens) == self._limit and not self.ended else "")

    def end(self, reason: str = "stop") -> str:
        """End the answer, since no more tokens come. Returns the text that was held back."""
        if self.ended:
            return ""
        self._decoded = self._decode()
        grown = self._grow(self._decoded)
        self.finish_reason = self.finish_reason or reason
        return grown

    def _grow(self, settled: str) -> str:
        """Extend the text to the settled part of what was decoded, or up to a stop string, which ends it."""
        stops = [at for at in (self._decoded.find(stop) for stop in self._stop_strings) if at >= 0]
        if stops:
            settled = self._decoded[: min(stops)].rstrip()
            self.finish_reason = "stop"
        grown = settled.lstrip()[len(self.text) :]
        self.text += grown
        return grown

    def _decode(self) -> str:
        if self._tokenizer is None:
            return ""
        # Clean-up would remove spaces that were already sent.
        return str(
            self._tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def _settled(text: str, stop_strings: Sequence[str]) -> str:
    """``text`` without an end that may change: an incomplete character, or the start of a stop string."""
    whole = text.rstrip("\ufffd")
    starts = [whole]
    for stop in stop_strings:
        lengths = range(1, min(len(stop), len(whole) + 1))
        starts += [whole[:-length] for length in lengths if whole.endswith(stop[:length])]
    settled = min(starts, key=len)
    return settled.rstrip() if stop_strings else settled  # white space before a stop string is left out too


class Progress(NamedTuple):
    """The state of an answer after one more token.

    Attributes:
        piece: the new text.
        tokens: the number of tokens so far.
        seconds: the time spent on making them.
        finish_reason: as in `Said`.
    """

    piece: str
    tokens: int
    seconds: float
    finish_reason: str | None


_NOTHING = Progress("", 0, 0.0, None)


def follow(tokens: Iterable[int], said: Said) -> Generator[Progress, None, None]:
    """The progress of an answer after each token. What the caller does in between is not timed."""
    seconds, started = 0.0, time.perf_counter()
    for token in tokens:
        piece = said.take(token)
        seconds += time.perf_counter() - started
        yield Progress(piece, len(said.tokens), seconds, said.finish_reason)
        if said.ended:
            return
        started = time.perf_counter()
    piece = said.end()
    yield Progress(piece, len(said.tokens), seconds, said.finish_reason)


class Answer:
    """An answer while it is made. Iterate over it for the pieces of its text; close it to stop the work.

    Attributes:
        text: the text so far, without white space around it.
        tokens: the number of tokens so far, without the end token.
        seconds: the time spent on making them. It includes reading the question, but neither waiting for a
            turn nor what the caller does in between.
        finish_reason: why the answer ended: "stop" (it is complete), "length" (it reached its limit of
            tokens) or "closed" (it was stopped). None while it may still grow.

    Args:
        steps: its progress, token by token.
        stop: called when the answer is closed.
        so_far: the progress to start from.
    """

    def __init__(
        self,
        steps: Iterator[Progress],
        *,
        stop: Callable[[], None] = lambda: None,
        so_far: Progress = _NOTHING,
    ) -> None:
        self._said, self.tokens, self.seconds, self.finish_reason = so_far
        self._steps = steps
        self._stop = stop

    @property
    def text(self) -> str:
        return self._said.strip()

    @property
    def tokens_per_second(self) -> float:
        """`tokens` divided by `seconds`; 0 before the first token."""
        return self.tokens / self.seconds if self.tokens else 0.0

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> str:
        while self.finish_reason is None:
            step = next(self._steps, None)
            if step is None:  # an error ended it
                break
            self._said += step.piece
            self.tokens, self.seconds = step.tokens, step.seconds
            self.finish_reason = self.finish_reason or step.finish_reason
            if step.piece:
                return step.piece
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Stop. The text so far stays. Any thread may call this."""
        self.finish_reason = self.finish_reason or "closed"
        self._stop()
        if isinstance(self._steps, Generator):
            with suppress(ValueError):  # another thread is computing a token, and stops after it
                self._steps.close()

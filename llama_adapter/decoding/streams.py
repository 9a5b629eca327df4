"""A stream of tokens for one question, and of text from tokens. Closing the stream stops the work.

Python users have ``LlamaAdapter.generate`` with every decoding of transformers; this short loop serves the
command line and the page, and a test holds the two equal.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_adapter.decoding.sampling import Sampling
from llama_adapter.methods.state import AdapterState

_COLD = 1e-5  # a temperature below it gives all to the likeliest token, where dividing by it would overflow


def build_processors(sampling: Sampling) -> LogitsProcessorList:
    """What is done to the logits before a token is drawn, in the order of transformers' generate."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature >= _COLD:
        if sampling.temperature != 1:
            processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


@dataclass(frozen=True)
class Request:
    """A question that is ready to be answered.

    Attributes:
        question: (1, T) token ids.
        project: gives what the adapter adds, as `LlamaAdapter.project`; called when the answer starts.
        sampling: how tokens are chosen, and how many there may be.
        end_ids: tokens that end the answer.
        stop_strings: texts that end it.
    """

    question: Tensor
    project: Callable[[], AdapterState]
    sampling: Sampling
    end_ids: Collection[int]
    stop_strings: Sequence[str]


class TokenChooser:
    """Chooses the tokens of one answer, one after the other, and remembers them.

    Args:
        question: (1, T) token ids, which a repetition penalty counts as said.
    """

    def __init__(self, sampling: Sampling, question: Tensor) -> None:
        self._greedy = sampling.temperature < _COLD
        self._processors = build_processors(sampling)
        self._generator = None
        if sampling.seed is not None:
            self._generator = torch.Generator(device=question.device).manual_seed(sampling.seed)
        self._seen = question

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token, (1, 1), by its logits, (1, V)."""
        scores = self._processors(self._seen, logits.float())  # type: ignore[arg-type]
        if self._greedy:
            token = scores.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        self._seen = torch.cat((self._seen, token), dim=1)
        return token


class Said:
    """The tokens of an answer, and where it ends: the one rule for all who make answers.

    An end token ends an answer and is not part of it; so does the last token that there may be.

    Attributes:
        tokens: those of the answer so far.
        ended: whether it is whole.
    """

    def __init__(self, max_new_tokens: int, end_ids: Collection[int]) -> None:
        self.tokens: list[int] = []
        self.ended = False
        self._limit, self._end_ids = max_new_tokens, end_ids

    def take(self, token: int) -> bool:
        """Take the next token; returns whether it is part of the answer."""
        if self.ended or token in self._end_ids:
            self.ended = True
            return False
        self.tokens.append(token)
        self.ended = len(self.tokens) == self._limit
        return True


@torch.inference_mode()
def stream_tokens(
    forward: Callable[..., Any], question: Tensor, sampling: Sampling, end_ids: Collection[int]
) -> Iterator[int]:
    """Tokens of the answer, one by one, without the end token.

    Args:
        forward: takes ``input_ids`` (1, T), ``past_key_values``, ``use_cache`` and ``logits_to_keep``, gives
            ``logits`` and ``past_key_values``, as a decoder of transformers does.
        question: (1, T) token ids.
        end_ids: tokens that end the answer.
    """
    choose = TokenChooser(sampling, question)
    said = Said(sampling.max_new_tokens, end_ids)
    step, cache = question, None
    while not said.ended:
        output = forward(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        step = choose(output.logits[:, -1])
        if said.take(token := int(step)):
            yield token


class Answer:
    """An answer as it is made: iterate for the pieces of its text. Closing it stops the work.

    Attributes:
        text: what was said so far, without space around it.
        tokens: how many tokens were made so far; the end token does not count.
        seconds: the time that making them took, the reading of the question included, the caller's not.
        finish_reason: why the answer ended: "stop" (it was complete), "length" (it reached its limit of
            tokens), "closed" (somebody stopped it); None while it may still grow.

    Args:
        max_new_tokens: the limit on ``tokens``, at which they end by themselves.
    """

    def __init__(
        self,
        tokens: Iterable[int],
        tokenizer: PreTrainedTokenizerBase,
        stop_strings: Sequence[str] = (),
        *,
        max_new_tokens: int | None = None,
    ) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self.finish_reason: str | None = None
        self._said = ""
        self._closed = False
        self._at_limit = False
        self._max_new_tokens = max_new_tokens
        self._pieces = stream_text(self._counted(tokens), tokenizer, stop_strings)

    @property
    def text(self) -> str:
        return self._said.strip()

    @property
    def tokens_per_second(self) -> float:
        """Tokens by `seconds`; 0 before the first."""
        return self.tokens / self.seconds if self.tokens else 0.0

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> str:
        started = time.perf_counter()
        try:
            piece = next(self._pieces)
        except StopIteration:
            if self.finish_reason is None:
                self.finish_reason = "length" if self._at_limit else "stop"
            raise
        finally:
            self.seconds += time.perf_counter() - started
        self._said += piece
        return piece

    def close(self) -> None:
        """Stop; what was said so far stays. Any thread may call it."""
        self._closed = True
        if self.finish_reason is None:
            self.finish_reason = "closed"
        with suppress(ValueError):  # another thread is at a token: it ends after that one
            self._pieces.close()

    def _counted(self, tokens: Iterable[int]) -> Iterator[int]:
        for token in tokens:
            self.tokens += 1
            yield token
            if self._closed:
                return
        # Not reached where a stop string ended the text.
        self._at_limit = self.tokens == self._max_new_tokens


def stream_text(
    tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()
) -> Generator[str, None, None]:
    """The text that each token adds; nothing is sent that a later token could still change or take back.

    The space before an answer's first word is left out. A character of several tokens comes when it is whole.
    A stop string ends the text before it, and the beginning of one is held back until it is clear that it is
    none.
    """
    sent = ""
    text = ""
    for text in _texts(tokens, tokenizer):
        stops = [at for at in (text.find(stop) for stop in stop_strings) if at >= 0]
        if stops:
            text = text[: min(stops)].rstrip()
            break
        ready = _settled(text, stop_strings).lstrip()
        if len(ready) > len(sent):
            yield ready[len(sent) :]
            sent = ready
    text = text.lstrip()
    if len(text) > len(sent):
        yield text[len(sent) :]


def _texts(tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The whole text after each token, and once more when they end, with what was still half a character."""
    ids: list[int] = []

    def decode() -> str:
        # Cleaning up would take back spaces that were sent.
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    stream = DecodeStream(skip_special_tokens=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers in pure Python have none
    text = ""
    for token in tokens:
        ids.append(token)
        text = decode() if backend is None else text + (stream.step(backend, token) or "")
        yield text
    yield decode()


def _settled(text: str, stop_strings: Sequence[str]) -> str:
    """``text`` without what may still change at its end: half a character, or the start of a stop string."""
    whole = text.rstrip("\ufffd")
    starts = [whole]
    for stop in stop_strings:
        lengths = range(1, min(len(stop), len(whole) + 1))
        starts += [whole[:-length] for length in lengths if whole.endswith(stop[:length])]
    settled = min(starts, key=len)
    return settled.rstrip() if stop_strings else settled  # the space before a stop string goes with it

"""Answers to one question as a stream: of tokens, and of text made from tokens. Closing a stream stops its
work.

From Python, ``LlamaAdapter.generate`` offers every decoding method of transformers. The short loop here
serves the command line and the page; a test checks that both give the same tokens.

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

_COLD = 1e-5  # a lower temperature means the most likely token: dividing by it would overflow


def build_processors(sampling: Sampling) -> LogitsProcessorList:
    """What changes the logits before a token is drawn, in the order of transformers' generate."""
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
        project: computes what the adapter adds, as `LlamaAdapter.project`. Called when the answer starts.
        sampling: how tokens are chosen, and how many at most.
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
        question: (1, T) token ids. A repetition penalty applies to these too.
    """

    def __init__(self, sampling: Sampling, question: Tensor) -> None:
        self._greedy = sampling.temperature < _COLD
        self._processors = build_processors(sampling)
        self._generator = None
        if sampling.seed is not None:
            self._generator = torch.Generator(device=question.device).manual_seed(sampling.seed)
        self._seen = question

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token, (1, 1), chosen by its logits, (1, V)."""
        scores = self._processors(self._seen, logits.float())  # type: ignore[arg-type]
        if self._greedy:
            token = scores.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        self._seen = torch.cat((self._seen, token), dim=1)
        return token


class Said:
    """The tokens of an answer, and the rule for where it ends. Everything that makes answers uses this rule.

    An answer ends before an end token, which is not part of it, or after `max_new_tokens` tokens.

    Attributes:
        tokens: the tokens of the answer so far.
        ended: whether the answer is complete.
    """

    def __init__(self, max_new_tokens: int, end_ids: Collection[int]) -> None:
        self.tokens: list[int] = []
        self.ended = False
        self._limit, self._end_ids = max_new_tokens, end_ids

    def take(self, token: int) -> bool:
        """Add the next token. Returns whether it is part of the answer."""
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
    """The tokens of an answer, one by one, without the end token.

    Args:
        forward: takes ``input_ids`` (1, T), ``past_key_values``, ``use_cache`` and ``logits_to_keep``, and
        gives
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
    """An answer while it is made. Iterate over it for the pieces of its text; close it to stop the work.

    Attributes:
        text: the text so far, without white space around it.
        tokens: the number of tokens so far, without the end token.
        seconds: the time spent on making them. It includes reading the question, but not what the caller does
            in between.
        finish_reason: why the answer ended: "stop" (it is complete), "length" (it reached its limit of
            tokens) or "closed" (it was stopped). None while it may still grow.

    Args:
        max_new_tokens: the limit on ``tokens``, at which the stream of tokens ends by itself.
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
        """`tokens` divided by `seconds`; 0 before the first token."""
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
        """Stop. The text so far stays. Any thread may call this."""
        self._closed = True
        if self.finish_reason is None:
            self.finish_reason = "closed"
        with suppress(ValueError):  # another thread is computing a token, and stops after it
            self._pieces.close()

    def _counted(self, tokens: Iterable[int]) -> Iterator[int]:
        for token in tokens:
            self.tokens += 1
            yield token
            if self._closed:
                return
        # Not reached if a stop string ended the text.
        self._at_limit = self.tokens == self._max_new_tokens


def stream_text(
    tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()
) -> Generator[str, None, None]:
    """The text that each token adds. Text that a later token could still change is held back.

    White space before the first word is left out. A character of several tokens is sent when it is complete.
    The text ends before a stop string. What may be the start of a stop string is held back until that is
    clear.
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
    """The whole text after each token, and once more at the end, perhaps with an incomplete character."""
    ids: list[int] = []

    def decode() -> str:
        # Clean-up would remove spaces that were already sent.
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    stream = DecodeStream(skip_special_tokens=True)
    backend = getattr(tokenizer, "backend_tokenizer", None)  # None for tokenizers in pure Python
    text = ""
    for token in tokens:
        ids.append(token)
        text = decode() if backend is None else text + (stream.step(backend, token) or "")
        yield text
    yield decode()


def _settled(text: str, stop_strings: Sequence[str]) -> str:
    """``text`` without an end that may change: an incomplete character, or the start of a stop string."""
    whole = text.rstrip("\ufffd")
    starts = [whole]
    for stop in stop_strings:
        lengths = range(1, min(len(stop), len(whole) + 1))
        starts += [whole[:-length] for length in lengths if whole.endswith(stop[:length])]
    settled = min(starts, key=len)
    return settled.rstrip() if stop_strings else settled  # white space before a stop string is left out too

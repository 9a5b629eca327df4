"""The answer to one question as a stream of tokens. Closing the stream stops the work.

From Python, ``LlamaAdapter.generate`` offers every decoding method of transformers. The short loop here
serves the command line and the page; a test checks that both give the same tokens.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_adapter.decoding.answer import Said
from llama_adapter.decoding.sampling import Sampling

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


@torch.inference_mode()
def stream_endless(forward: Callable[..., Any], question: Tensor, sampling: Sampling) -> Iterator[int]:
    """Tokens, one by one, without an end: `Said` has the rule for where an answer ends.

    Args:
        forward: takes ``input_ids`` (1, T), ``past_key_values``, ``use_cache`` and ``logits_to_keep``, and
            returns ``logits`` and ``past_key_values``, as a decoder of transformers does.
        question: (1, T) token ids.
    """
    choose = TokenChooser(sampling, question)
    step, cache = question, None
    while True:
        output = forward(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        step = choose(output.logits[:, -1])
        yield int(step)


def stream_tokens(
    forward: Callable[..., Any], question: Tensor, sampling: Sampling, end_ids: Collection[int]
) -> Iterator[int]:
    """The tokens of an answer, one by one, without the end token.

    Args:
        forward, question: those of `stream_endless`.
        end_ids: tokens that end the answer.
    """
    said = Said(sampling.max_new_tokens, end_ids)
    for token in stream_endless(forward, question, sampling):
        known = len(said.tokens)
        said.take(token)
        yield from said.tokens[known:]
        if said.ended:
            return

"""Answers to questions, asked in the text format of an adapter: complete or as a stream.

Shapes: R rows, I pictures, F features of one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llama_adapter.common.errors import UsageError
from llama_adapter.data.templates import encode_question, end_token_ids, stop_strings
from llama_adapter.decoding.answer import Answer, Said, follow
from llama_adapter.decoding.question import GivenTurns, Question, Request, read_turns
from llama_adapter.decoding.streams import stream_endless
from llama_adapter.methods.state import AdapterState
from llama_adapter.surface.named_adapters import NO_ADAPTER
from llama_adapter.surface.seeing import Seeing


class Answers(Seeing):
    """The chat of `LlamaAdapter`."""

    if TYPE_CHECKING:
        config: Any
        generation_config: Any

        def project(self, *args: Any, **kwargs: Any) -> AdapterState: ...

    def chat(self, question: Question | GivenTurns, **options: Any) -> str:
        """Answer a question, or a conversation that ends with one, and return the text. See `stream_chat`."""
        answer = self.stream_chat(question, **options)
        for _ in answer:
            pass
        return answer.text

    def stream_chat(self, question: Question | GivenTurns, **options: Any) -> Answer:
        """Answer a question, or a conversation that ends with one, as a stream of text.

        Tokens are computed only while the stream is iterated; closing it stops the work. An answer also ends
        where the decoder's context is full.

        Args:
            question: a text, turns of which the last is a question, or a `Question`. A turn is a `Turn`, or
                a dictionary with ``role`` and ``content``.
            **options: the attributes of a `Question`: ``image`` (one or more pictures: files, contents of
                files, opened images, or features from `encode_images`), ``adapter`` (a name) and
                ``sampling``; also single fields of `Sampling`, such as ``max_new_tokens=8, temperature=0``
                (greedy).

        Raises:
            UsageError: a question that is empty or longer than the decoder's context, a file that is no
                picture, or an unknown option.
        """
        request = self.prepare_request(Question.of(question, **options))

        def tokens() -> Iterator[int]:
            forward = functools.partial(self, adapter=self.project_requests([request])[0])
            yield from stream_endless(forward, request.tokens, request.sampling)

        return Answer(follow(tokens(), Said.to(request, self._tokenizer())))

    def prepare_request(self, question: Question) -> Request:
        """Turn a question into tokens and what is needed to answer it. Errors are those of `stream_chat`."""
        features, sampling = question.image, question.sampling
        none = features is None or (isinstance(features, (Tensor, Sequence)) and len(features) == 0)
        name = self.answering_adapter(question.adapter, pictured=not none)
        if features is not None and not isinstance(features, Tensor):
            features = self.encode_images(features, adapter=name)
        ids = question.tokens or self.encode_question(question.turns, adapter=name)
        if self.context_length is not None:
            room = self.context_length - len(ids)
            if room < 1:
                limit = self.context_length
                raise UsageError(f"the question has {len(ids)} tokens, the base reads {limit}; shorten it")
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        return Request(
            tokens=torch.tensor([ids], device=self.device),
            adapter=name,
            features=features,
            sampling=sampling,
            end_ids=self.end_ids(name),
            stop_strings=stop_strings(self.template(name)),
        )

    def project_requests(self, requests: Sequence[Request]) -> list[AdapterState]:
        """Compute what the adapter of each request adds to its row, R = 1 each.

        Requests with the same adapter and the same pictures (the same tensor of features) share one state.
        """
        states = {
            request: request.adapter for request in requests if isinstance(request.adapter, AdapterState)
        }
        by_name: dict[str, dict[Any, list[Request]]] = {}
        for request in requests:
            if isinstance(request.adapter, str):
                alike = by_name.setdefault(request.adapter, {})
                alike.setdefault(_picture_key(request), []).append(request)
        for name, groups in by_name.items():
            pictures = [group[0].features for group in groups.values()]
            for group, state in zip(groups.values(), self._project_each(name, pictures), strict=True):
                states |= dict.fromkeys(group, state)
        return [states[request] for request in requests]

    def _project_each(self, adapter: str, pictures: Sequence[Tensor | None]) -> list[AdapterState]:
        """Compute what an adapter adds for each set of pictures, (I, F) each or None, in one call."""
        counts = torch.tensor([0 if features is None else len(features) for features in pictures])
        if not counts.any():
            return [self.project(adapter)] * len(pictures)
        owners = torch.arange(len(pictures)).repeat_interleave(counts)
        seen = torch.cat([features for features in pictures if features is not None])
        state = self.project(adapter, image_features=seen, image_owners=owners, rows=len(pictures))
        return [state] if len(pictures) == 1 else [state.of_row(row) for row in range(len(pictures))]

    def encode_question(self, turns: GivenTurns, *, adapter: str | None = None) -> list[int]:
        """Token ids of a question in the text format of an adapter. The bare base uses its own chat template.

        Raises:
            UsageError: an empty question, or a model without a tokenizer.
        """
        date = self.template_date(adapter)
        return encode_question(read_turns(turns), self.template(adapter), self._tokenizer(), date=date)

    def end_ids(self, adapter: str | None = None) -> list[int]:
        """The tokens that end an answer of an adapter (by default the active one) or of the bare base."""
        ids = end_token_ids(self.template(adapter), self._tokenizer())
        own = self.generation_config.eos_token_id
        own = [] if own is None else own if isinstance(own, list) else [own]
        return [*dict.fromkeys([*ids, *map(int, own)])]

    def template_date(self, adapter: str | None = None) -> str | None:
        """The day that the chat template writes for an adapter (by default the active one); None is today."""
        name = self.answering_adapter(adapter)
        return None if name == NO_ADAPTER else self.get_adapter(name).config.template_date

    @property
    def context_length(self) -> int | None:
        """How many tokens the decoder can read, question and answer together. None: no limit is known."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None) or None

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise UsageError("this model was made without a tokenizer; pass one to LlamaAdapter(...)")
        return self.tokenizer

    def template(self, adapter: str | None = None) -> str:
        """The name of the text format of an adapter (by default the active one)."""
        name = self.answering_adapter(adapter)
        if name != NO_ADAPTER:
            return self.get_adapter(name).config.template
        has_own = self.tokenizer is not None and self.tokenizer.chat_template
        return "chat" if has_own else "alpaca"


def _picture_key(request: Request) -> int | None:
    return None if request.features is None else id(request.features)

"""Questions answered in the text format of an adapter, whole or as a stream."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llama_adapter.common.errors import UsageError
from llama_adapter.data.pictures import Picture
from llama_adapter.data.templates import Turn, encode_question, end_token_ids, question_turn, stop_strings
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.decoding.streams import Answer, Request, stream_tokens
from llama_adapter.surface.named_adapters import NO_ADAPTER
from llama_adapter.surface.seeing import Seeing


class Answers(Seeing):
    """The chat of `LlamaAdapter`."""

    if TYPE_CHECKING:
        config: Any

        def project(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]: ...

    def stream_chat(
        self,
        turns: str | Sequence[Turn],
        *,
        image: Picture | Sequence[Picture] | Tensor | None = None,
        adapter: str | None = None,
        sampling: Sampling | None = None,
        question_ids: list[int] | None = None,
    ) -> Answer:
        """The answer to a question, or to a conversation that ends with one, as a stream of text.

        No token is computed until it is iterated; closing it stops the work. An answer that reaches the end
        of the decoder's context ends there.

        Args:
            image: a picture or several: files, their contents, opened ones, or features of `encode_images`.
            question_ids: what `encode_question` gives for ``turns``, where the caller has it already.

        Raises:
            UsageError: an empty question, one longer than the decoder's context, or what is no picture.
        """
        request = self.prepare_request(
            turns, image=image, adapter=adapter, sampling=sampling, question_ids=question_ids
        )

        def tokens() -> Iterator[int]:
            forward = functools.partial(self, adapter=NO_ADAPTER, **request.project())
            yield from stream_tokens(forward, request.question, request.sampling, request.end_ids)

        limit = request.sampling.max_new_tokens
        return Answer(tokens(), self._tokenizer(), request.stop_strings, max_new_tokens=limit)

    def prepare_request(
        self,
        turns: str | Sequence[Turn],
        *,
        image: Picture | Sequence[Picture] | Tensor | None = None,
        adapter: str | None = None,
        sampling: Sampling | None = None,
        question_ids: list[int] | None = None,
    ) -> Request:
        """All that it takes to answer, whoever does it. Arguments and errors are those of `stream_chat`."""
        name = self._name(adapter)
        features: dict[str, Any] = {}
        if image is not None:
            encoded = image if isinstance(image, Tensor) else self.encode_images(image, adapter=name)
            owners = torch.zeros(len(encoded), dtype=torch.long)
            features = {"image_features": encoded, "image_owners": owners}
        ids = question_ids or self.encode_question(turns, adapter=name)
        sampling = sampling or Sampling()
        if self.context_length is not None:
            room = self.context_length - len(ids)
            if room < 1:
                limit = self.context_length
                raise UsageError(f"the question has {len(ids)} tokens, the base reads {limit}; shorten it")
            sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        template = self.template(name)
        return Request(
            question=torch.tensor([ids], device=self.decoder.device),
            project=functools.partial(self.project, name, **features),
            sampling=sampling,
            end_ids=end_token_ids(template, self._tokenizer()),
            stop_strings=stop_strings(template),
        )

    def chat(
        self,
        turns: str | Sequence[Turn],
        *,
        image: Picture | Sequence[Picture] | Tensor | None = None,
        adapter: str | None = None,
        sampling: Sampling | None = None,
    ) -> str:
        """The whole answer to a question, or to a conversation that ends with one. See `stream_chat`."""
        answer = self.stream_chat(turns, image=image, adapter=adapter, sampling=sampling)
        for _ in answer:
            pass
        return answer.text

    def encode_question(self, turns: str | Sequence[Turn], *, adapter: str | None = None) -> list[int]:
        """Token ids of a question in the text format of an adapter; the bare base has its own chat template.

        Raises:
            UsageError: an empty question, or a model without a tokenizer.
        """
        turns = [question_turn(turns)] if isinstance(turns, str) else list(turns)
        if turns:
            question_turn(turns[-1].text)
        date = self.template_date(adapter)
        return encode_question(turns, self.template(adapter), self._tokenizer(), date=date)

    def template_date(self, adapter: str | None = None) -> str | None:
        """The day that the chat template writes for an adapter (the active one); None is today's."""
        name = self._name(adapter)
        return None if name == NO_ADAPTER else self.get_adapter(name).config.template_date

    @property
    def context_length(self) -> int | None:
        """How many tokens the decoder reads, question and answer together; None where it sets no limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None) or None

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise UsageError("this model was made without a tokenizer; pass one to LlamaAdapter(...)")
        return self.tokenizer

    def template(self, adapter: str | None = None) -> str:
        """Name of the text format in which an adapter (the active one) is asked."""
        name = self._name(adapter)
        if name != NO_ADAPTER:
            return self.get_adapter(name).config.template
        has_own = self.tokenizer is not None and self.tokenizer.chat_template
        return "chat" if has_own else "alpaca"

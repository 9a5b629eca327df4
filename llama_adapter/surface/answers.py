"""Answers to questions, asked in the text format of an adapter: complete or as a stream."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llama_adapter.common.errors import UsageError
from llama_adapter.data.pictures import Picture
from llama_adapter.data.templates import Turn, encode_question, end_token_ids, question_turn, stop_strings
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.decoding.streams import Answer, Request, stream_tokens
from llama_adapter.methods.state import AdapterState
from llama_adapter.surface.named_adapters import NO_ADAPTER
from llama_adapter.surface.seeing import Seeing

# One turn or several. A dictionary is a turn with "role" and "content", as in chat templates.
Question: TypeAlias = "str | Turn | Mapping[str, Any] | Sequence[Turn | Mapping[str, Any]]"


class Answers(Seeing):
    """The chat of `LlamaAdapter`."""

    if TYPE_CHECKING:
        config: Any
        generation_config: Any

        def project(self, *args: Any, **kwargs: Any) -> AdapterState: ...

    def stream_chat(
        self,
        turns: Question,
        *,
        image: Picture | Sequence[Picture] | Tensor | None = None,
        adapter: str | None = None,
        sampling: Sampling | None = None,
        question_ids: list[int] | None = None,
        **settings: Any,
    ) -> Answer:
        """Answer a question, or a conversation that ends with one, as a stream of text.

        Tokens are computed only while the stream is iterated; closing it stops the work. An answer also ends
        where the decoder's context is full.

        Args:
            turns: a question, or turns of which the last is a question. A turn is a `Turn`, or a dictionary
                with ``role`` and ``content``.
            image: one or more pictures: files, contents of files, opened images, or features from
                `encode_images`.
            question_ids: the result of `encode_question` for ``turns``, if the caller already has it.
            sampling: how tokens are chosen. None uses the paper's settings.
            **settings: single fields of `Sampling`, such as ``max_new_tokens=8, temperature=0`` (greedy).

        Raises:
            UsageError: a question that is empty or longer than the decoder's context, a file that is no
                picture, or an unknown setting.
        """
        request = self.prepare_request(
            turns, image=image, adapter=adapter, sampling=sampling, question_ids=question_ids, **settings
        )

        def tokens() -> Iterator[int]:
            forward = functools.partial(self, adapter=request.project())
            yield from stream_tokens(forward, request.question, request.sampling, request.end_ids)

        limit = request.sampling.max_new_tokens
        return Answer(tokens(), self._tokenizer(), request.stop_strings, max_new_tokens=limit)

    def prepare_request(
        self,
        turns: Question,
        *,
        image: Picture | Sequence[Picture] | Tensor | None = None,
        adapter: str | None = None,
        sampling: Sampling | None = None,
        question_ids: list[int] | None = None,
        **settings: Any,
    ) -> Request:
        """Everything needed to compute the answer. Arguments and errors are those of `stream_chat`."""
        name = self._name(adapter)
        features: dict[str, Any] = {}
        if image is not None:
            encoded = image if isinstance(image, Tensor) else self.encode_images(image, adapter=name)
            owners = torch.zeros(len(encoded), dtype=torch.long)
            features = {"image_features": encoded, "image_owners": owners}
        ids = question_ids or self.encode_question(turns, adapter=name)
        sampling = _sampling(sampling, settings)
        if self.context_length is not None:
            room = self.context_length - len(ids)
            if room < 1:
                limit = self.context_length
                raise UsageError(f"the question has {len(ids)} tokens, the base reads {limit}; shorten it")
            sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        template = self.template(name)
        return Request(
            question=torch.tensor([ids], device=self.device),
            project=functools.partial(self.project, name, **features),
            sampling=sampling,
            end_ids=self.end_ids(name),
            stop_strings=stop_strings(template),
        )

    def chat(
        self,
        turns: Question,
        *,
        image: Picture | Sequence[Picture] | Tensor | None = None,
        adapter: str | None = None,
        sampling: Sampling | None = None,
        **settings: Any,
    ) -> str:
        """Answer a question, or a conversation that ends with one, and return the text. See `stream_chat`."""
        answer = self.stream_chat(turns, image=image, adapter=adapter, sampling=sampling, **settings)
        for _ in answer:
            pass
        return answer.text

    def encode_question(self, turns: Question, *, adapter: str | None = None) -> list[int]:
        """Token ids of a question in the text format of an adapter. The bare base uses its own chat template.

        Raises:
            UsageError: an empty question, or a model without a tokenizer.
        """
        if isinstance(turns, str):
            turns = [question_turn(turns)]
        asked = [_turn(turn) for turn in ([turns] if isinstance(turns, (Turn, Mapping)) else turns)]
        if asked:
            question_turn(asked[-1].text)
        date = self.template_date(adapter)
        return encode_question(asked, self.template(adapter), self._tokenizer(), date=date)

    def end_ids(self, adapter: str | None = None) -> list[int]:
        """The tokens that end an answer of an adapter (by default the active one) or of the bare base."""
        ids = end_token_ids(self.template(adapter), self._tokenizer())
        own = self.generation_config.eos_token_id
        own = [] if own is None else own if isinstance(own, list) else [own]
        return [*dict.fromkeys([*ids, *map(int, own)])]

    def template_date(self, adapter: str | None = None) -> str | None:
        """The day that the chat template writes for an adapter (by default the active one); None is today."""
        name = self._name(adapter)
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
        name = self._name(adapter)
        if name != NO_ADAPTER:
            return self.get_adapter(name).config.template
        has_own = self.tokenizer is not None and self.tokenizer.chat_template
        return "chat" if has_own else "alpaca"


def _sampling(sampling: Sampling | None, settings: dict[str, Any]) -> Sampling:
    known = [field.name for field in dataclasses.fields(Sampling)]
    if unknown := [name for name in settings if name not in known]:
        raise UsageError(f"there is no setting {unknown[0]!r} of sampling; there are {', '.join(known)}")
    return dataclasses.replace(sampling or Sampling(), **settings)


def _turn(turn: Turn | Mapping[str, Any]) -> Turn:
    """Make a turn. If a dictionary's content is a list, its texts are used."""
    if isinstance(turn, Turn):
        return turn
    if not isinstance(turn, Mapping) or set(turn) != {"role", "content"}:
        raise UsageError(f"a turn is {turn!r:.80}; expected a Turn, or a dictionary with role and content")
    content = turn["content"]
    if isinstance(content, (list, tuple)):
        kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content]
        if other := [kind for kind in kinds if kind != "text"]:
            raise UsageError(f"a turn's content has a part of type {other[0]!r}; give pictures with image=")
        content = "\n".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise UsageError(f"a turn's content is {content!r:.80}; expected text")
    return Turn(str(turn["role"]), content)

"""The exchanges of one chat. They can be retried, edited and undone."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from PIL import Image

from llama_adapter.common.errors import UsageError
from llama_adapter.data.pictures import Picture, opened_picture
from llama_adapter.data.templates import Turn, question_turn
from llama_adapter.decoding.question import Question
from llama_adapter.decoding.sampling import Sampling

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

    from llama_adapter.decoding.answer import Answer
    from llama_adapter.model import LlamaAdapter


@dataclass(frozen=True)
class Exchange:
    """A question and its answer, which may still be incomplete."""

    question: Turn
    answer: Answer
    adapter: str  # the adapter that answered
    images: tuple[Image.Image, ...] = ()  # the pictures that came with the question, upright RGB
    unseen: bool = False  # there was a picture, but the adapter can't see pictures
    read: tuple[Turn, ...] = ()  # what the answer was made from: the conversation up to the question
    features: Tensor | None = None  # (I, F) of the pictures that it was made from
    dropped: int = 0  # how many of the earliest exchanges did not fit into the context

    @property
    def turns(self) -> list[Turn]:
        return [self.question, Turn("assistant", self.answer.text)]


class Conversation:
    """One person's chat with a model. Several chats can share one model.

    Every call that asks returns an `Answer` to iterate over. What it has said so far is already part of the
    conversation: an answer that is closed early is kept as far as it got.

    Attributes:
        model: the model that answers.
        stream_chat: makes the answers. None is the model's own; an `Engine`'s answers several people at once.
        adapter: the name of the adapter. None is the model's active one, ``"none"`` the bare base. ``"auto"``
            is the adapter that sees once there is a picture, and the text adapter before that.
        system: the text of a system turn; empty for none.
        sampling: how tokens are chosen.
        exchanges: what was said so far. The latest one's answer has its ``tokens`` and ``tokens_per_second``.

    A question's pictures are also used for later questions, until other pictures come. Each picture is
    encoded once for all adapters with the same tower.
    """

    def __init__(
        self,
        model: LlamaAdapter,
        *,
        adapter: str | None = None,
        system: str = "",
        sampling: Sampling | None = None,
        stream_chat: Callable[[Question], Answer] | None = None,
    ) -> None:
        self.model = model
        self.stream_chat = stream_chat
        self.adapter = adapter
        self.system = system
        self.sampling = sampling or Sampling()
        self.exchanges: list[Exchange] = []
        # By picture and tower. The picture is kept alive, so that no other one gets its id.
        self._features: dict[tuple[int, str], tuple[Image.Image, Tensor]] = {}

    @property
    def unseen(self) -> bool:
        """Whether the latest answer was made without the conversation's picture, because its adapter can't
        see pictures."""
        return bool(self.exchanges) and self.exchanges[-1].unseen

    @property
    def dropped(self) -> int:
        """How many of the earliest exchanges the latest answer was made without, because they did not fit
        into the context."""
        return self.exchanges[-1].dropped if self.exchanges else 0

    def ask(self, message: str, images: Sequence[Picture] = ()) -> Answer:
        """Ask something, perhaps about pictures. An answer that is still being made is stopped.

        Raises:
            UsageError: a question that is empty or longer than the context, a file that is no picture, or
                pictures for an adapter that can't see. Then nothing has changed.
        """
        question = question_turn(message)
        if images:
            self.model.tower(self.adapter)
        return self._ask(question, self.exchanges, tuple(opened_picture(image) for image in images))

    def check(self, message: str, images: Sequence[Picture] = (), *, adapter: str | None = None) -> None:
        """Raise the UsageError with which `ask` would refuse a question, without asking it.

        Args:
            adapter: the adapter that would answer; None is the current `adapter`.
        """
        adapter = self.adapter if adapter is None else adapter
        self.model.prepare_request(Question([question_turn(message)], adapter=adapter))
        if images:
            self.model.tower(adapter)
        for image in images:
            opened_picture(image)

    def restore(self, exchange: Exchange) -> None:
        """Add an exchange of an earlier conversation after those that are there."""
        turns = self._turns(exchange.question, self.exchanges[exchange.dropped :])
        self.exchanges = [*self.exchanges, replace(exchange, read=tuple(turns))]

    def latest_features(self) -> Tensor | None:
        """(I, F) of the pictures that the latest answer was made from, or None.

        For an exchange that was restored, they are encoded again.
        """
        if not self.exchanges:
            return None
        latest = self.exchanges[-1]
        seen = self._latest_images(self.exchanges)
        if latest.features is not None or latest.unseen or not seen or not self.model.sees(latest.adapter):
            return latest.features
        return self._encode(seen, latest.adapter)

    def retry(self) -> Answer:
        """Ask the last question again. The new answer replaces the old one. Raises as `edit`."""
        last = self._exchange(-1)
        return self._ask(last.question, self.exchanges[:-1], last.images)

    def edit(self, index: int, message: str) -> Answer:
        """Ask something else in place of an exchange. That exchange and all later ones are removed.

        Raises:
            UsageError: as `ask`, or an exchange that does not exist.
        """
        images = self._exchange(index).images
        return self._ask(question_turn(message), self.exchanges[:index], images)

    def undo(self) -> str:
        """Remove the last exchange and return its question. Raises UsageError if there is none."""
        last = self._exchange(-1)
        last.answer.close()
        self.exchanges = self.exchanges[:-1]
        return last.question.text

    def clear(self) -> None:
        """Remove all exchanges."""
        while self.exchanges:
            self.undo()
        self._features.clear()

    def _exchange(self, index: int) -> Exchange:
        try:
            return self.exchanges[index]
        except IndexError:
            raise UsageError("nothing was asked there yet") from None

    def _ask(self, question: Turn, before: Sequence[Exchange], images: tuple[Image.Image, ...]) -> Answer:
        seen = images or self._latest_images(before)
        adapter = self.model.answering_adapter(self.adapter, pictured=bool(seen))
        dropped, turns, tokens = self._window(question, before, adapter)
        sees = self.model.sees(adapter)
        features = self._encode(seen, adapter) if seen and sees else None
        stream_chat = self.stream_chat or self.model.stream_chat
        answer = stream_chat(Question(turns, features, adapter, self.sampling, tokens))
        if self.exchanges:
            self.exchanges[-1].answer.close()
        unseen = bool(seen) and not sees
        latest = Exchange(question, answer, adapter, images, unseen, tuple(turns), features, dropped)
        self.exchanges = [*before, latest]
        return answer

    @staticmethod
    def _latest_images(exchanges: Sequence[Exchange]) -> tuple[Image.Image, ...]:
        return next((exchange.images for exchange in reversed(exchanges) if exchange.images), ())

    def _turns(self, question: Turn, before: Sequence[Exchange]) -> list[Turn]:
        """The turns that are read to answer a question after other exchanges."""
        opening = [Turn("system", self.system)] if self.system.strip() else []
        # An answer stopped before its first word is left out: it would teach the model to say nothing.
        kept = [exchange.turns for exchange in before if exchange.answer.text]
        return [*opening, *chain.from_iterable(kept), question]

    def _encode(self, images: Sequence[Image.Image], adapter: str) -> Tensor:
        import torch

        tower = self.model.tower(adapter)
        known = self._features
        for image in images:
            if (id(image), tower.key) not in known:
                known[id(image), tower.key] = image, self.model.encode_images(image, adapter=adapter)
        return torch.cat([known[id(image), tower.key][1] for image in images])

    def _window(
        self, question: Turn, before: Sequence[Exchange], adapter: str
    ) -> tuple[int, list[Turn], list[int]]:
        """How many of the earliest exchanges do not fit; the turns of the rest; their tokens."""

        def turns(dropped: int) -> list[Turn]:
            return self._turns(question, before[dropped:])

        def encode(dropped: int) -> list[int]:
            return self.model.encode_question(turns(dropped), adapter=adapter)

        tokens = encode(0)
        context = self.model.context_length
        if context is None:
            return 0, turns(0), tokens
        # The answer needs room too, but a long one should not push out the whole conversation.
        room = context - min(self.sampling.max_new_tokens, context // 2)

        if len(tokens) <= room or not before:
            return 0, turns(0), tokens
        dropped = bisect_left(range(len(before)), True, lo=1, key=lambda number: len(encode(number)) <= room)
        return dropped, turns(dropped), encode(dropped)

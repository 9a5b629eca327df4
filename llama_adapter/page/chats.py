"""One person's chats, and the questions that wait while another is being answered."""

from __future__ import annotations

import threading
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from PIL import Image

from llama_adapter.answering.conversation import Conversation
from llama_adapter.common.errors import UsageError
from llama_adapter.decoding.sampling import Sampling

MAX_WAITING = 8  # questions of one chat, so that one person can't fill the queue
MAX_CHATS = 100

NewConversation = Callable[[], Conversation]


@dataclass(frozen=True)
class Settings:
    """How a question is to be answered, as set on the page.

    Attributes:
        adapters: the names of the experts: one in a chat, two side by side.
    """

    adapters: tuple[str, ...]
    system: str = ""
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Entry:
    """What a person typed, with the settings for its answer."""

    text: str
    pictures: tuple[Image.Image, ...]
    settings: Settings


class Turns(ABC):
    """Takes questions one at a time. A question that comes while another is being answered waits.

    Attributes:
        waiting: the waiting questions, the next one first.
    """

    def __init__(self) -> None:
        self.waiting: deque[Entry] = deque()
        self._lock = threading.RLock()
        self._runner: object | None = None

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether an answer is being made, or is about to be."""

    @abstractmethod
    def check(self, question: Entry) -> None:
        """Raise UsageError for a question that `begin` would refuse."""

    @abstractmethod
    def begin(self, question: Entry) -> None:
        """Start the answer to a question. Raises UsageError."""

    def take(self, question: Entry) -> None:
        """Begin a question, or let it wait. Raises UsageError, also if too many are waiting."""
        with self._lock:
            if not self.busy:
                self.begin(question)
                return
            if len(self.waiting) >= MAX_WAITING:
                raise UsageError(f"{MAX_WAITING} questions wait already; ask again when one is answered")
            self.check(question)
            self.waiting.append(question)

    def rounds(self, tell: Callable[[UsageError], None]) -> Iterator[None]:
        """Yield once for each answer to make, until no question is waiting.

        The caller that iterates makes the answers. Meanwhile a second caller gets nothing to do.

        Args:
            tell: called with the error if a question whose turn has come is refused.
        """
        with self._lock:
            if self._runner is not None:
                return
            runner = self._runner = object()
        try:
            while self._go_on(tell):
                yield
        finally:
            with self._lock:
                if self._runner is runner:
                    self._runner = None

    def _go_on(self, tell: Callable[[UsageError], None]) -> bool:
        with self._lock:
            while self.waiting and not self.busy:
                try:
                    self.begin(self.waiting.popleft())
                except UsageError as error:
                    tell(error)
            if not self.busy:
                self._runner = None  # inside the lock: a question that comes from now on starts a new runner
            return self.busy


class Chat(Turns):
    """A conversation with its waiting questions.

    Attributes:
        key: identifies it among the person's chats.
    """

    def __init__(self, conversation: Conversation, key: str = "") -> None:
        super().__init__()
        self.conversation = conversation
        self.key = key or uuid.uuid4().hex[:12]

    @property
    def busy(self) -> bool:
        exchanges = self.conversation.exchanges
        return bool(exchanges) and exchanges[-1].answer.finish_reason is None

    @property
    def empty(self) -> bool:
        """Whether nothing has been asked yet."""
        return not self.conversation.exchanges

    @property
    def title(self) -> str:
        """Its first question, shortened."""
        if self.empty:
            return "Untitled chat"
        text = " ".join(self.conversation.exchanges[0].question.text.split())
        return text if len(text) <= 48 else f"{text[:47]}…"

    def set(self, settings: Settings) -> None:
        """Use these settings for the next question."""
        chat = self.conversation
        (chat.adapter,) = settings.adapters
        chat.system, chat.sampling = settings.system, settings.sampling

    def check(self, question: Entry) -> None:
        (adapter,) = question.settings.adapters
        self.conversation.check(question.text, question.pictures, adapter=adapter)

    def begin(self, question: Entry) -> None:
        self.set(question.settings)
        self.conversation.ask(question.text, question.pictures)

    def close(self) -> None:
        """End the answer that is being made, and forget the waiting questions."""
        with self._lock:
            self.waiting.clear()
            if not self.empty:
                self.conversation.exchanges[-1].answer.close()


class Chats:
    """A person's chats, the latest first. One of them is open.

    Attributes:
        adapter: the expert that the person chose; None before that.
        left_out: how many of the oldest chats do not fit into the browser's storage.
    """

    def __init__(self, new: NewConversation) -> None:
        self._new = new
        self.all: list[Chat] = [Chat(new())]
        self.open = self.all[0]
        self.adapter: str | None = None
        self.left_out = 0

    def start(self) -> None:
        """Open a new chat, unless the open one is empty. Raises UsageError if there are too many."""
        if not self.all[0].empty:
            if len(self.all) >= MAX_CHATS:
                raise UsageError(f"there are {MAX_CHATS} chats; delete one first")
            self.all.insert(0, Chat(self._new()))
        self.open = self.all[0]

    def choose(self, key: str) -> None:
        """Open the chat with this key, if there is one."""
        self.open = next((chat for chat in self.all if chat.key == key), self.open)

    def delete(self) -> None:
        """Delete the open chat. Then the latest of the others is open, or a new one."""
        self.open.close()
        self.all.remove(self.open)
        if not self.all:
            self.all.append(Chat(self._new()))
        self.open = self.all[0]

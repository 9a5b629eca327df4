"""Answers several people at once with one model: all answers come from one batch.

Every answer is the same as that of `LlamaAdapter.stream_chat`, with its own adapter, pictures, sampling
settings and stop strings, whoever else is being answered.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator
from queue import SimpleQueue
from typing import Any

from llama_adapter.decoding.answer import Answer, Progress
from llama_adapter.decoding.question import GivenTurns, Question, Request
from llama_adapter.decoding.scheduler import Scheduler, Ticket
from llama_adapter.model import LlamaAdapter


class Engine:
    """Answers up to ``rows`` requests together. The others wait for their turn.

    An answer joins the batch when it is first iterated, and leaves it between two tokens when it is closed. A
    thread does the work, and ends when there is none. It may be a little ahead of those who read its tokens.

    Attributes:
        model: the model that answers.
        rows: how many requests are answered at once.
        working: whether a thread is answering.
    """

    def __init__(self, model: LlamaAdapter, *, rows: int = 8) -> None:
        self.model = model
        self.rows = rows
        self._lock = threading.Lock()  # guards the two below
        self._waiting: deque[_QueuedTicket] = deque()
        self.working = False

    def stream_chat(self, question: Question | GivenTurns, **options: Any) -> Answer:
        """As `LlamaAdapter.stream_chat`, but made in one batch with all other answers."""
        request = self.model.prepare_request(Question.of(question, **options))
        ticket = _QueuedTicket(self, request)
        return Answer(ticket.progress(), stop=ticket.close)

    def _submit(self, ticket: _QueuedTicket) -> None:
        with self._lock:
            self._waiting.append(ticket)
            if not self.working:
                self.working = True
                threading.Thread(target=self._work, name="answers").start()

    def _work(self) -> None:
        """Answer until no request is left."""
        while True:
            scheduler = Scheduler(self.model, self.model.project_requests, self._admit)
            try:
                for _ in scheduler.run():
                    if not threading.main_thread().is_alive():  # the interpreter is waiting for this thread
                        for ticket in scheduler.tickets:
                            ticket.close()
                return
            except Exception as error:  # passed on to each reader, which would otherwise wait for ever
                for ticket in scheduler.tickets:
                    ticket.fail(error)

    def _admit(self, answering: int) -> list[Ticket]:
        """The next waiting ticket, if there is room. Questions are read one by one, so each fails alone."""
        with self._lock:
            while self._waiting and answering < self.rows:
                ticket = self._waiting.popleft()
                if not ticket.closed:
                    return [ticket]
            self.working = answering > 0
            return []


class _QueuedTicket(Ticket):
    """A ticket whose progress is passed from the engine's thread to the reader's.

    Attributes:
        started: when the reading of the question started, by the performance counter.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        assert engine.model.tokenizer is not None
        super().__init__(request, engine.model.tokenizer)
        self.started = 0.0
        self._engine = engine
        self._made: SimpleQueue[Progress | Exception | None] = SimpleQueue()

    def progress(self) -> Generator[Progress, None, None]:
        """The answer's progress, until it ends, fails or is stopped."""
        self._engine._submit(self)
        try:
            while (made := self._made.get()) is not None:
                if isinstance(made, Exception):
                    raise made
                yield made
        finally:
            self.closed = True

    def begin(self) -> None:
        self.started = time.perf_counter()

    def take(self, token: int) -> None:
        piece = self.said.take(token)
        seconds = time.perf_counter() - self.started
        self._made.put(Progress(piece, len(self.said.tokens), seconds, self.said.finish_reason))

    def fail(self, error: Exception) -> None:
        self.closed = True
        self._made.put(error)

    def close(self) -> None:
        super().close()
        self._made.put(None)

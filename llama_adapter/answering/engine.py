"""Several people answered at once by one model: an engine whose answers come from one batch.

Every answer is the one that `LlamaAdapter.stream_chat` gives, with its own adapter, pictures, sampling and
stop strings, whoever else is being answered.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from queue import SimpleQueue

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llama_adapter.data.pictures import Picture
from llama_adapter.data.templates import Turn
from llama_adapter.decoding.batch import Batch, Row
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.decoding.streams import Answer, Request, Said
from llama_adapter.methods.state import AdapterState
from llama_adapter.model import LlamaAdapter


class Engine:
    """Answers requests together, up to ``rows`` at a time; the others wait their turn.

    An answer joins when it is first iterated, and leaves between two tokens when it is closed. The work is
    done by a thread that is there while there is any; its tokens may be a little ahead of who reads them.

    Attributes:
        model: who answers.
        rows: how many are answered at once.
    """

    def __init__(self, model: LlamaAdapter, *, rows: int = 8) -> None:
        self.model = model
        self.rows = rows
        self._lock = threading.Lock()  # of the two below
        self._waiting: deque[_Ticket] = deque()
        self._working = False

    def stream_chat(
        self,
        turns: str | Sequence[Turn],
        *,
        image: Picture | Sequence[Picture] | Tensor | None = None,
        adapter: str | None = None,
        sampling: Sampling | None = None,
        question_ids: list[int] | None = None,
    ) -> ServedAnswer:
        """As `LlamaAdapter.stream_chat`, made in one batch with whatever else is asked."""
        request = self.model.prepare_request(
            turns, image=image, adapter=adapter, sampling=sampling, question_ids=question_ids
        )
        assert self.model.tokenizer is not None
        return ServedAnswer(_Ticket(self, request), self.model.tokenizer)

    def _submit(self, ticket: _Ticket) -> None:
        with self._lock:
            self._waiting.append(ticket)
            if not self._working:
                self._working = True
                threading.Thread(target=self._work, name="answers").start()

    def _work(self) -> None:
        """Answer until nobody wants anything any more."""
        batch = self._empty_batch()
        rows: dict[_Ticket, Row] = {}
        while True:
            try:
                if not self._admit(batch, rows):
                    return
                if threading.main_thread().is_alive():
                    batch.step()
                else:  # the interpreter waits for us to end
                    for ticket in rows:
                        ticket.end()
            except Exception as error:  # each reader gets it, or would wait for ever
                for ticket in rows:
                    ticket.end(error)
                batch, rows = self._empty_batch(), {}
            for ticket, row in rows.items():
                ticket.take(int(row.token))

    def _empty_batch(self) -> Batch:
        return Batch(self.model)

    def _admit(self, batch: Batch, rows: dict[_Ticket, Row]) -> bool:
        """Let those who are done out and those who wait in; False where nobody is left."""
        while True:
            for ticket in [ticket for ticket in rows if ticket.closed]:
                batch.leave(rows.pop(ticket))
            with self._lock:
                self._waiting = deque(ticket for ticket in self._waiting if not ticket.closed)
                free = min(self.rows - len(rows), len(self._waiting))
                newcomers = [self._waiting.popleft() for _ in range(free)]
                if not newcomers:
                    self._working = bool(rows)
                    return self._working
            for place, ticket in enumerate(newcomers):
                ticket.started = time.perf_counter()
                asked = ticket.request
                try:
                    if ticket.adapter is None:
                        ticket.adapter = asked.project()
                    if not batch.takes(ticket.adapter):
                        with self._lock:  # until the others are answered; who came later comes later
                            self._waiting.extendleft(reversed(newcomers[place:]))
                        return True
                    rows[ticket] = batch.join(asked.question, ticket.adapter, asked.sampling)
                except Exception as error:  # the others are none the worse for it
                    ticket.end(error)
                else:
                    ticket.take(int(rows[ticket].token))


class _Ticket:
    """A request on its way through the engine; its tokens pass from the engine's thread to the reader's.

    Attributes:
        closed: nobody wants more of it.
        started: when the reading of the question began, by the performance counter.
        adapter: what the request's ``project`` gave, once it was asked.
    """

    adapter: AdapterState | None = None

    def __init__(self, engine: Engine, request: Request) -> None:
        self.request = request
        self.closed = False
        self.started = 0.0
        self.seconds = 0.0
        self._engine = engine
        self._said = Said(request.sampling.max_new_tokens, request.end_ids)
        self._tokens: SimpleQueue[tuple[int, float] | Exception | None] = SimpleQueue()

    def tokens(self) -> Iterator[int]:
        """The tokens as they are made. Other than `stream_tokens`, ahead of who reads them."""
        self._engine._submit(self)
        try:
            while (made := self._tokens.get()) is not None:
                if isinstance(made, Exception):
                    raise made
                token, self.seconds = made
                yield token
        finally:
            self.closed = True

    def take(self, token: int) -> None:
        """Hand a token on; the last one ends the answer."""
        if self._said.take(token):
            self._tokens.put((token, time.perf_counter() - self.started))
        if self._said.ended:
            self.end()

    def end(self, error: Exception | None = None) -> None:
        """No more tokens; ``error`` is raised at the reader's."""
        self.closed = True
        self._tokens.put(error)


class ServedAnswer(Answer):
    """An answer that an `Engine` makes. Time in which it waits for its turn does not count in ``seconds``."""

    def __init__(self, ticket: _Ticket, tokenizer: PreTrainedTokenizerBase) -> None:
        request = ticket.request
        limit = request.sampling.max_new_tokens
        super().__init__(ticket.tokens(), tokenizer, request.stop_strings, max_new_tokens=limit)
        self._ticket = ticket

    def __next__(self) -> str:
        try:
            return super().__next__()
        except StopIteration:
            self._ticket.closed = True  # also where a stop string ended the text
            raise
        finally:
            self.seconds = self._ticket.seconds

    def close(self) -> None:
        """Stop; what was said so far stays, and who waits gets the place. Any thread may call it."""
        self._ticket.end()
        super().close()

"""The continuous batch: requests join and leave between two tokens. Page, API and scoring all use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llama_adapter.decoding.answer import Said
from llama_adapter.decoding.batch import Batch, Row
from llama_adapter.decoding.question import Request
from llama_adapter.methods.state import AdapterState


class Ticket:
    """A request on its way through a `Scheduler`.

    Attributes:
        request: the question.
        said: the answer so far.
        closed: whether the answer is no longer wanted.
    """

    def __init__(self, request: Request, tokenizer: PreTrainedTokenizerBase) -> None:
        self.request = request
        self.said = Said.to(request, tokenizer)
        self.closed = False

    def begin(self) -> None:
        """Called when its question is about to be read."""

    def take(self, token: int) -> None:
        """Add the next token to the answer."""
        self.said.take(token)

    def close(self) -> None:
        """Stop the answer. Its place in the batch becomes free."""
        self.closed = True

    def fail(self, error: Exception) -> None:
        """Called with the error that kept it out of the batch; raises it by default."""
        raise error


class Scheduler:
    """Makes answers in one batch. Between two tokens, finished and closed ones leave and waiting ones join.

    Args:
        forward: the forward pass of a `LlamaAdapter`.
        project: `LlamaAdapter.project_requests`.
        admit: called with the number of answers in the batch, returns the tickets whose questions are read
            together next; an empty list if none is to join now. Called again after each group.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        project: Callable[[Sequence[Request]], list[AdapterState]],
        admit: Callable[[int], Sequence[Ticket]],
    ) -> None:
        self._project, self._admit = project, admit
        self._batch = Batch(forward)
        self._rows: dict[Ticket, Row] = {}
        # The next group with its states, if it waits until its decoder is the one that the batch uses.
        self._held: tuple[Sequence[Ticket], Sequence[AdapterState]] | None = None

    @property
    def tickets(self) -> list[Ticket]:
        """The tickets in the batch, and those that are about to join."""
        return [*self._rows, *(self._held[0] if self._held else ())]

    def run(self) -> Iterator[list[Ticket]]:
        """Work until the batch is empty and nothing joins. Yields the tickets that left, after each token."""
        while True:
            left = self._release()
            while self._join_next():
                left += self._release()
            if self._rows:
                self._batch.step()
                self._hand_out(list(self._rows))
                yield left + self._release()
            else:
                yield left
                return

    def _release(self) -> list[Ticket]:
        """Remove finished and closed answers from the batch."""
        left = [ticket for ticket in self._rows if ticket.closed or ticket.said.ended]
        if left:
            self._batch.leave(*(self._rows.pop(ticket) for ticket in left))
        return left

    def _join_next(self) -> bool:
        """Let the next group join; False if none can join now."""
        group, states = self._held or (self._admit(len(self._rows)), None)
        if not group:
            return False
        requests = [ticket.request for ticket in group]
        try:
            states = states or self._project(requests)
            if not all(map(self._batch.takes, states)):
                self._held = group, states  # until the others are answered; none overtakes it
                return False
            self._held = None
            for ticket in group:
                ticket.begin()
            rows = self._batch.join_together(
                [(asked.tokens, state, asked.sampling) for asked, state in zip(requests, states, strict=True)]
            )
        except Exception as error:  # the other answers go on
            for ticket in group:
                ticket.fail(error)
        else:
            self._rows |= zip(group, rows, strict=True)
            self._hand_out(group)
        return True

    def _hand_out(self, tickets: Sequence[Ticket]) -> None:
        """Give each ticket its latest token."""
        tokens = torch.cat([self._rows[ticket].token for ticket in tickets]).flatten().tolist()
        for ticket, token in zip(tickets, tokens, strict=True):
            ticket.take(token)

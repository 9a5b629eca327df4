"""The scheduler: tickets join and leave one batch, and each is answered as it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from llama_adapter.decoding.batch import Batch
from llama_adapter.decoding.question import Question, Request
from llama_adapter.decoding.scheduler import Scheduler, Ticket
from llama_adapter.methods.state import AdapterState
from tests.scripted import ScriptedModel, build_scripted_model


@pytest.fixture
def model() -> ScriptedModel:
    return build_scripted_model()


def ticket(model: ScriptedModel, text: str, *, max_new_tokens: int = 20, **changes: Any) -> Ticket:
    request = model.prepare_request(Question.of(text, max_new_tokens=max_new_tokens))
    assert model.tokenizer is not None
    return Ticket(replace(request, **changes), model.tokenizer)


def test_groups_join_and_everyone_leaves_once(model: ScriptedModel) -> None:
    groups = [
        [ticket(model, "a"), ticket(model, "bb", max_new_tokens=1)],
        [],
        [ticket(model, "ccc"), ticket(model, "d", max_new_tokens=5)],
    ]
    tickets = [each for group in groups for each in group]
    seen: list[int] = []

    def admit(answering: int) -> list[Ticket]:
        seen.append(answering)
        return groups.pop(0) if groups else []

    left = [each for some in Scheduler(model, model.project_requests, admit).run() for each in some]
    assert seen[:3] == [0, 1, 1], "asked again after each group, which may have ended at once"
    assert sorted(map(id, left)) == sorted(map(id, tickets))
    for each in tickets:
        assert each.said.finish_reason == "length"
        assert len(each.said.tokens) == each.request.sampling.max_new_tokens
    assert [each.said.text.split("\n")[0].strip() for each in (tickets[0], tickets[2])] == [
        "one heard: a",
        "one heard: ccc",
    ]


def test_a_stop_string_ends_the_work(model: ScriptedModel) -> None:
    stopped = ticket(model, "Hi", max_new_tokens=300, stop_strings=(" 3",))
    waiting = [[stopped]]
    list(Scheduler(model, model.project_requests, lambda _: waiting.pop() if waiting else []).run())
    assert stopped.said.text.endswith("0 1 2") and stopped.said.finish_reason == "stop"
    assert model.made == len(stopped.said.tokens) < 100


def test_a_closed_ticket_leaves_and_its_place_is_free(model: ScriptedModel) -> None:
    first, second = ticket(model, "First", max_new_tokens=300), ticket(model, "Second", max_new_tokens=3)
    waiting = [first, second]
    scheduler = Scheduler(
        model, model.project_requests, lambda answering: [waiting.pop(0)] if waiting and not answering else []
    )
    steps = scheduler.run()
    assert next(steps) == [] and scheduler.tickets == [first]
    first.close()
    assert first in next(steps) and scheduler.tickets == [second]
    assert [each for some in steps for each in some] == [second]


def test_a_ticket_that_cannot_join_the_batch_waits_and_is_not_overtaken(
    model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such is a ticket whose adapter has a decoder of its own."""
    monkeypatch.setattr(Batch, "takes", lambda self, adapter: not self.rows)
    tickets = [ticket(model, text, max_new_tokens=3) for text in "abc"]
    waiting = list(tickets)
    projected: list[int] = []

    def project(requests: Sequence[Request]) -> list[AdapterState]:
        projected.append(len(requests))
        return model.project_requests(requests)

    scheduler = Scheduler(model, project, lambda _: [waiting.pop(0)] if waiting else [])
    alone, left = [], []
    for some in scheduler.run():
        alone.append(sum(0 < len(each.said.tokens) < 3 for each in tickets))
        left += some
    assert left == tickets and set(alone) <= {0, 1}
    assert projected == [1, 1, 1], "once each"


def test_an_error_of_a_newcomer_is_raised_and_one_of_a_step_too(
    model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no more")

    waiting = [[ticket(model, "Hi")], [ticket(model, "Hi")]]
    steps = Scheduler(model, model.project_requests, lambda _: waiting.pop() if waiting else []).run()
    next(steps)
    monkeypatch.setattr(ScriptedModel, "forward", failing)
    with pytest.raises(MemoryError):
        next(steps)
    waiting = [[ticket(model, "Hi")]]
    with pytest.raises(MemoryError):
        next(Scheduler(model, model.project_requests, lambda _: waiting.pop() if waiting else []).run())

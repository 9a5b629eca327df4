"""The engine: what many ask at once is answered as if each had asked alone."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from llama_adapter.answering.engine import Engine
from llama_adapter.common.errors import UsageError
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from tests.conftest import CHECKOUT
from tests.scripted import ScriptedModel, build_scripted_model, open_eyes
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import VISION, build_tiny_model, draw_picture


@pytest.fixture(scope="module")
def model() -> LlamaAdapter:
    model = build_tiny_model(
        names=("one", "two"), tokenizer=build_tiny_tokenizer(), max_position_embeddings=1024
    )
    eyes = model.new_adapter("eyes", prompt_length=4, adapted_layers=3, vision=VISION, seed=3)
    torch.nn.init.normal_(eyes.prompts.gates, generator=torch.Generator().manual_seed(3))
    open_eyes(model)
    generator = torch.Generator().manual_seed(4)
    for changes in model.new_adapter("full", method="full").parameters():
        torch.nn.init.normal_(changes, std=0.05, generator=generator)
    return model


def _drain(answer: Iterator[str]) -> None:
    for _ in answer:
        pass


def _wait_until(true: Callable[[], bool]) -> None:
    for _ in range(12_000):  # a minute at least: only what hangs takes so long
        if true():
            return
        time.sleep(0.005)
    pytest.fail("it never came true")


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_twenty_at_once_are_answered_as_one_by_one(rows: int, model: LlamaAdapter, tmp_path: Any) -> None:
    draw = random.Random(rows)
    pictures = [draw_picture(tmp_path / f"{colour}.png", colour) for colour in ("red", "green", "blue")]
    asked: list[tuple[str, dict[str, Any]]] = []
    for number in range(20):
        adapter = draw.choice(["one", "two", "eyes", "full", NO_ADAPTER])  # "full" shares no batch
        sampling = Sampling(
            max_new_tokens=draw.randint(1, 30),
            temperature=draw.choice([0, 0.1, 1.5]),
            top_p=draw.choice([0.75, 1]),
            repetition_penalty=draw.choice([1, 1.3]),
            seed=number,
        )
        image = draw.choice(pictures) if adapter == "eyes" else None
        question = " ".join(draw.choices(["Name", "three", "colours", "of the sky"], k=draw.randint(1, 12)))
        asked.append((question, {"adapter": adapter, "sampling": sampling, "image": image}))
    expected = [model.chat(question, **values) for question, values in asked]
    engine = Engine(model, rows=rows)

    def ask(number: int) -> tuple[str, int]:
        time.sleep(draw.random() * 0.05)
        question, values = asked[number]
        answer = engine.stream_chat(question, **values)
        pieces = "".join(answer)
        assert pieces.strip() == answer.text
        return answer.text, answer.tokens

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, range(20)))
    assert [text for text, _ in found] == expected
    assert all(
        0 <= tokens <= values["sampling"].max_new_tokens
        for (_, tokens), (_, values) in zip(found, asked, strict=True)
    )
    assert len(set(expected)) > 10
    _wait_until(lambda: not engine.working)


def test_two_answers_may_be_read_by_turns_in_one_thread(model: LlamaAdapter) -> None:
    engine = Engine(model)
    sampling = Sampling(max_new_tokens=12, temperature=0)
    pair = [engine.stream_chat("Hello?", adapter=name, sampling=sampling) for name in ("one", NO_ADAPTER)]
    for _ in zip(*pair, strict=False):
        pass
    for answer in pair:
        _drain(answer)
    assert [answer.text for answer in pair] == [
        model.chat("Hello?", adapter=name, sampling=sampling) for name in ("one", NO_ADAPTER)
    ]


def test_an_end_token_and_a_stop_string_end_an_answer_as_alone(
    model: LlamaAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=0)
    whole = model.stream_chat("Hi", adapter="one", sampling=sampling)
    assert model.tokenizer is not None
    tokens = [int(token) for token in model.tokenizer.encode("".join(whole), add_special_tokens=False)]
    prepare = model.prepare_request

    for ending in ({"end_ids": (tokens[7],)}, {"stop_strings": (whole.text[9:12],)}):
        monkeypatch.setattr(
            model, "prepare_request", lambda question, ending=ending: replace(prepare(question), **ending)
        )
        expected, answer = (
            stream("Hi", adapter="one", sampling=sampling)
            for stream in (model.stream_chat, Engine(model).stream_chat)
        )
        _drain(expected)
        _drain(answer)
        assert (answer.text, answer.tokens) == (expected.text, expected.tokens)
        assert answer.tokens < 40
        assert answer.finish_reason == expected.finish_reason == "stop"


@pytest.mark.parametrize("served", [False, True])
def test_an_answer_says_why_it_ended(model: LlamaAdapter, served: bool) -> None:
    stream = Engine(model).stream_chat if served else model.stream_chat
    sampling = Sampling(max_new_tokens=12, temperature=0)
    answer = stream("Hi", adapter="one", sampling=sampling)
    next(answer)
    assert answer.finish_reason is None
    _drain(answer)
    assert (answer.tokens, answer.finish_reason) == (12, "length")
    answer.close()
    assert answer.finish_reason == "length", "it had ended already"
    stopped = stream("Hi", adapter="one", sampling=sampling)
    next(stopped)
    stopped.close()
    _drain(stopped)
    assert stopped.finish_reason == "closed"


def test_a_bad_question_is_refused_at_once(model: LlamaAdapter) -> None:
    engine = Engine(model)
    with pytest.raises(UsageError, match="empty"):
        engine.stream_chat(" ")
    with pytest.raises(UsageError, match="no adapter"):
        engine.stream_chat("Hi", adapter="nobody")


# --- starting, stopping, waiting ----------------------------------------------------------------------------


@pytest.fixture
def slow() -> ScriptedModel:
    return build_scripted_model(delay=0.01)


LONG = Sampling(max_new_tokens=1000)
TOKEN_SECONDS = 0.25  # on the clock below


class Clock:
    """A clock in place of the performance counter: it moves when it is told to, and with each token made."""

    def __init__(self, model: ScriptedModel, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        forward = ScriptedModel.forward

        def timed(model: ScriptedModel, *args: Any, **kwargs: Any) -> Any:
            made = model.made
            output = forward(model, *args, **kwargs)
            self.now += TOKEN_SECONDS * (model.made > made)
            return output

        patch.setattr(ScriptedModel, "forward", timed)
        patch.setattr(time, "perf_counter", lambda: self.now)


def test_nothing_is_computed_before_an_answer_is_read_or_after_it_is_closed(slow: ScriptedModel) -> None:
    engine = Engine(slow)
    answer = engine.stream_chat("Hi", sampling=LONG)
    time.sleep(0.1)
    assert slow.made == 0
    next(answer)
    answer.close()
    _wait_until(lambda: not engine.working)
    assert 0 < slow.made < 10
    assert list(answer) == []
    assert answer.text
    unread = engine.stream_chat("Hi", sampling=LONG)
    unread.close()
    assert list(unread) == [] and not engine.working


def test_an_answer_that_is_closed_gives_its_place_to_the_next(
    slow: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, clock = Engine(slow, rows=1), Clock(slow, monkeypatch)
    first, second = (engine.stream_chat(text, sampling=LONG) for text in ("First", "Second"))
    next(first)
    waiting = threading.Thread(target=next, args=(second,))
    waiting.start()
    time.sleep(0.1)
    assert second.text == "" and waiting.is_alive()
    clock.now += 10_000
    first.close()
    waiting.join(timeout=60)
    assert second.text
    assert 0 < second.seconds < 5_000, "waiting does not count"
    second.close()


def test_who_waits_can_give_up(slow: ScriptedModel) -> None:
    engine = Engine(slow, rows=1)
    first, second = (engine.stream_chat(text, sampling=LONG) for text in ("First", "Second"))
    next(first)
    waiting = threading.Thread(target=_drain, args=(second,))
    waiting.start()
    time.sleep(0.05)
    second.close()
    waiting.join(timeout=60)
    assert not waiting.is_alive()
    assert second.tokens == 0
    next(first)
    first.close()
    _wait_until(lambda: not engine.working)


def test_tokens_and_seconds_are_those_of_the_answer(
    slow: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, clock = Engine(slow), Clock(slow, monkeypatch)
    answer = engine.stream_chat("Hi", sampling=Sampling(max_new_tokens=20))
    next(answer)
    _wait_until(lambda: not engine.working)
    clock.now += 10_000  # a reader's own time does not count
    for _ in answer:
        clock.now += 10_000
    assert answer.tokens == 20
    assert answer.seconds == pytest.approx(20 * TOKEN_SECONDS)
    assert answer.tokens_per_second == pytest.approx(1 / TOKEN_SECONDS)


def test_a_failure_is_told_to_all_whom_it_concerns_and_the_engine_goes_on(
    slow: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(slow)
    forward = ScriptedModel.forward

    def failing(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        if self.made > 30:
            raise MemoryError("no more")
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(ScriptedModel, "forward", failing)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(_drain, engine.stream_chat("Hi", sampling=LONG)) for _ in range(3)]
    for each in asked:
        with pytest.raises(MemoryError, match="no more"):
            each.result()
    monkeypatch.undo()
    _drain(engine.stream_chat("Hi", sampling=Sampling(max_new_tokens=3)))


def test_a_failing_newcomer_fails_alone(slow: ScriptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(slow)
    good = engine.stream_chat("Hi", sampling=Sampling(max_new_tokens=30))
    next(good)
    forward = ScriptedModel.forward

    def failing(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        if input_ids.shape[1] > 1:
            raise MemoryError("too long")
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(ScriptedModel, "forward", failing)
    with pytest.raises(MemoryError):
        _drain(engine.stream_chat("Bad", sampling=LONG))
    _drain(good)
    assert good.tokens == 30


def test_a_program_can_end_while_somebody_is_answered() -> None:
    program = (
        "from tests.scripted import build_scripted_model\n"
        "from llama_adapter.answering.engine import Engine\n"
        "from llama_adapter.decoding.sampling import Sampling\n"
        "engine = Engine(build_scripted_model(delay=0.05))\n"
        "answer = engine.stream_chat('Hi', sampling=Sampling(max_new_tokens=1000))\n"
        "print(next(answer))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr

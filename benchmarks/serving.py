"""How much more one model says when several ask at once: the suite "serving" of benchmarks.throughput."""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import WORDS, alternate, show

if TYPE_CHECKING:  # slow to import
    from llama_adapter.decoding.answer import Answer
    from llama_adapter.model import LlamaAdapter

CLIENTS = 8
QUESTION_WORDS = (10, 40)  # the shortest and the longest question


def serving(model: LlamaAdapter, arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of one client's answer and of eight clients' together, the reading included."""
    import torch

    from llama_adapter.answering.engine import Engine
    from llama_adapter.decoding.sampling import Sampling
    from llama_adapter.model import NO_ADAPTER

    if model.active_adapter == NO_ADAPTER:
        torch.nn.init.constant_(model.new_adapter("serving", seed=0).prompts.gates, 0.1)
    draw = random.Random(0)
    questions = [" ".join(draw.choices(WORDS, k=draw.randint(*QUESTION_WORDS))) for _ in range(CLIENTS)]
    sampling = Sampling(max_new_tokens=arguments.new_tokens, temperature=0)
    engine = Engine(model, rows=CLIENTS)

    def ask(stream_chat: Callable[..., Answer], clients: int, number: int) -> float:
        """Seconds a token, all clients' counted."""
        tokens = 0

        def client(index: int) -> None:
            nonlocal tokens
            answer = stream_chat(questions[(number + index) % CLIENTS], sampling=sampling)
            for _ in answer:
                pass
            tokens += answer.tokens

        threads = [threading.Thread(target=client, args=(index,)) for index in range(clients)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (time.perf_counter() - started) / tokens

    contenders: dict[str, Callable[[int], Any]] = {
        "one client": partial(ask, engine.stream_chat, 1),
        f"{CLIENTS} clients": partial(ask, engine.stream_chat, CLIENTS),
        "one, without the engine": partial(ask, model.stream_chat, 1),
    }
    times = alternate(contenders, rounds=arguments.pairs)
    show(f"a token, answers of {arguments.new_tokens}", times)
    one, several, alone = times.values()
    return {
        "serving_ratio": statistics.median(a / b for a, b in zip(one, several, strict=True)),
        "tokens_per_second_of_one": 1 / statistics.median(one),
        f"tokens_per_second_of_{CLIENTS}": 1 / statistics.median(several),
        "engine_vs_alone": statistics.median(a / b for a, b in zip(one, alone, strict=True)),
    }

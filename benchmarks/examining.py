"""The suite "scienceqa" of benchmarks.throughput: problems a second, for each way to answer."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.measuring import WORDS, alternate, ratio, show

if TYPE_CHECKING:  # slow to import
    from llama_adapter.model import LlamaAdapter
    from llama_adapter.scienceqa.problems import Problem

PROBLEMS = 64  # answered in each round
ROUNDS = 3  # a round takes a minute and a half

# The numbers of words in question, hint and each option of 16 problems of ScienceQA, evenly spaced by length.
LENGTHS = (
    *((7, 0, (1, 1)), (7, 0, (1, 1, 1, 1)), (8, 0, (2, 1, 2)), (9, 0, (1, 1)), (6, 6, (1, 1, 1))),
    *((9, 0, (4, 4)), (7, 0, (3, 2, 4, 3)), (12, 0, (2, 2, 2)), (9, 5, (5, 6)), (14, 8, (1, 1, 2, 2))),
    *((16, 0, (9, 9)), (12, 16, (2, 2)), (19, 0, (8, 11, 8)), (9, 40, (1, 2)), (14, 38, (9, 9, 8, 9))),
    (12, 120, (3, 2, 3)),
)


def scienceqa(model: LlamaAdapter, _: argparse.Namespace) -> dict[str, float]:
    """Measure how fast ScienceQA's problems are answered."""
    from llama_adapter.scienceqa.examining import trained_on_scienceqa

    if not trained_on_scienceqa(model, model.active_adapter):
        print("left out: the adapter was not trained on ScienceQA; name one that was with --adapter")
        return {}
    problems = made_up_problems()
    times = alternate(contenders(model, problems), rounds=ROUNDS)
    show(f"a problem, of {len(problems):,}", times)
    one = times.pop("generate, one at a time")
    return {f"scienceqa_{way}": ratio(one, seconds) for way, seconds in times.items()}


def made_up_problems() -> list[Problem]:
    """Made-up problems with the lengths of ScienceQA's."""
    from llama_adapter.scienceqa.problems import Problem

    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(draw.choices(WORDS, k=length))

    return [
        Problem(str(n), text(question), tuple(text(length) for length in options), 0, hint=text(hint))
        for n, (question, hint, options) in enumerate(LENGTHS[i % len(LENGTHS)] for i in range(PROBLEMS))
    ]


def contenders(model: LlamaAdapter, problems: Sequence[Problem]) -> dict[str, Callable[[int], float]]:
    """Seconds for a problem: generated one at a time, generated in batches, and by likelihood."""
    from llama_adapter.scienceqa.examining import Examination

    best = Examination.best_for(model)

    def answer(way: str, batch_size: int) -> float:
        started = time.perf_counter()
        replace(best, way=way).answer(model, problems, batch_size=batch_size)
        return (time.perf_counter() - started) / len(problems)

    return {
        "generate, one at a time": lambda _: answer("generate", 1),
        "generate": lambda _: answer("generate", 16),
        "letter": lambda _: answer("letter", 16),
        "option": lambda _: answer("option", 16),
    }

"""What the suites of benchmarks.throughput share: contenders that take turns, tables, and rows to work on."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_adapter.common.errors import UsageError

if TYPE_CHECKING:  # slow to import
    import torch

    from llama_adapter.data.examples import Example
    from llama_adapter.data.records import Record
    from llama_adapter.model import LlamaAdapter

ROW_TOKENS = 512  # the length to which the authors pad

# The numbers of words in instruction, input and output of 32 rows of Alpaca, evenly spaced by length.
ALPACA_LENGTHS = (
    *((5, 0, 6), (11, 0, 3), (13, 1, 2), (7, 10, 1), (17, 0, 2), (8, 2, 10), (9, 0, 13), (10, 0, 13)),
    *((11, 0, 14), (8, 0, 19), (17, 6, 6), (9, 0, 22), (12, 10, 12), (4, 2, 31), (9, 0, 31), (13, 0, 31)),
    *((11, 16, 22), (5, 0, 48), (9, 0, 49), (8, 1, 54), (8, 0, 59), (9, 0, 62), (7, 1, 68), (14, 0, 66)),
    *(
        (11, 0, 74),
        (8, 0, 83),
        (7, 56, 34),
        (8, 0, 96),
        (10, 0, 103),
        (6, 0, 118),
        (12, 0, 135),
        (14, 2, 215),
    ),
)
WORDS = (
    *("a", "the", "of", "to", "in", "and", "is", "for", "that", "with", "list", "water", "energy.", "data;"),
    *("create", "between", "describe", "sentence", "different", "number", "people", "environment", "because"),
    *("technology", "however", "generate", "important", "company", "health,", "students:", "development"),
    *("provide", "example,", "customers", "understanding", "it.", "communication", "25", "sustainable"),
)


def alternate(contenders: Mapping[str, Callable[[int], Any]], *, rounds: int) -> dict[str, list[Any]]:
    """The results of each contender, round by round. Each is called with the round's number.

    The order changes from round to round. Round 0 is a warm-up and is left out.
    """
    names = list(contenders)
    results: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            result = contenders[name](number)
            if number > 0:
                results[name].append(result)
    return results


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long ``work`` takes, including what it leaves running on the device."""
    import torch

    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def ratio(times: Sequence[float], to: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(_ratios(times, to))


def quartiles(times: Sequence[float], to: Sequence[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile of the rounds' ratios."""
    ratios = _ratios(times, to)
    return statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3


def _ratios(times: Sequence[float], to: Sequence[float]) -> list[float]:
    return [time / other for time, other in zip(times, to, strict=True)]


def show(what: str, times: Mapping[str, Sequence[float]]) -> None:
    """Print a table of times in seconds. The others are compared with the first contender."""
    first, *_ = times
    print(f"\n{what:<34} {'median ms':>10}  {'to ' + first:>16}  {'middle half of the rounds':>26}")
    for name, values in times.items():
        line = f"  {name:<32} {1000 * statistics.median(values):>10.2f}"
        if name != first:
            low, middle, high = quartiles(values, times[first])
            line += f"  {middle:>16.3f}  {f'{low:.3f} to {high:.3f}':>26}"
        print(line)


def rows_to_train_on(model: LlamaAdapter, arguments: argparse.Namespace, *, count: int) -> list[Example]:
    """Rows of --data, drawn at random but the same in every run; without --data, made-up rows."""
    from llama_adapter.data.examples import encode_records
    from llama_adapter.data.records import read_records

    draw = random.Random(0)
    if arguments.data is None:
        source = "made-up rows"
        records = [_made_up_record(draw, row) for row in range(1, count + 1)]
    else:
        records, summary = read_records(arguments.data)
        source = str(summary)
        records = draw.sample(records, min(len(records), 2 * count))  # some may have no answer in 512 tokens
    assert model.tokenizer is not None
    examples = encode_records(records, template="alpaca", tokenizer=model.tokenizer, max_length=ROW_TOKENS)[
        :count
    ]
    if len(examples) < count:
        raise UsageError(f"{source}: {count:,} are needed; ask for fewer --steps or a smaller --batch-size")
    mean = sum(len(example.input_ids) for example in examples) / count
    print(f"{source}: {count:,} of them, {mean:.0f} tokens each on average")
    return examples


def _made_up_record(draw: random.Random, row: int) -> Record:
    from llama_adapter.data.records import Record
    from llama_adapter.data.templates import Turn

    instruction, given, output = (" ".join(draw.choices(WORDS, k=n)) for n in draw.choice(ALPACA_LENGTHS))
    return Record((Turn("user", instruction, given), Turn("assistant", output)), row)

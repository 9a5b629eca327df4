"""The suite "training" of benchmarks.throughput: optimiser steps on the same rows, packed and done in other
ways.

Each way has a process of its own. In one process, each would use the memory that the others leave behind.
Packed and one other way take turns; then packed and the next. On a quantised base the other way is packed
too, on the base in float32.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING

from benchmarks.measuring import alternate, quartiles, rows_to_train_on, seconds_of
from benchmarks.quantized import load_in_floats
from benchmarks.ways_to_train import CHECKPOINTED, PACKED, PADDED, PEFT, PEFT_512, WayToTrain, way_to_train
from llama_adapter.commands.arguments import load_model
from llama_adapter.common.errors import UsageError
from llama_adapter.common.memory import process_memory

if TYPE_CHECKING:  # slow to import
    import torch

    from llama_adapter.data.examples import Example
    from llama_adapter.model import LlamaAdapter

MEGABYTE = 1e6
IN_FLOATS = "packed, base in float32"


@dataclass(frozen=True)
class Step:
    """One optimiser step: seconds, seconds of all its threads together, and its loss in nats."""

    seconds: float
    processor: float
    loss: float


@dataclass(frozen=True)
class Pair:
    """The rounds of packed and of another way beside it, and the memory of each in bytes.

    Attributes:
        packed_peak, other_peak: the peak, beyond the loaded base.
        frozen_ratio: the size of packed's base, divided by that of the other's.
    """

    packed: list[Step]
    other: list[Step]
    packed_peak: float | None
    other_peak: float | None
    frozen_ratio: float

    def ratio(self, name: str) -> float:
        """How many times as long the other way takes, over all rounds together.

        The rows of each round have other lengths. An epoch takes the sum of their times, not a median.
        """
        return sum(getattr(s, name) for s in self.other) / sum(getattr(s, name) for s in self.packed)

    @property
    def loss_difference(self) -> float:
        """The largest difference between the two losses of a step."""
        return max(abs(a.loss - b.loss) for a, b in zip(self.packed, self.other, strict=True))


def training(model: LlamaAdapter, arguments: argparse.Namespace) -> dict[str, float]:
    """Print each way beside packed. Returns the figures for --json."""
    from llama_adapter.quantization.linear import format_of

    quantized = format_of(model.decoder)
    if quantized is not None and arguments.peers:
        raise UsageError("--peers trains PEFT's adapter on a base in floats; leave --quantize or --peers out")
    size, rounds = arguments.batch_size, arguments.steps
    examples = rows_to_train_on(model, arguments, count=size * (rounds + 1))
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    others = (PEFT, PEFT_512, PADDED, CHECKPOINTED) if arguments.peers else (PADDED,)
    if arguments.peers and arguments.method != "prompts":
        others = (PEFT,)
    if quantized is not None:
        others = (IN_FLOATS,)
    print(f"\n{f'a training step of {size} rows':<32} {'rows/s':>8} {'packed':>8} {'times':>7}  ", end="")
    print(f"{'middle half of the rounds':<26} {'peak memory above the frozen weights'}")
    pairs = {}
    for label in others:
        pair = pairs[label] = _take_turns(arguments, label, batches)
        other, packed = ([step.seconds for step in steps] for steps in (pair.other, pair.packed))
        low, _, high = quartiles(other, packed)
        peaks = "left out: only Linux and CUDA report it"
        if pair.packed_peak is not None and pair.other_peak is not None:
            peaks = f"{pair.other_peak / MEGABYTE:,.0f} MB, packed {pair.packed_peak / MEGABYTE:,.0f}"
        print(
            f"  {label:<30} {size * rounds / sum(other):8.3f} {size * rounds / sum(packed):8.3f} "
            f"{pair.ratio('seconds'):7.2f}  {f'{low:.2f} to {high:.2f}':<26} {peaks}",
            flush=True,
        )
    seconds = [step.seconds for pair in pairs.values() for step in pair.packed]
    figures = {"rows_per_second": size * len(seconds) / sum(seconds)}
    apart = max(pair.loss_difference for pair in pairs.values())
    print(f"\nlosses of a step within {apart:.1e} of packed ones")
    if quantized is not None:
        pair = pairs[IN_FLOATS]
        figures["training_vs_float32"] = pair.ratio("seconds")
        figures["training_vs_float32_processor"] = pair.ratio("processor")
        figures["frozen_memory_vs_float32"] = pair.frozen_ratio
        print(
            f"{quantized} to float32: {pair.ratio('seconds'):.2f} times the rows a second, "
            f"{pair.ratio('processor'):.2f} by processor time; its weights take {pair.frozen_ratio:.1%}"
        )
    if arguments.peers and arguments.method != "prompts":
        method, pair = arguments.method, pairs[PEFT]
        figures[f"{method}_vs_peft"] = pair.ratio("seconds")
        figures[f"{method}_vs_peft_processor"] = pair.ratio("processor")
        figures[f"{method}_loss_difference"] = apart
        if pair.packed_peak is not None and pair.other_peak is not None:
            figures[f"{method}_memory_vs_peft"] = pair.packed_peak / pair.other_peak
    elif arguments.peers:
        figures["loss_difference"] = apart
        for name, label in (("training_vs_peft", PEFT), ("training_vs_pad512", PEFT_512)):
            figures[name] = pairs[label].ratio("seconds")
            figures[f"{name}_processor"] = pairs[label].ratio("processor")
        peak, peer, least = pairs[PEFT].packed_peak, pairs[PEFT].other_peak, pairs[CHECKPOINTED].other_peak
        if peak is not None and peer is not None and least is not None:
            figures["training_memory_mb"] = peak / MEGABYTE
            figures["training_memory_vs_peft"] = peak / peer
            figures["checkpointed_memory_vs_peft"] = least / peer
    return figures


def _take_turns(arguments: argparse.Namespace, label: str, batches: Sequence[list[Example]]) -> Pair:
    with _learner(arguments, PACKED) as (packed, kept), _learner(arguments, label) as (other, others):

        def step(process: ProcessPoolExecutor, number: int) -> Step:
            return process.submit(_step, batches[number]).result()

        contenders = {PACKED: partial(step, packed), label: partial(step, other)}
        steps = alternate(contenders, rounds=len(batches) - 1)
        peaks = (process.submit(_peak).result() for process in (packed, other))
        return Pair(steps[PACKED], steps[label], next(peaks), next(peaks), kept / others)


@contextmanager
def _learner(arguments: argparse.Namespace, label: str) -> Iterator[tuple[ProcessPoolExecutor, int]]:
    """A process that is ready to train in one way, and the size of its base's weights in bytes."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        yield process, process.submit(_begin, arguments, label).result()


# --- what happens in a learner's process --------------------------------------------------------------------


@dataclass(frozen=True)
class _Learner:
    way: WayToTrain
    optimizer: torch.optim.Optimizer
    device: torch.device
    frozen: float | None  # bytes in use before the first step


_learners: list[_Learner] = []  # the only one of this process


def _begin(arguments: argparse.Namespace, label: str) -> int:
    import torch

    from llama_adapter.model import NO_ADAPTER
    from llama_adapter.quantization.linear import kept_bytes
    from llama_adapter.training.settings import TrainingSettings

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        if label == IN_FLOATS:
            model = load_in_floats(arguments)
        else:
            model = load_model(argparse.Namespace(**{**vars(arguments), "adapter": NO_ADAPTER}))
    device = model.decoder.device
    way = way_to_train(model, PACKED if label == IN_FLOATS else label, arguments.method)
    optimizer = way.optimizer(TrainingSettings(batch_size=arguments.batch_size))
    with torch.no_grad():  # weights mapped from a file are read into memory only when they are used
        model(torch.zeros(1, 2, dtype=torch.long, device=device), adapter=NO_ADAPTER, use_cache=False)
    _learners.append(_Learner(way, optimizer, device, process_memory(device, peak=False)))
    return kept_bytes(model.decoder)


def _step(batch: Sequence[Example]) -> Step:
    learner = _learners[0]
    loss = 0.0

    def work() -> None:
        nonlocal loss
        loss = learner.way.gradient(batch)
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)

    started = time.process_time()
    seconds = seconds_of(work, learner.device)
    return Step(seconds, time.process_time() - started, loss)


def _peak() -> float | None:
    """The peak memory of the steps in bytes, above that of the loaded model."""
    peak, frozen = process_memory(_learners[0].device, peak=True), _learners[0].frozen
    return None if peak is None or frozen is None else peak - frozen

"""One run of a comparison: trains and measures an adapter in a process of its own.

Only in its own process can a run's peak memory be measured, and there a crash does not harm the other runs.
The process saves a checkpoint and ends by itself when the process that started it has ended.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from llama_adapter.answering.records_answered import answer_records
from llama_adapter.answering.scoring import is_right
from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import alone_in, write_json
from llama_adapter.common.memory import process_memory
from llama_adapter.comparison.folder import RUN_FOLDER
from llama_adapter.comparison.own_answers import answer_as_base, loss_of_answers
from llama_adapter.comparison.sizes import choose_sizes
from llama_adapter.data.examples import Example
from llama_adapter.data.records import PictureFile, Record
from llama_adapter.data.templates import CAPTION_QUESTIONS
from llama_adapter.decoding.question import Question
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.decoding.streams import stream_tokens
from llama_adapter.methods.checkpoint import WEIGHTS_FILE
from llama_adapter.methods.projection import Projection
from llama_adapter.methods.shape import Layout, default_adapted_layers
from llama_adapter.methods.sites import projections_of
from llama_adapter.methods.table import parts_of_method
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.scienceqa.examining import Examination, examine
from llama_adapter.scienceqa.grading import grade
from llama_adapter.scienceqa.problem_texts import problem_records
from llama_adapter.scienceqa.problems import Problem, split_problems
from llama_adapter.scienceqa.reading import read_problems
from llama_adapter.training.plan import AdapterPlan
from llama_adapter.training.recipes import Source, read_source, train
from llama_adapter.training.settings import TrainingSettings
from llama_adapter.vision.features import picture_features

STOPPED = 130  # exit code of a run that Ctrl-C ended
RESULT_FILE, LOG_FILE = "result.json", "log.txt"
MAX_NEW_TOKENS = 16  # for an answer to a question about a picture
DECODED_TOKENS, DECODED_ROUNDS = 16, 5
VALIDATIONS = 4  # in a run without --validate-every; a row then takes a third of the time of training

# What is measured in each run, in the order of results.json.
MEASURED = (
    *("validation_loss", "task", "task_score", "forgetting", "parameters", "bytes", "rows_per_second"),
    *("peak_mb", "decode_vs_base"),
)


@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison have in common.

    Attributes:
        data: files, folders or data sets. A ScienceQA folder is recognised and read as such.
        rows: how many rows of each source to train on, the same ones in all runs.
        validation_rows: how many rows of each source are kept back.
        plan: base, template and device; without a method.
        training: how to train; without rate and seed.
        answers: the file with the base's own answers.
    """

    data: tuple[str, ...]
    rows: int
    validation_rows: int
    max_length: int
    plan: AdapterPlan
    training: TrainingSettings
    answers: Path


@dataclass(frozen=True)
class Run:
    """One run: a method with its sizes, a learning rate and a seed."""

    method: str
    rate: float
    seed: int
    sizes: Mapping[str, Any]
    folder: Path

    def __str__(self) -> str:
        return f"{self.method}, rate {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class Task:
    """The rows of a comparison, and those ScienceQA problems that are kept back."""

    sources: list[Source]
    problems: list[Problem]


def read_task(setting: Setting) -> Task:
    """Read the rows, the same each time: kept back by the split of all scripts, then drawn from the rest."""
    sources, problems = [], []
    for data in setting.data:
        if is_scienceqa(data):
            everything, summary = read_problems(data, "train")
            learnt, kept = split_problems(everything, validation_rows=setting.validation_rows)
            problems += kept
            source = Source(
                name=Path(data).name,
                train=problem_records(learnt),
                validation=problem_records(kept),
                facts={"source": Path(data).name, "fingerprint": summary.fingerprint},
            )
        else:
            source = read_source(data, validation_rows=setting.validation_rows)
        if len(source.train) > setting.rows:
            drawn = sorted(random.Random(0).sample(range(len(source.train)), setting.rows))
            source = dataclasses.replace(source, train=[source.train[place] for place in drawn])
        sources.append(source)
    return Task(sources, problems)


def is_scienceqa(data: str) -> bool:
    """Whether ``data`` is the official folder of ScienceQA."""
    return (Path(data) / "problems.json").is_file()


# --- before the runs ----------------------------------------------------------------------------------------


def prepare(
    setting: Setting, questions: Sequence[str], methods: Sequence[str], parameters: int | None
) -> Any:
    """Compute what needs only the base: its own answers, which are saved, and the sizes of the methods.

    Returns:
        for each method its sizes by option, and the number of parameters that this gives.
    """
    plan = setting.plan
    model = LlamaAdapter.from_base(
        str(plan.base), weights=plan.weights, device=plan.device, dtype=plan.dtype, quantize=plan.quantize
    )
    if not setting.answers.exists():
        answers = answer_as_base(model, questions)
        kept = [{"input_ids": own.input_ids, "labels": own.labels} for own in answers]
        loss = loss_of_answers(model, answers, adapter=NO_ADAPTER)
        write_json(setting.answers, {"base": model.base, "loss": loss, "answers": kept})
    if parameters is None:
        return {method: {} for method in methods}
    layers = default_adapted_layers(model.shape.num_layers)
    layout = Layout(model.shape, layers, projections_of(model.decoder, layers))
    return {method: choose_sizes(method, parameters, model.decoder, layout) for method in methods}


def load_answers(file: Path) -> tuple[list[Example], float | None]:
    """Load the base's answers and their loss under the base, as `prepare` saved them."""
    kept = json.loads(file.read_text(encoding="utf-8"))
    answers = [
        Example(own["input_ids"], own["labels"], (), row) for row, own in enumerate(kept["answers"], start=1)
    ]
    return answers, kept["loss"]


# --- a run --------------------------------------------------------------------------------------------------


def rates_of(method: str, rate: float, *, seeing: bool = False) -> dict[str, float]:
    """The peak rates of those parts that need another one than the method's first part, which gets ``rate``.

    All rates keep the ratios of the parts' usual rates, so a sweep has only one number to choose.

    Args:
        seeing: whether a projection of pictures is trained too.
    """
    parts = parts_of_method(method)
    if seeing:
        parts.append(Projection)
    factor = rate / parts[0].learning_rate
    usual = {part.kind: part.learning_rate for part in parts}
    return {kind: own * factor for kind, own in usual.items() if own != parts[0].learning_rate}


def carry_out(setting: Setting, run: Run) -> dict[str, Any]:
    """Train and measure, and return what `MEASURED` lists. An interrupted run is resumed."""
    task = read_task(setting)
    kept_back = [record for source in task.sources for record in source.validation]
    seeing = any(record.images for record in kept_back)
    rates = rates_of(run.method, run.rate, seeing=seeing)
    training = setting.training
    steps = training.total_steps(sum(len(source.train) for source in task.sources))
    settings = dataclasses.replace(
        training,
        learning_rate=run.rate,
        rates=rates,
        seed=run.seed,
        validate_every=training.validate_every or math.ceil(steps / VALIDATIONS),
    )
    plan = dataclasses.replace(setting.plan, method=run.method, options=dict(run.sizes))
    output = run.folder / RUN_FOLDER
    model = train(
        task.sources if len(task.sources) > 1 else task.sources[0],
        output=output,
        plan=plan,
        settings=settings,
        max_length=setting.max_length,
        resume=(output / "run.json").exists(),
    )
    peak = process_memory(model.decoder.device, peak=True)
    name = model.active_adapter
    adapter = model.get_adapter(name)
    features: dict[PictureFile, Tensor] = {}
    if model.sees():
        images = [image for record in kept_back for image in record.images]
        features = picture_features(model.tower(), plan.cache, images)
    kind, score = score_task(model, kept_back, task.problems, features)
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    measured = {
        "validation_loss": min(own["validation_loss"] for own in metrics if "validation_loss" in own),
        "task": kind,
        "task_score": score,
        "forgetting": forgetting(model, setting.answers, adapter=name),
        "parameters": sum(parameter.numel() for parameter in adapter.parameters()),
        "bytes": (output / WEIGHTS_FILE).stat().st_size,
        "rows_per_second": rows_per_second(metrics, settings.batch_size),
        "peak_mb": None if peak is None else peak / 1e6,
        "decode_vs_base": decode_vs_base(model, name),
    }
    shutil.rmtree(output / "checkpoints")  # several times as large as the base, where that is trained
    return measured


def forgetting(model: LlamaAdapter, answers: Path, *, adapter: str) -> float | None:
    """The rise of the loss of the base's own answers with an adapter, nats a token; None without answers.

    Args:
        answers: the file that `prepare` wrote.
    """
    examples, by_base = load_answers(answers)
    by_adapter = loss_of_answers(model, examples, adapter=adapter)
    return None if by_adapter is None or by_base is None else by_adapter - by_base


def score_task(
    model: LlamaAdapter,
    kept_back: Sequence[Record],
    problems: Sequence[Problem],
    features: Mapping[PictureFile, Tensor],
) -> tuple[str | None, float | None]:
    """The task's name and the share of right answers on the rows kept back. None if there is no task.

    ScienceQA's problems are answered by letter. Answers to questions about pictures have to match exactly
    (`llama_adapter.answering.scoring.is_right`). Captions can't be scored so.
    """
    if problems:
        predictions, _ = examine(model, problems, Examination(), features=features or None)
        return "ScienceQA accuracy", grade(problems, predictions).shares["AVG"].percent / 100
    asked = [own for own in kept_back if own.images and own.turns[0].text not in CAPTION_QUESTIONS]
    if not asked:
        return None, None
    answers = answer_records(model, asked, features=features, max_new_tokens=MAX_NEW_TOKENS)
    right = [is_right(said, own.turns[-1].text) for said, own in zip(answers, asked, strict=True)]
    return "exact match", sum(right) / len(right)


def rows_per_second(metrics: Sequence[Mapping[str, Any]], batch_size: int) -> float:
    """Rows a second in training: the median over steps, without steps that follow a validation.

    Args:
        metrics: the lines of a run's metrics.jsonl.
    """
    speeds, before = [], None
    for line in metrics:
        if "validation_loss" in line:
            before = None
        elif before is not None and line["seconds"] > before:
            speeds.append(batch_size / (line["seconds"] - before))
        if "seconds" in line:
            before = line["seconds"]
    if not speeds:  # every step followed a validation
        steps = [line for line in metrics if "seconds" in line]
        return float(batch_size * len(steps) / steps[-1]["seconds"])
    return statistics.median(speeds)


def decode_vs_base(model: LlamaAdapter, adapter: str) -> float:
    """The time to decode a token with an adapter, divided by the bare base's: the median of paired rounds."""
    greedy = Sampling(temperature=0, max_new_tokens=DECODED_TOKENS + 1)
    question = model.prepare_request(Question.of("What is the capital of France?", adapter=NO_ADAPTER)).tokens
    forwards = {name: partial(model, adapter=model.project(name)) for name in (NO_ADAPTER, adapter)}
    ratios = []
    for number in range(DECODED_ROUNDS + 1):
        seconds = {}
        for name in list(forwards)[:: 1 if number % 2 else -1]:
            tokens = stream_tokens(forwards[name], question, greedy, ())
            next(tokens)  # reads the question
            started = time.perf_counter()
            for _ in tokens:
                pass
            seconds[name] = time.perf_counter() - started
        if number > 0:  # the first round is a warm-up
            ratios.append(seconds[adapter] / seconds[NO_ADAPTER])
    return statistics.median(ratios)


# --- processes ----------------------------------------------------------------------------------------------


def start(function: Any, *arguments: Any, result: Path, log: Path) -> multiprocessing.process.BaseProcess:
    """Call a function in a process of its own. Its return value or its error is written to ``result``."""
    result.parent.mkdir(parents=True, exist_ok=True)
    if "forkserver" in multiprocessing.get_all_start_methods():
        # A fork server has imported the libraries, which takes longer than training a small adapter, and has
        # done nothing else: so all processes start from the same state.
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "torch.utils.tensorboard"])
    else:
        context = multiprocessing.get_context("spawn")
    process: multiprocessing.process.BaseProcess = context.Process(
        target=_within, args=(function, arguments, result, log)
    )
    process.start()
    return process


def _within(function: Any, arguments: tuple[Any, ...], result: Path, log: Path) -> None:
    from transformers.utils import logging

    with open(log, "a", buffering=1, encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    # A process that was left behind may still be writing its checkpoint.
    with alone_in(result.parent):
        try:
            value, error = function(*arguments), None
        except KeyboardInterrupt:
            sys.exit(STOPPED)
        except UsageError as wrong:
            value, error = None, str(wrong)
        except Exception as wrong:
            traceback.print_exc()
            value, error = None, f"{type(wrong).__name__}: {wrong}"
        write_json(result, {"value": _finite(value), "error": error and " ".join(error.split())})


def _finite(value: Any) -> Any:
    """The value for JSON, which has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # a training then ends after the current step, with a checkpoint

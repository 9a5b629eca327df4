"""The training loop that all scripts share: schedule, steps, validation, exact resume.

A run's folder is also the folder of its best adapter so far. `RunFolder` keeps its files beside the
adapter's.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_adapter.common.errors import UsageError
from llama_adapter.common.processes import running_processes
from llama_adapter.common.progress import clock
from llama_adapter.data.examples import Example
from llama_adapter.data.records import PictureFile
from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.checkpoint import save_adapter
from llama_adapter.model import LlamaAdapter
from llama_adapter.packing.frozen_products import frozen_products
from llama_adapter.packing.losses import accumulate_gradient, mean_answer_loss
from llama_adapter.training.run_folder import Onlooker, RunFolder
from llama_adapter.training.settings import TrainingSettings
from llama_adapter.training.stopping import stop_request

MAX_BAD_STEPS = 3  # in a row, with a loss or gradient that is not finite


def parameter_groups(adapter: Adapter, settings: TrainingSettings) -> list[dict[str, Any]]:
    """The adapter's parameters in groups for an optimiser, each with its "peak" learning rate.

    Raises:
        UsageError: a rate for a group that the adapter does not have.
    """
    groups = adapter.parameter_groups()
    for name in settings.rates:
        if name not in groups:
            raise UsageError(
                f"--rate {name}={settings.rates[name]}: this adapter has no group {name!r}; it has "
                f"{', '.join(groups)}"
            )
    peak, factors = settings.peak_learning_rate, adapter.rate_factors()
    return [
        {"params": parameters, "peak": settings.rates.get(name, peak * factors.get(name, 1.0))}
        for name, parameters in groups.items()
    ]


@dataclass
class _Progress:
    """The state that changes from step to step. A resume restores it."""

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class Trainer:
    """Trains one adapter of a model on encoded rows.

    Attributes:
        adapter: name of the adapter in ``model``. Nothing else is changed.
        output: folder of the run and of the best adapter.
        data: identifies the rows (names, fingerprints). It is saved with the adapter, and a run can only be
            resumed with the same data.
        validation_examples: rows by the name of their source. The best adapter has the lowest loss on average
            over the sources: over all tokens, a source with long answers would outweigh the others.
        features: (F,) for each picture of the rows; None if they have no pictures.
        occurrences: how often each training row is used in an epoch, on average; None is once each.
    """

    model: LlamaAdapter
    adapter: str
    train_examples: Sequence[Example]
    validation_examples: Mapping[str, Sequence[Example]]
    settings: TrainingSettings
    output: Path
    data: dict[str, Any] = field(default_factory=dict)
    features: Mapping[PictureFile, Tensor] | None = None
    occurrences: Sequence[float] | None = None

    def run(self, *, resume: bool = False) -> float:
        """Train to the end, or resume from the last checkpoint.

        Returns the best validation loss, in nats a token.

        The first Ctrl-C (or SIGTERM) ends the run after the current step, with a checkpoint. A resumed run
        gives the same result as one that was never stopped. A second Ctrl-C ends the run at once.

        Under `accelerate launch` every process calls this. Together they compute what a single process would;
        the number of processes may change at each resume.

        Raises:
            UsageError: a folder with another run, a resume with other data or settings, or a loss that is not
                finite for several steps in a row.
            KeyboardInterrupt: after Ctrl-C.
        """
        adapter = self.model.adapters[self.adapter]
        assert isinstance(adapter, Adapter)
        adapter.requires_grad_(True)
        processes = running_processes()
        if processes.sharded and any(part.alone for part in adapter.parts):
            raise UsageError(
                f"{adapter.config.method} trains the decoder's own weights, which cannot be sharded; launch "
                "with configs/ddp.yaml"
            )
        processes.shard(self.model.decoder)
        adapter.to(self.model.decoder.device)  # sharding may have moved the decoder
        optimizer = torch.optim.AdamW(
            parameter_groups(adapter, self.settings),
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
        )
        if not self.order(0):
            raise UsageError(
                "the weights of the data (--data SOURCE=WEIGHT) leave no row to train on in an epoch; raise "
                "them"
            )
        config = dataclasses.replace(adapter.config, training={})
        made_of = {"method": config.method, **config.to_dict()}
        made_of["parts"] = {part.pop("kind"): part for part in made_of["parts"]}
        del made_of["base_fingerprint"]  # it follows from the shape
        rows = {"train_rows": len(self.train_examples), "validation_rows": self._validation_rows}
        description = {
            "settings": dataclasses.asdict(self.settings),
            "data": {**self.data, **rows},
            "adapter": made_of,
        }
        folder: RunFolder | Onlooker = Onlooker()

        def begin() -> dict[str, Any] | None:
            nonlocal folder
            folder = opened = RunFolder(self.output, description, resume=resume)
            return opened.load_checkpoint() if resume else None

        progress = _Progress()
        if (state := processes.from_main(begin)) is not None:
            progress = _restore(state, adapter, optimizer)
            folder.line.say(f"going on from step {progress.step}")
        elif resume:
            folder.line.say("there is no checkpoint yet: starting from the beginning")
        with folder.metrics(progress.step), frozen_products(self.model):
            if state is None:
                for part in adapter.parts:
                    part.begin(len(self.train_examples), self._backward, processes)
            self._steps(adapter, optimizer, progress, folder)
        processes.any(False)  # all wait here until the main process has written its files
        return progress.best_loss

    def _steps(
        self,
        adapter: Adapter,
        optimizer: torch.optim.Optimizer,
        progress: _Progress,
        folder: RunFolder | Onlooker,
    ) -> None:
        settings, processes = self.settings, running_processes()
        rows = len(self.order(0))
        total = settings.total_steps(rows)
        per_epoch = math.ceil(rows / settings.batch_size)
        validate_every = settings.validate_every or min(per_epoch, math.ceil(total / 10))
        pace = _Pace(progress, total, settings.max_minutes)
        bad = 0
        # All processes take the main one's clock.
        place = processes.from_main(pace.place)
        with stop_request() as stop:
            for batch in () if place >= total else self._batches(progress.step, total):
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * settings.schedule(place, total)
                rate = optimizer.param_groups[0]["lr"]
                loss, norm = self._gradient(adapter, batch)
                fine = math.isfinite(loss) and math.isfinite(norm)
                if fine:
                    optimizer.step()
                    for part in adapter.parts:
                        part.after_step(max(progress.step + 1, round(place)), total)
                optimizer.zero_grad(set_to_none=True)
                bad = 0 if fine else bad + 1
                progress.skipped_steps += not fine
                progress.step += 1
                progress.tokens += sum(len(example.input_ids) for example in batch)
                progress.seconds = pace.seconds()
                folder.measured(
                    progress.step,
                    loss=loss,
                    learning_rate=rate,
                    gradient_norm=norm,
                    tokens=progress.tokens,
                    seconds=round(progress.seconds, 3),
                )
                folder.line.show(
                    f"step {progress.step}/{total}  loss {loss:.3f}  lr {rate:.2e}  {pace}"
                    + (f"  {progress.skipped_steps} steps skipped" if progress.skipped_steps else "")
                )
                place = processes.from_main(pace.place)
                last = place >= total
                stopping = processes.any(stop.is_set())
                if bad < MAX_BAD_STEPS and (last or progress.step % validate_every == 0):
                    self._validate(adapter, progress, folder)
                if last or stopping or bad == MAX_BAD_STEPS or progress.step % settings.checkpoint_every == 0:
                    folder.save_checkpoint(progress.step, _state(adapter, optimizer, progress))
                if bad == MAX_BAD_STEPS:
                    numbers = ", ".join(str(example.row) for example in batch[:20])
                    raise UsageError(
                        f"the loss was not finite {bad} steps in a row, last in the rows {numbers}; the "
                        f"weights before are kept in {self.output}; look at these rows "
                        "or lower --learning-rate"
                    )
                if stopping and not last:
                    folder.line.say(
                        f"stopped after step {progress.step} of {total}; "
                        "the same command with --resume goes on from there"
                    )
                    raise KeyboardInterrupt
                if last:
                    break

    def _batches(self, first: int, last: int) -> Iterator[list[Example]]:
        """The batches of steps first..last. The order of an epoch depends only on the seed and its number."""
        size = self.settings.batch_size
        per_epoch = math.ceil(len(self.order(0)) / size)
        order: list[int] = []
        for step in range(first, last):
            epoch, place = divmod(step, per_epoch)
            if not order or place == 0:
                order = self.order(epoch)
            yield [self.train_examples[i] for i in order[place * size : (place + 1) * size]]

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch in their order. Every epoch has the same number of rows."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train_examples), generator=generator)
        if self.occurrences is not None:
            # Systematic sampling: lay the rows end to end, each `occurrences` long, and take one for every
            # k + 0.5 inside it.
            lengths = torch.tensor(self.occurrences, dtype=torch.float64)[order]
            # Rounded: the sum of the lengths depends in its last digits on the order.
            ends = (lengths.cumsum(0) + 0.5).round(decimals=6).floor().long()
            counts = ends.diff(prepend=ends.new_zeros(1))
            order = order.repeat_interleave(counts)
            order = order[torch.randperm(len(order), generator=generator)]
        rows: list[int] = order.tolist()
        return rows

    def _gradient(self, adapter: Adapter, batch: Sequence[Example]) -> tuple[float, float]:
        """Accumulate the gradient of the batch's loss and of the parts' penalties.

        Returns:
            the loss without the penalties, and the norm of the gradient.
        """
        processes, device = running_processes(), self.model.decoder.device
        loss = accumulate_gradient(
            self.model,
            batch,
            device=device,
            max_tokens=self.settings.max_tokens,
            by_rows=self.settings.mean_over == "rows",
            features=self.features,
            processes=processes,
            adapter=self.adapter,
        )
        if processes.count > 1:
            loss = float(processes.sum(torch.tensor(loss, device=device)))
            processes.sum_gradients(adapter.parameters())
        # After adding up the processes' gradients, since each process computes the whole penalty.
        for part in adapter.parts:
            if (penalty := part.penalty()) is not None:
                penalty.backward()
        limit = math.inf if self.settings.max_grad_norm is None else self.settings.max_grad_norm
        return loss, float(torch.nn.utils.clip_grad_norm_(adapter.parameters(), limit))

    def _backward(self, row: int) -> None:
        """Add the gradient of the mean loss of one row, by its place among those to train on."""
        accumulate_gradient(
            self.model,
            [self.train_examples[row]],
            device=self.model.decoder.device,
            max_tokens=self.settings.max_tokens,
            features=self.features,
            adapter=self.adapter,
        )

    def _validate(self, adapter: Adapter, progress: _Progress, folder: RunFolder | Onlooker) -> None:
        rows, losses, tokens, done = self._validation_rows, {}, 0, 0
        processes = running_processes()
        for source, examples in self.validation_examples.items():
            losses[source], count = mean_answer_loss(
                self.model,
                examples,
                device=self.model.decoder.device,
                max_tokens=self.settings.max_tokens,
                features=self.features,
                progress=lambda so_far, before=done: folder.line.show(  # type: ignore[misc]
                    f"validation {before + so_far}/{rows} rows"
                ),
                processes=processes,
                adapter=self.adapter,
            )
            tokens, done = tokens + count, done + len(examples)
        loss = sum(losses.values()) / len(losses)
        apart = {f"validation_loss_{source}": value for source, value in losses.items()}
        folder.measured(progress.step, validation_loss=loss, **(apart if len(losses) > 1 else {}))
        if not loss < progress.best_loss:
            best = f"best: {progress.best_loss:.4f} after step {progress.best_step}"
        else:
            best = "the best so far, kept"
            progress.best_loss, progress.best_step = loss, progress.step
            training = {
                "data": self.data,
                "settings": dataclasses.asdict(self.settings),
                "step": progress.step,
                "validation_loss": round(loss, 4),
                "validation_tokens": tokens,
            }
            adapter.config = dataclasses.replace(adapter.config, training=training)
            if processes.main:
                save_adapter(adapter, self.output)
        each = ", ".join(f"{source} {value:.4f}" for source, value in losses.items())
        folder.line.say(
            f"step {progress.step}  validation loss {loss:.4f} nats a token on {rows:,} rows ({best})"
            + (f": {each}" if len(losses) > 1 else "")
        )

    @property
    def _validation_rows(self) -> int:
        return sum(map(len, self.validation_examples.values()))


def _state(adapter: Adapter, optimizer: torch.optim.Optimizer, progress: _Progress) -> dict[str, Any]:
    """Everything that a checkpoint needs so that the run can go on exactly."""
    parts = zip(adapter, adapter.parts, strict=True)
    return {
        "adapter": adapter.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parts": {kind: part.training_state() for kind, part in parts},
        "progress": dataclasses.asdict(progress),
        "rng": torch.get_rng_state(),
    }


def _restore(state: Mapping[str, Any], adapter: Adapter, optimizer: torch.optim.Optimizer) -> _Progress:
    """Go back to a checkpoint's state, and return how far the run had got."""
    adapter.load_state_dict(state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    for kind, part in zip(adapter, adapter.parts, strict=True):
        part.load_training_state(state.get("parts", {}).get(kind, {}))
    torch.set_rng_state(state["rng"])
    return _Progress(**state["progress"])


class _Pace:
    """Seconds of the run (with earlier sessions), its speed, how far it is, and the time left."""

    def __init__(self, progress: _Progress, total: int, max_minutes: float | None) -> None:
        self._progress, self._total = progress, total
        self._limit = math.inf if max_minutes is None else 60 * max_minutes
        self._first = dataclasses.replace(progress)
        self._started = time.monotonic()

    def seconds(self) -> float:
        return self._first.seconds + time.monotonic() - self._started

    def place(self) -> float:
        """Where the run is in its schedule, in steps: by its steps or by its time, whichever is further."""
        return max(self._progress.step, self._total * min(1.0, self.seconds() / self._limit))

    def __str__(self) -> str:
        spent = time.monotonic() - self._started
        steps = self._progress.step - self._first.step
        speed = (self._progress.tokens - self._first.tokens) / spent
        left = min(
            spent / steps * (self._total - self._progress.step), max(0.0, self._limit - self.seconds())
        )
        return f"{speed:,.0f} tokens/s  {clock(left)} left"

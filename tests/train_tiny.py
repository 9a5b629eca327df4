"""A training of a tiny model in a process of its own, or one of several, for tests to launch and to kill."""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from llama_adapter.common import processes
from llama_adapter.common.errors import run_command
from llama_adapter.data.examples import IGNORED, Example
from llama_adapter.data.records import PictureFile
from llama_adapter.training import trainer as training
from llama_adapter.training.settings import TrainingSettings
from llama_adapter.training.trainer import Trainer
from tests.tiny_models import VISION, build_tiny_model

SETTINGS = TrainingSettings(
    epochs=2,
    warmup_epochs=1,
    batch_size=4,
    learning_rate=0.05,
    max_grad_norm=1.0,
    validate_every=4,
    checkpoint_every=2,
    max_tokens=40,
)


def rows(count: int) -> tuple[list[Example], dict[PictureFile, torch.Tensor]]:
    """Rows of many lengths, one in five with a picture."""
    generator = torch.Generator().manual_seed(1)
    features: dict[PictureFile, torch.Tensor] = {}
    made = []
    for row in range(1, count + 1):
        question = torch.randint(3, 60, (3 + row % 7,), generator=generator).tolist()
        answer = [*question[::-1], 2]
        images: tuple[PictureFile, ...] = ()
        if row % 5 == 0:
            images = (Path(f"{row}.png"),)
            features[images[0]] = torch.randn(6, generator=generator)
        made.append(Example(question + answer, [IGNORED] * len(question) + answer, images, row))
    return made, features


def build(method: str | None, output: Path, settings: TrainingSettings = SETTINGS) -> Trainer:
    """The training of a tiny model: prompts that see, or another method on the text of the same rows."""
    model = build_tiny_model(vision=VISION)
    made, features = rows(13)
    if method is not None:
        model.delete_adapter("tiny")
        model.new_adapter("tiny", method=method, seed=1)
        made = [dataclasses.replace(example, images=()) for example in made]
    return Trainer(model, "tiny", made, {"made": made[:6]}, settings, output, {"source": "made"}, features)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--stop-after", type=int, help="the second process asks for it, in this step")
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--methods", nargs="*", default=[], help="each in a folder of its own in --output")
    parser.add_argument("--epochs", type=int, default=SETTINGS.epochs)
    parser.add_argument("--checkpoint-every", type=int, default=SETTINGS.checkpoint_every)
    arguments = parser.parse_args()
    # The last thing called at the exit: a group that is still there can abort the process while Python ends.
    atexit.register(lambda: print(f"group at exit: {torch.distributed.is_initialized()}\n", end=""))
    running = processes.running_processes()
    for method in arguments.methods:
        build(method, arguments.output / method).run()
    if arguments.methods:
        return
    asked = {name: getattr(arguments, name) for name in ("epochs", "checkpoint_every")}
    trainer = build(None, arguments.output, dataclasses.replace(SETTINGS, **asked))
    if arguments.shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        assert running.count > 1
        decoder = trainer.model.decoder
        mesh = init_device_mesh("cpu", (running.count,))
        for layer in decoder.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(decoder, mesh=mesh, reshard_after_forward=True)
        sharded = dataclasses.replace(running, sharded=True)
        training.running_processes = lambda: sharded
    if arguments.stop_after and running.index == 1:
        accumulate, steps = training.accumulate_gradient, iter(range(1, 1000))

        def stopping(*args: object, **kwargs: object) -> float:
            if next(steps) == arguments.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            return accumulate(*args, **kwargs)  # type: ignore[arg-type]

        training.accumulate_gradient = stopping
    trainer.run(resume=arguments.resume)
    if arguments.shard:
        # DTensor's caches keep gloo's threads alive past the end of the group (a GPU's NCCL has none).
        os._exit(0)


if __name__ == "__main__":
    sys.exit(run_command(main))

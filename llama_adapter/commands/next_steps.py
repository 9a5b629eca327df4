"""Commands that use the result of a training. They can be pasted into the same shell as they are."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_adapter.data.records import Record

QUESTION = "Give three tips for staying healthy."
LONGEST_QUESTION = 100  # characters


def console_command() -> list[str]:
    """How to call the console command of this installation in this shell."""
    found = shutil.which("llama-adapter")
    if found and Path(found).parent == Path(sys.executable).parent:
        return ["llama-adapter"]
    return [sys.executable or "python", "-m", "llama_adapter"]  # the command is not on the PATH


def steps_text(steps: Iterable[tuple[str, Sequence[object]]]) -> str:
    """Each command on a line, below a line that says what it does."""
    command = console_command()
    lines = []
    for what, words in steps:
        lines += [f"{what}:", "    " + shlex.join([*command, *map(str, words)])]
    return "\n".join(lines)


def adapter_steps(
    arguments: argparse.Namespace, *, question: Sequence[object], scoring: Sequence[object]
) -> str:
    """How to ask, open in a browser and score an adapter that was just trained.

    Args:
        arguments: those of the training. Options for weights and devices are repeated.
        question: the arguments of `ask`: a question, perhaps with --image.
        scoring: the arguments of `eval`: its script and its data.
    """
    adapter = ["--adapter", arguments.output]
    same: list[object] = []
    for name in ("weights", "device", "dtype", "quantize"):
        if (value := getattr(arguments, name, None)) is not None:
            same += [f"--{name}", value]
    return steps_text(
        [
            ("ask it a question", ["ask", *question, *adapter, *same]),
            ("open it in a browser", ["demo", *adapter, *same]),
            ("score it", ["eval", *scoring, *adapter, *same]),
        ]
    )


def question_of(records: Iterable[Record], *, images: bool = False) -> list[object]:
    """The arguments of `ask` for the first short question of these rows, or for one that fits any adapter.

    ``images``: with the row's picture; only rows whose picture is a file are used.
    """
    for record in records:
        turn = record.turns[-2] if len(record.turns) > 1 else None
        if turn is None or turn.input or "\n" in turn.text or len(turn.text) > LONGEST_QUESTION:
            continue
        if turn.text.startswith("-") or not turn.text.isprintable():
            continue
        if not images:
            return [turn.text]
        if len(record.images) == 1 and isinstance(record.images[0], Path):
            return [turn.text, "--image", record.images[0]]
    return [QUESTION]

"""The folder of a training run: how it was started, what was measured, and checkpoints to resume from.

run.json        settings, data and adapter, which a resume must repeat; versions, machine and command
metrics.jsonl   one line for each measurement; tensorboard/ has the same values
checkpoints/    the last two, each with a checksum
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llama_adapter.common.errors import UsageError
from llama_adapter.common.files import sha256_file, write_atomically, write_json
from llama_adapter.common.processes import running_processes
from llama_adapter.common.progress import ProgressLine

KEPT_CHECKPOINTS = 2


class RunFolder:
    """Starts a run in a folder, or resumes the one that is there.

    Args:
        folder: created if needed.
        description: values by part and name (settings, data, adapter) that identify this run.
        resume: continue the run that is there.

    Raises:
        UsageError: the folder has another run, none to resume, or one with another description.
    """

    def __init__(self, folder: Path, description: dict[str, dict[str, Any]], *, resume: bool) -> None:
        self.folder = folder
        self.line = ProgressLine()
        record = folder / "run.json"
        description = json.loads(json.dumps(description))  # in the form in which it will be read back
        if not resume:
            if record.exists():
                raise UsageError(
                    f"{folder} holds a run already; go on with it by --resume, or choose another --output"
                )
            folder.mkdir(parents=True, exist_ok=True)
            write_json(record, {**description, "made_by": _made_by()})
        elif not record.exists():
            raise UsageError(f"{folder} holds no run to resume; leave --resume out to start one")
        else:
            before = json.loads(record.read_text(encoding="utf-8"))
            for part, values in description.items():
                _compare(folder, part, before.get(part, {}), values)

    # --- checkpoints -------------------------------------------------------------------------------------

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after a step, and delete all but the last two checkpoints.

        The checksum is written last: a checkpoint without it does not count.
        """
        self._checkpoints.mkdir(exist_ok=True)
        path = self._checkpoints / f"step-{step:07d}.pt"
        with write_atomically(path) as temporary:
            torch.save(state, temporary)
        write_json(path.with_suffix(".json"), {"sha256": sha256_file(path)})
        for old in sorted(self._checkpoints.glob("step-*.pt"))[:-KEPT_CHECKPOINTS]:
            old.with_suffix(".json").unlink(missing_ok=True)
            old.unlink()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state of the last complete checkpoint, or None. Reports damaged ones."""
        for path in sorted(self._checkpoints.glob("step-*.pt"), reverse=True):
            if _sealed(path.with_suffix(".json")) != sha256_file(path):
                self.line.say(f"{path} is not whole (its checksum differs); taking the one before")
                continue
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        return None

    # --- metrics -----------------------------------------------------------------------------------------

    @contextmanager
    def metrics(self, step: int) -> Iterator[None]:
        """A context in which `measured` can be called. It starts after a step: later measurements, from
        before a resume, are deleted and will be made again."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        with write_atomically(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step))
        with (
            open(path, "a", buffering=1) as self._metrics,
            SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1) as self._board,
        ):
            yield

    def measured(self, step: int, **values: float) -> None:
        """Record values measured at a step."""
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)


class Onlooker:
    """Replaces a `RunFolder` in all processes but the main one, which alone writes and reports."""

    class _Silent:
        def show(self, line: str) -> None: ...
        def say(self, line: str) -> None: ...

    def __init__(self) -> None:
        self.line = self._Silent()

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None: ...
    def metrics(self, step: int) -> AbstractContextManager[None]:
        return nullcontext()

    def measured(self, step: int, **values: float) -> None: ...


def _sealed(seal: Path) -> str | None:
    """The checksum in a seal file. None if the file is missing or damaged."""
    try:
        return str(json.loads(seal.read_bytes())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _compare(folder: Path, part: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            _compare(folder, f"{part} {name}", old, new)
        raise UsageError(
            f"{folder} was started with {part} {name} = {old!r:.80}, now it is {new!r:.80}; "
            "resume with the same, or choose another --output"
        )


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # an incomplete line


def _made_by() -> dict[str, Any]:
    """Versions, git revision, machine and command."""
    checkout = str(Path(__file__).resolve().parents[2])
    git = ["git", "-C", checkout, "rev-parse", "HEAD"]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # a machine without git
        revision = ""
    packages = ("llama-adapter", "torch", "transformers", "accelerate")
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "git_revision": revision or None,
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
        "processes": running_processes().count,
    }

"""Runs a module in a process of its own, without importing the libraries again.

A new interpreter takes seconds to import torch and transformers. A fork server imports them once, and each
process here is a fork of it. A test of how a command starts should use subprocess instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.conftest import CHECKOUT

# What the modules that are run here import. They themselves are not in it, since each runs as "__main__".
PRELOADED = [
    "accelerate",
    "llama_adapter.comparison.running",
    "tests.tiny_models",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
]


class OwnProcess:
    """`python -m MODULE ARGUMENTS` in the checkout.

    Attributes:
        pid: the number of the process.
    """

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._process = context.Process(
            target=_run, args=(module, arguments, dict(environment or {}), self._files)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def stdout(self) -> str:
        """What it has written to standard output so far."""
        return self._files[0].read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        """What it has written to standard error so far."""
        return self._files[1].read_text(encoding="utf-8")

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.is_alive()

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = 300) -> int:
        """Wait for its end. Returns its exit code, or the negative number of the signal that ended it."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            raise AssertionError(f"not finished after {seconds:g} seconds: {self.stderr[-3000:]}")
        assert self._process.exitcode is not None
        return self._process.exitcode

    def finish(self) -> OwnProcess:
        """Wait for its end, which has to be a good one."""
        code = self.wait()
        assert code == 0, self.stderr[-3000:]
        return self


def _run(module: str, arguments: list[str], environment: dict[str, str], files: list[Path]) -> None:
    os.chdir(CHECKOUT)
    os.environ.update(environment)
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)

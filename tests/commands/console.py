"""Running the console command in a test, and what its answers look like with the tiny weights."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from llama_adapter.__main__ import main
from llama_adapter.data.templates import Turn
from llama_adapter.decoding.sampling import Sampling
from llama_adapter.methods.checkpoint import save_adapter
from llama_adapter.methods.projection import Projection
from llama_adapter.model import LlamaAdapter
from llama_adapter.weights.catalogue import DEFAULT_BASE, SHIPPED

BASE, ADAPTER, BETTER = DEFAULT_BASE, SHIPPED[DEFAULT_BASE].text, SHIPPED[DEFAULT_BASE].vision
SEEING = "seeing"  # an adapter's name that is none of the shipped ones
GREEDY = ("--temperature", "0", "--max-new-tokens", "12")
NOTE = "the bare base answers"
# What stands on standard error under the tiny models' answers: with GREEDY, they never end by themselves.
CUT_OFF = "(cut off at the length limit, after 12 tokens)\n"
AUTO_CUT_OFF = f"{CUT_OFF}({ADAPTER} answered)\n"  # in a chat in which auto answers


class Sudden(Exception):
    """Stands for a bug."""


class Result(NamedTuple):
    code: int
    out: str
    err: str


def invoke(*words: str, stdin: bytes = b"", encoding: str = "utf-8") -> Result:
    """Run the command line in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="") for _ in range(2))
    with (
        mock.patch.object(sys, "argv", ["llama-adapter", *words]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main()
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return Result(code, *texts)


def refusal(*words: str, stdin: bytes = b"") -> str:
    """The line with which the command line refuses something."""
    code, out, err = invoke(*words, stdin=stdin)
    assert (code, out) == (2, ""), (out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def make_adapter(folder: Path, decoder: Any, *, base: str, seed: int = 1, **settings: Any) -> None:
    """An adapter whose gates are far from zero, and to which pictures say much."""
    model = LlamaAdapter(decoder, base=base)
    adapter = model.new_adapter("tiny", adapted_layers=2, seed=seed, **settings)
    if adapter.find(Projection) is not None and adapter.projection.sizes is not None:
        torch.nn.init.constant_(adapter.projection.sizes, 5)
    torch.nn.init.normal_(adapter.prompts.gates, generator=torch.Generator().manual_seed(seed))
    save_adapter(adapter, folder)


def greedy(model: LlamaAdapter, question: str | list[Turn], **kwargs: Any) -> str:
    return model.chat(question, sampling=Sampling(temperature=0, max_new_tokens=12), **kwargs)


def chat(*lines: str | bytes, options: tuple[str, ...] = GREEDY) -> Result:
    """What a chat says to these lines; the lines themselves, which it shows, are left out."""
    typed = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    code, out, err = invoke("chat", *options, stdin=typed)
    return Result(code, re.sub(r"^> .*\n", "", out, flags=re.MULTILINE), err)

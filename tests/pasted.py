"""The commands that a training prints at its end, run as if they were pasted."""

from __future__ import annotations

import shlex
import sys

import pytest

from llama_adapter.__main__ import main
from llama_adapter.commands import demo


def run_pasted(printed: str, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run each command that a training printed. Returns their words, without the program's name."""
    commands = []
    text = printed
    for start in ("\n    llama-adapter ", f"\n    {shlex.quote(sys.executable)} -m llama_adapter "):
        text = text.replace(start, "\n    RUN ")
    for piece in text.split("\n    RUN ")[1:]:
        # A command ends with its line, unless a quoted question contains line breaks.
        words: list[str] = []
        lines = piece.split("\n")
        for count in range(1, len(lines) + 1):
            try:
                words = shlex.split("\n".join(lines[:count]))
                break
            except ValueError:  # inside a quotation
                continue
        commands.append(words)
        if words[0] == "demo":  # it would serve for ever
            demo.build_parser("demo").parse_args(words[1:])
            continue
        monkeypatch.setattr(sys, "argv", ["llama-adapter", *words])
        assert main() == 0, words
    return commands

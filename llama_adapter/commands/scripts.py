"""The scripts as console commands: `llama-adapter train alpaca` is `python -m train.alpaca`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from llama_adapter.common.errors import UsageError

SCRIPTS: dict[str, tuple[str, ...]] = {
    "train": ("alpaca", "vqa", "scienceqa", "clip", "teacher"),
    "eval": ("alpaca", "methods", "questions", "captions", "vqa", "scienceqa", "clip"),
    "demo": (),
}


def run_script(words: Sequence[str]) -> bool:
    """Run the script that a command line names. Returns False if it names none.

    Raises:
        UsageError: `train` or `eval` without the name of a script.
    """
    if not words or words[0] not in SCRIPTS:
        return False
    kind, *rest = words
    if not SCRIPTS[kind]:
        name, program = kind, f"llama-adapter {kind}"
    elif rest and rest[0] in ("-h", "--help"):
        print(f"llama-adapter {kind} {{{','.join(SCRIPTS[kind])}}}: each has a --help of its own")
        return True
    elif rest and rest[0] in SCRIPTS[kind]:
        name, program = f"{kind}_{rest[0]}", f"llama-adapter {kind} {rest[0]}"
        rest = rest[1:]
    else:
        found = repr(rest[0]) if rest else "nothing"
        raise UsageError(f"llama-adapter {kind} takes one of {', '.join(SCRIPTS[kind])}; found {found}")
    # Only the requested script is imported: each import is slow and may need an extra.
    importlib.import_module(f"llama_adapter.commands.{name}").main(rest, program=program)
    return True

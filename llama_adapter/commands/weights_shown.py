"""llama-adapter list: the bases, towers and adapters that are here or can be fetched."""

from __future__ import annotations

import argparse
import json

from llama_adapter.common.errors import UsageError
from llama_adapter.weights.listing import Entry, list_entries, size_text

HEADINGS = {"base": "bases (--base)", "tower": "towers (--tower)", "adapter": "adapters (--adapter)"}


def print_list(arguments: argparse.Namespace) -> None:
    """Print everything that is available, as a table or as JSON."""
    entries = list_entries(arguments.weights)
    if arguments.json:
        print(json.dumps([_facts(entry) for entry in entries], indent=2, ensure_ascii=False))
        return
    width = max(len(entry.name) for entry in entries)
    for kind, heading in HEADINGS.items():
        print(heading)
        for entry in entries:
            if entry.kind == kind:
                state = "here " if entry.folder else "fetch"
                print(f"  {entry.name:{width}}  {size_text(entry.size):>7}  {state}  {entry.about}")
        if not any(entry.kind == kind for entry in entries):
            print("  none")
    print("`llama-adapter fetch NAME` gets what is not here; `llama-adapter info NAME` says more of what is")


def _facts(entry: Entry) -> dict[str, object]:
    return {
        "kind": entry.kind,
        "name": entry.name,
        "here": entry.folder is not None,
        "folder": str(entry.folder) if entry.folder else None,
        "bytes": entry.size,
        "about": entry.about,
    }


def print_base_or_tower(name: str, weights: str | None) -> bool:
    """Print a description of the base or tower with this name. Returns False if there is none.

    Raises:
        UsageError: it has to be fetched first.
    """
    entry = next((entry for entry in list_entries(weights) if entry.name == name), None)
    if entry is None or entry.kind == "adapter":
        return False
    if entry.folder is None:
        raise UsageError(f"the {entry.kind} {name!r} is not here yet: run `llama-adapter fetch {name}`")
    print(f"{entry.kind:<8}{entry.folder}")
    print(f"size    {size_text(entry.size)}")
    print(f"about   {entry.about}")
    print(f"use     --{entry.kind} {name}")
    return True

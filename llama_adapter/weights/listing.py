"""List the bases, towers and adapters that are here or can be fetched."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_adapter.weights.catalogue import CATALOGUE, DEFAULT_BASE
from llama_adapter.weights.locations import Kind, list_weights

LINE_WIDTH = 90  # of the description of an entry


@dataclass(frozen=True)
class Entry:
    """A base, a tower or an adapter.

    Attributes:
        folder: where it is; None if it has to be fetched.
        size: bytes of its files, or of the download.
        about: a line about it from its card, the catalogue or its config.
    """

    kind: Kind
    name: str
    folder: Path | None
    size: int
    about: str


def list_entries(weights: str | Path | None = None) -> list[Entry]:
    """Everything in the weights folders and the catalogue, sorted by kind and name."""
    entries = []
    kinds: tuple[Kind, ...] = ("base", "tower", "adapter")
    for kind in kinds:
        here = list_weights(kind, weights)
        fetched = {name: entry for name, entry in CATALOGUE.items() if entry.kind == kind}
        for name in sorted({*here, *fetched}):
            folder = here.get(name)
            if folder is None:
                size = fetched[name].size
            else:
                size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
            about = (folder and _card_line(folder)) or ""
            if not about and name in fetched:
                about = f"{fetched[name].origin}, {fetched[name].licence}"
                about += ", the default base" if name == DEFAULT_BASE else ""
            if not about and folder is not None:
                about = _config_line(folder)
            entries.append(Entry(kind, name, folder, size, _plain(about)))
    return entries


def _card_line(folder: Path) -> str:
    """The first sentence of a folder's card; "" if it has none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # the card's metadata
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        if words and not words.startswith(("#", "|", "!", "```", "<", "- ")):
            return re.split(r"(?<=[.!?])\s", words, maxsplit=1)[0]
    return ""


def _config_line(folder: Path) -> str:
    """A line made from the config of a folder that has no card."""
    for file in sorted(folder.glob("*config.json")):
        try:
            config: Any = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(config, dict):
            continue
        if isinstance(config.get("base"), str):
            return f"an adapter for {config['base']}"
        if "peft_type" in config:
            return f"an adapter of PEFT for {config.get('base_model_name_or_path')}"
        if isinstance(config.get("model_type"), str):
            layers = config.get("num_hidden_layers")
            return config["model_type"] + (f", {layers} layers" if isinstance(layers, int) else "")
    return "no card"


def _plain(line: str) -> str:
    """The text cut to one line, without control characters: weights may come from anyone."""
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return textwrap.shorten(line, LINE_WIDTH, placeholder=" ...") or "no card"


def size_text(size: int) -> str:
    """A number of bytes as people write it, such as 538 MB."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= 0.9995 * unit:  # 999.7 MB is 1 GB
            return f"{size / unit:.3g} {name}"
    return f"{size} B"

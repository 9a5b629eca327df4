"""The adapters that a person can choose on the page, each with a line about it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.checkpoint import adapter_folder, is_peft, read_config
from llama_adapter.methods.config import AdapterConfig
from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.page.display import named
from llama_adapter.surface.named_adapters import AUTO
from llama_adapter.weights import locations


def load_experts(
    model: LlamaAdapter,
    *,
    adapter: str | None = None,
    weights: str | Path | None = None,
    adapters: Path | None = None,
    compared: Mapping[str, Path] = {},
) -> dict[str, str]:
    """Load all adapters of the weights folders that fit the base. The active one stays active.

    Args:
        adapter: how the active adapter was named by the user, if that is no name in the weights folders.
        adapters: one more folder of adapters. A name that the weights folders also have is left out.
        compared: more adapters, the folder of each by its name.

    Returns:
        a line about each adapter by its name; "auto" is first, the bare base last.

    Raises:
        UsageError: ``adapters`` contains no adapter.
    """
    active = model.active_adapter
    folders = locations.list_weights("adapter", weights)
    if adapters is not None:
        more = locations.list_weights("adapter", adapters)
        if not more:
            raise UsageError(f"--adapters: {adapters} has no folder with an adapter in it")
        for name in more.keys() & folders.keys():
            print(f"{more[name]} is left out: another adapter has that name", file=sys.stderr)
        folders = {**more, **folders}
    folders = {**folders, **compared}
    if active not in (NO_ADAPTER, AUTO) and adapter is not None:
        folder = adapter_folder(locations.resolve(adapter, kind="adapter", weights=weights))
        folders = {active: folder, **{name: other for name, other in folders.items() if name != active}}
    lines = {}
    for name, folder in folders.items():
        try:
            if name not in model.adapters:
                # Whether an adapter of PEFT fits is known only when it is loaded.
                if not is_peft(folder) and read_config(folder).shape != model.shape:
                    continue
                model.load_adapter(folder, name=name)
        except UsageError as error:  # a broken folder should not keep the others from loading
            print(f"{name} is left out: {error}", file=sys.stderr)
        else:
            lines[name] = describe(folder, model.get_adapter(name).config)
    model.set_adapter(active)
    if lines:
        lines = {AUTO: describe_auto(model), **lines}
    lines[NO_ADAPTER] = f"The bare base, {model.base}, without an adapter."
    return lines


def describe_auto(model: LlamaAdapter) -> str:
    """Which adapter answers when "auto" is chosen."""
    with_picture, without = (
        named(model.answering_adapter(AUTO, pictured=pictured)) for pictured in (True, False)
    )
    if with_picture == without:
        return f"{without} answers."
    return f"{with_picture} answers once there is a picture, before that {without}."


def describe(folder: Path, config: AdapterConfig) -> str:
    """The first sentence of an adapter's model card, or its sizes if it has no card."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # the card's metadata
        text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE).strip()
        if text:
            sentence = re.split(r"(?<=[.!?])\s|\n\s*\n", text)[0]
            return " ".join(sentence.split())
    return f"{config.method} in the top {config.adapted_layers} layers; no model card."

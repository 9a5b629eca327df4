"""The list of weights: a line about each one, from its card, the catalogue or its config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_adapter.weights.listing import LINE_WIDTH, list_entries, size_text


@pytest.mark.parametrize(
    ("card", "about"),
    [
        (
            "---\nlicense: mit\n---\n\n# name\n\nIt follows\ninstructions. And more.\n",
            "It follows instructions.",
        ),
        (
            "<!-- made by hand -->\n![logo](x.png)\n\nNames 3.5 million colours!\n",
            "Names 3.5 million colours!",
        ),
        ("# only a heading\n", "an adapter for some-base"),
        (None, "an adapter for some-base"),
        ("An \x1b[31mescape.\n", "An ?[31mescape."),
    ],
)
def test_an_adapter_is_told_by_its_card(tmp_path: Path, card: str | None, about: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base": "some-base"}))
    if card is not None:
        (folder / "README.md").write_text(card)
    (entry,) = (entry for entry in list_entries(tmp_path) if entry.folder)
    assert (entry.kind, entry.name, entry.folder, entry.about) == ("adapter", "mine", folder, about)
    assert entry.size == sum(file.stat().st_size for file in folder.iterdir())


def test_a_long_card_is_cut_and_a_damaged_config_told(tmp_path: Path) -> None:
    for name, content in (("long", "{}"), ("damaged", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "long" / "README.md").write_text("word " * 100)
    about = {entry.name: entry.about for entry in list_entries(tmp_path)}
    assert len(about["long"]) <= LINE_WIDTH and about["long"].endswith("word ...")
    assert about["damaged"] == "no card"


def test_sizes_read_well() -> None:
    sizes = {0: "0 B", 999: "999 B", 1500: "1.5 kB", 538_090_408: "538 MB", 999_900_000: "1 GB"}
    assert {size: size_text(size) for size in sizes} == sizes

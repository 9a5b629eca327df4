"""What the page's tests share: settings, the content of the box, and the content of a chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from llama_adapter.page.display import typed

KNOBS = ("", 0, 1, 0, 1, 12, None)  # all settings except the adapter
SETTINGS = ("one", *KNOBS)
SEEING = ("eyes", *KNOBS[:-2], 60, None)
HOSTILE = "<script>alert(1)</script> <img src=x onerror=alert(2)> &lt;b&gt; ![](http://x.invalid/y.png)"


def typed_in(text: str, *files: Path) -> dict[str, Any]:
    """The content of the box for a question."""
    return {"text": text, "files": [str(file) for file in files]}


def texts(look: list[dict[str, Any]]) -> list[str]:
    """The text of each message in a chat, without pictures and notes."""
    return [typed(next(part["text"] for part in message["content"] if "text" in part)) for message in look]


def pictures(look: list[dict[str, Any]]) -> list[list[Image.Image]]:
    """The pictures before each message's text."""
    return [
        [Image.open(part["path"]) for part in message["content"][:-1] if "path" in part] for message in look
    ]


def has(box: dict[str, Any], state: dict[str, Any]) -> bool:
    return state.items() <= box.items()

"""The chat messages of a row, in OpenAI's or ShareGPT's spelling -> turns, and the pictures within them."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_adapter.common.errors import UsageError
from llama_adapter.data.row_pictures import PictureFile, read_picture
from llama_adapter.data.turns import Turn
from llama_adapter.data.values import is_empty_json, kind_of, read_text

# Some things would be lost, so they are refused. Each message says what to do.
TOOLS = "calls of tools are not read; leave such rows out"
MEDIA = "only text and pictures are read; leave such rows out"
THOUGHTS = "thoughts before an answer are not read; leave the field out, or write them into the answer"
_MESSAGE_REFUSED = {
    **dict.fromkeys(("tool_calls", "function_call", "tool_call_id", "tools", "functions"), TOOLS),
    **dict.fromkeys(("audio", "audios", "video", "videos"), MEDIA),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), THOUGHTS),
    **dict.fromkeys(("image", "images"), "name pictures in the row's 'images', or in parts of 'content'"),
    **dict.fromkeys(("train_detail", "training_detail"), "an answer is learnt whole or not at all"),
    "refusal": "write the refusal into 'content'",
}
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
_TOOL_ROLES = {
    *("tool", "tool_call", "tool_calls", "tool_response", "function", "function_call", "function_response"),
    *("observation", "ipython"),
}
_LEARNT_FLAGS = ("weight", "train", "training", "train_on_turn", "loss")
_IMAGE_TAG = "<image>"


@dataclass
class RowPictures:
    """Collects a row's pictures while its messages are read.

    Attributes:
        files: the pictures of the row's columns, or those within the messages.
        placeholders: how many parts of messages stand for a picture of the columns.
    """

    root: Path
    files: list[PictureFile]
    placeholders: int = 0
    inside: int = 0  # how many files come from the messages
    columns: bool = field(init=False)

    def __post_init__(self) -> None:
        self.columns = bool(self.files)

    def add(self, source: Any) -> None:
        """Add a picture from a part of a message. None stands for a picture of the columns."""
        if source is None:
            self.placeholders += 1
            return
        if self.columns:
            raise UsageError("the row names pictures in a field of its own as well; name them in one place")
        self.files.append(read_picture(source, "content", self.root))
        self.inside += 1

    def settle(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns without image tags. Raises UsageError unless there is one tag for each picture."""
        asked = [turn for turn in turns if turn.role != "assistant"]
        tags = sum(text.count(_IMAGE_TAG) for turn in asked for text in (turn.text, turn.input))
        shown = self.placeholders + tags + (self.inside if self.placeholders or not tags else 0)
        if shown and shown != len(self.files):
            raise UsageError(
                f"its text has places for {shown} pictures ({_IMAGE_TAG}), and it names {len(self.files)}; "
                "expected as many of both"
            )
        return [
            replace(turn, text=turn.text.strip())
            if turn.role == "assistant"
            else replace(
                turn,
                text=turn.text.replace(_IMAGE_TAG, "").strip(),
                input=turn.input.replace(_IMAGE_TAG, "").strip(),
            )
            for turn in turns
        ]


def read_messages(messages: Any, column: str, pictures: RowPictures) -> list[Turn]:
    """The turns of a column of messages. Raises UsageError naming the message that can't be read."""
    if not isinstance(messages, list):
        raise UsageError(f"field {column!r}: expected a list of messages, found {kind_of(messages)}")
    turns = []
    for number, message in enumerate(messages, start=1):
        try:
            turns.append(_message(message, pictures))
        except UsageError as error:
            raise UsageError(f"field {column!r}, message {number}: {error}") from None
    return turns


def _message(message: Any, pictures: RowPictures) -> Turn:
    if not isinstance(message, dict):
        raise UsageError(f"expected an object, found {kind_of(message)}")
    ours = "from" if "from" in message and "role" not in message else "role"
    role = read_text(message, ours)
    if role.lower() in _TOOL_ROLES:
        raise UsageError(f"field {ours!r} is {role!r}: {TOOLS}")
    if role.lower() not in _ROLES:
        expected = ", ".join(_ROLES)
        raise UsageError(f"field {ours!r} is {reprlib.repr(role)}; expected one of {expected}")
    for name, why in _MESSAGE_REFUSED.items():
        if not is_empty_json(message.get(name)):
            raise UsageError(f"field {name!r}: {why}")
    learnt = True
    for name in _LEARNT_FLAGS:
        if (flag := message.get(name)) is not None:
            if not isinstance(flag, bool | int | float) or flag not in (0, 1):
                raise UsageError(f"field {name!r}: expected 0 or 1, found {reprlib.repr(flag)}")
            learnt &= bool(flag)
    role = _ROLES[role.lower()]
    spelled = ("content", "value") if ours == "role" else ("value", "content")
    key = next((name for name in spelled if name in message), spelled[0])
    if isinstance(message.get(key), list):
        return Turn(role, _parts(message[key], key, role, pictures), learnt=learnt)
    return Turn(role, read_text(message, key), learnt=learnt)


def _parts(parts: list[Any], column: str, role: str, pictures: RowPictures) -> str:
    """The text of a message that is given in parts. Its pictures are added to `pictures`."""
    texts = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text"):
            texts.append(read_text(part, "text"))
        elif kind in ("image", "image_url", "input_image") and role != "assistant":
            source = next(
                (part[k] for k in ("image", "image_url", "url", "path", "base64") if part.get(k)), None
            )
            if isinstance(source, dict) and "url" in source:
                source = source["url"]
            elif source is not None and source is part.get("base64"):
                source = f"data:image/png;base64,{source}"
            pictures.add(source)
        else:
            found = kind_of(part) if kind is None else f"{kind!r} of the {role}"
            expected = "expected parts of type text, or image in a question"
            raise UsageError(f"field {column!r}: {expected}, found {found}")
    return "\n".join(text for text in texts if text)

"""Drawings of coloured shapes and questions about them, made by code: the source ``drawings:N``.

There are N pictures of one to four shapes, in many colours, sizes, positions and backgrounds, filled or as
outlines. Each has four questions, in many wordings: about its colours; about its shapes; whether there is a
certain shape or colour (with yes as often as no); and about what it shows, how many shapes there are, or the
colour of the background. A question that can't be asked, such as for the colour of one of two circles, gives
way to one with yes or no. Descriptions and American questions ("color") are answered with gray, British
questions ("colour") with grey.

``drawings:N:colours`` is for learning colours first. Each picture has one large shape on a plain background,
and three of its four questions are about colours.

The split, the variant and a picture's number decide everything about it. ``drawings:100`` are the first
hundred of ``drawings:200``, and the split test has other pictures than train.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

from llama_adapter.common.errors import UsageError
from llama_adapter.data.drawing_questions import ask_about, caption
from llama_adapter.data.drawn_picture import Drawing, draw_picture

DRAWINGS = "drawings"  # the source's name, before the colon and the number of pictures
COLOURS_FIRST = "colours"  # after a second colon
_MOST = 1_000_000


def drawing_rows(source: str, split: str | None = None) -> tuple[list[dict[str, Any]], str]:
    """The rows of a source, with PNG files as pictures, and a SHA-256 of them.

    Raises UsageError for a source that is neither ``drawings:N`` nor ``drawings:N:colours``.
    """
    rows: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    colours = source.endswith(f":{COLOURS_FIRST}")
    for draws, picture, drawing in _drawings(source, split):
        digest.update(picture)
        for question, answer in ask_about(drawing, draws, colours=colours):
            digest.update(f"{question}\n{answer}\n".encode())
            rows.append({"image": picture, "question": question, "answer": answer})
    return rows, digest.hexdigest()


def drawing_captions(source: str, split: str | None = None) -> Iterator[tuple[bytes, tuple[str, ...]]]:
    """The same pictures as PNG files, each with captions.

    Raises UsageError as `drawing_rows` does.
    """
    for draws, picture, drawing in _drawings(source, split):
        yield picture, caption(drawing, draws)


def _drawings(source: str, split: str | None) -> Iterator[tuple[random.Random, bytes, Drawing]]:
    """Each picture with what is on it, and with the generator that is to choose the words about it."""
    count, colon, kind = source.removeprefix(f"{DRAWINGS}:").partition(":")
    if not count.isdecimal() or not 0 < int(count) <= _MOST:
        raise UsageError(
            f"{source}: {count!r} is not a number of drawings; expected {DRAWINGS}:N, N from 1 to {_MOST:,}"
        )
    if colon and kind != COLOURS_FIRST:
        raise UsageError(f"{source}: {kind!r} is unknown; expected {DRAWINGS}:{count}:{COLOURS_FIRST}")
    for number in range(int(count)):
        draws = random.Random(f"{split or 'train'} {number}{colon}{kind}")
        yield draws, *draw_picture(draws, large=kind == COLOURS_FIRST)


def is_drawings(source: object) -> bool:
    """Whether a source is one of drawings."""
    return str(source).startswith(f"{DRAWINGS}:")

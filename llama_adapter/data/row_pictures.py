"""A row's pictures: the columns that name them, and the values that can stand for a picture."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from llama_adapter.common.errors import UsageError
from llama_adapter.data.values import kind_of

PictureFile = Path | bytes  # a file name, or the content of a file

PICTURE_COLUMNS = ("image", "images", "image_path", "image_paths")
# Folders from the hub name the picture in these. Elsewhere they are notes about a picture, or something else.
FILE_COLUMNS = ("file_name", "file_names", "image_file_name", "image_file_names", "image_url", "image_urls")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")


@dataclass(frozen=True)
class PictureColumns:
    """The pictures that a row's columns name, and the names of these columns."""

    files: tuple[PictureFile, ...]
    read: tuple[str, ...]


def read_picture_columns(row: Mapping[str, Any], root: Path) -> PictureColumns:
    """Read the pictures of a row's columns.

    Raises:
        UsageError: a value that is no picture, one that would have to be downloaded, or columns that differ.
    """
    filled = [name for name in PICTURE_COLUMNS if row.get(name) not in (None, [])]
    if not filled:
        filled = [name for name in FILE_COLUMNS if looks_like_a_picture(row.get(name), fetched=True)][:1]
    if not filled:
        return PictureColumns((), ())
    found = {name: tuple(_pictures(row[name], name, root)) for name in filled}
    first, *others = filled
    for name in others:
        if found[name] != found[first] and not isinstance(found[first][0], bytes):
            raise UsageError(f"fields {first!r} and {name!r} name different pictures; expected one of them")
    return PictureColumns(found[first], tuple(filled))


def _pictures(value: Any, column: str, root: Path) -> list[PictureFile]:
    values = value if isinstance(value, list) else [value]
    return [read_picture(one, column, root) for one in values]


def read_picture(value: Any, column: str, root: Path) -> PictureFile:
    """A picture's file, from a file name, a data URL, bytes, or the hub's object with bytes and path."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "path") if value.get(key)), value)
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise UsageError(f"field {column!r}: expected the name of a picture file, found {kind_of(value)}")
    kind = value[:8].lower()
    if kind.startswith("data:"):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except (binascii.Error, ValueError):
            raise UsageError(f"field {column!r}: the data URL is not valid base64") from None
    if kind.startswith(("http://", "https://")):
        raise UsageError(
            f"field {column!r}: {value:.60} is on the web, and pictures are not fetched; save it beside the "
            "data and give the file's name"
        )
    if kind.startswith("file://"):
        value = unquote(urlparse(value).path)
    return root / value


def looks_like_a_picture(value: Any, *, fetched: bool = False) -> bool:
    """Whether a value is a picture's content, or a file name that ends like one (`fetched`: or a URL)."""
    if isinstance(value, list):
        return bool(value) and all(looks_like_a_picture(one, fetched=fetched) for one in value)
    if isinstance(value, dict):
        return isinstance(value.get("bytes"), bytes) or looks_like_a_picture(value.get("path"))
    if not isinstance(value, str) or len(value) > 1000 or "\n" in value:
        return isinstance(value, str) and value.startswith("data:image/")
    if value.startswith("data:image/"):
        return True
    on_the_web = value.lower().startswith(("http://", "https://"))
    path = urlparse(value).path if on_the_web else value
    return path.lower().endswith(_SUFFIXES) and (fetched or not on_the_web)

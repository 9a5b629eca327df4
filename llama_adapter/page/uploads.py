"""A person's pictures: opened with care, scaled down, shown from Gradio's folder."""

from __future__ import annotations

import base64
import binascii
import io
import threading
from pathlib import Path
from typing import Any

from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from llama_adapter.common.errors import UsageError
from llama_adapter.data.pictures import open_picture

MAX_PICTURES = 8  # with one question
MAX_SIDE = 768  # pixels. Larger pictures are scaled down: a chat keeps them, and towers look at fewer pixels.
MAX_EXACT_URL = 60_000  # characters of a picture that is kept as it is; a larger one is kept as JPEG

# Decoding the largest pictures takes a few hundred MB each. Many at once could use up all memory.
_one_at_a_time = threading.Lock()


def open_given(given: Any) -> list[Image.Image]:
    """The pictures that came with a question: upright RGB images with sides of at most `MAX_SIDE`.

    Args:
        given: a picture or a list of them. Each is the path of an upload, ``{"path": that}`` as Gradio's
            clients send it, or a data URL. None for no picture.

    Raises:
        UsageError: something else, too many pictures, or one that `open_picture` refuses.
    """
    several = given if isinstance(given, list) else [] if given is None else [given]
    if len(several) > MAX_PICTURES:
        raise UsageError(f"{len(several)} pictures with one question; leave out all but {MAX_PICTURES}")
    return [_open(one) for one in several]


def picture_file(image: Image.Image) -> str:
    """The file that the page loads a picture from. It is written when first shown, or if it was deleted."""
    file: Path | None = image.info.get("file")
    if file is None or not (file.exists() and file.is_relative_to(get_upload_folder())):
        file = Path(save_pil_to_cache(image, get_upload_folder(), "picture", "png"))
        image.info["file"] = file  # not a string: strings would be written into the picture's file
    return str(file)


def kept_url(image: Image.Image) -> str:
    """A picture as a data URL that is small enough for a browser to keep. Made once for each picture."""
    known: tuple[str, ...] = image.info.get("kept", ())  # not a string: see `picture_file`
    if not known:
        url = data_url(image)
        if len(url) > MAX_EXACT_URL:
            content = io.BytesIO()
            image.save(content, "JPEG", quality=85)
            url = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
        known = image.info["kept"] = (url,)
    return known[0]


def thumbnail_url(image: Image.Image) -> str:
    """A small version of a picture as a data URL of a few kilobytes."""
    small = image.copy()
    small.thumbnail((160, 160))
    small.info.clear()
    return data_url(small)


def _open(given: Any) -> Image.Image:
    if isinstance(given, dict):
        given = given.get("path")
    if not isinstance(given, str):
        raise UsageError("an image has to be an uploaded file or a data URL")
    if given.startswith("data:"):
        content = _decode(given)
        return _small(content)
    path = _upload(given)
    try:
        return _small(path)
    except UsageError as error:
        # The message starts with the path of the upload on this machine. The person knows only its name.
        raise UsageError(f"{path.name}: {str(error).partition(': ')[2]}") from None


def _small(source: Path | bytes) -> Image.Image:
    with _one_at_a_time:
        image = open_picture(source)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image


def _upload(given: str) -> Path:
    """The path of an upload, with all links followed. No other file of this machine is opened."""
    try:
        path = Path(given).resolve()
        inside = path.is_relative_to(Path(get_upload_folder()).resolve())
    except (OSError, RuntimeError, ValueError):  # too long, a cycle of links, or a zero byte
        inside = False
    if not inside:
        raise UsageError(f"{given!r:.80} was not uploaded here; upload the picture, or send it as a data URL")
    return path


def _decode(url: str) -> bytes:
    kind, _, content = url.partition(",")
    try:
        if not kind.endswith(";base64"):
            raise ValueError
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("an image's data URL is damaged; expected data:image/...;base64,...") from None


def data_url(image: Image.Image) -> str:
    """A small picture as a data URL, so that the page needs no file for it."""
    content = io.BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"

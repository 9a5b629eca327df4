"""Reads GGUF files faster than gguf-py alone: only once for each load, and with plain arrays.

gguf-py makes two arrays for each word of the vocabulary, and slices of a mapped file are slow to make.
transformers opens the file anew for the config, for the tokenizer and for the weights. For the 150,000 words
and as many merges of Qwen, this took longer than all else together.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np

_LOCK = threading.Lock()
_contexts = 0  # how many `gguf_read_once` are open, in all threads
_readers: dict[tuple[Path, int, int], gguf.GGUFReader] = {}  # by path, time of change and size
_Reader = gguf.GGUFReader  # gguf-py's own


class PlainReader(_Reader):
    """A reader whose arrays are plain ones. They share the mapped file's memory."""

    _plain: np.ndarray[Any, Any] | None = None

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if self._plain is None:
            self._plain = np.asarray(self.data)
        end = offset + np.dtype(dtype).itemsize * int(count)
        found = self._plain[offset:end].view(dtype)
        return found.view(found.dtype.newbyteorder(override_order or self.byte_order))


def open_gguf(path: str | Path, mode: Literal["r", "r+", "c"] = "r") -> gguf.GGUFReader:
    """A reader of a GGUF file. Within `gguf_read_once`, the same one for the same file."""
    path = Path(path).resolve()
    if mode != "r":
        return _Reader(path, mode)
    state = path.stat()
    key = path, state.st_mtime_ns, state.st_size
    with _LOCK:
        if key in _readers:
            return _readers[key]
    reader = PlainReader(path)
    with _LOCK:
        if _contexts:
            _readers[key] = reader
    return reader


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """A context in which each GGUF file is read once, however often this library and transformers open it.

    transformers has no argument for a reader. So `open_gguf` takes the place of gguf-py's reader until the
    last context of all threads ends.
    """
    global _contexts
    with _LOCK:
        _contexts += 1
        vars(gguf)["GGUFReader"] = open_gguf
    try:
        yield
    finally:
        with _LOCK:
            _contexts -= 1
            if not _contexts:
                vars(gguf)["GGUFReader"] = _Reader
                _readers.clear()

"""Writing files and folders that are either complete or not there, whatever goes wrong on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_adapter.common.errors import DISK_FULL

if sys.platform != "win32":
    import fcntl


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`. When the body has written it, it is renamed to `path`.

    On success the file is flushed to the disk and then renamed in one step. After any exception, Ctrl-C
    included, `path` is unchanged and the temporary file is deleted. If `path` is a symbolic link, it stays
    one, and the file that it points to is replaced. A device or a pipe (/dev/stdout) can't be replaced, so it
    is yielded as it is.
    Raises OSError naming `path` if it can't be written or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        yield path
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _errors_naming(path, instead_of=temporary):
            yield temporary
            _flush_to_disk(temporary)
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically. Characters outside ASCII are written as they are."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_file(path: str | os.PathLike[str], *, each_block: Callable[[], None] = lambda: None) -> str:
    """The SHA-256 of a file's bytes, in lower-case hexadecimal. Calls `each_block` after each MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            each_block()
    return digest.hexdigest()


@contextmanager
def replace_folder(final: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder beside `final`. When the body has filled it, it becomes `final`.

    An earlier `final` is deleted with all its content, but only once the new one is complete. After any
    exception it is unchanged and the temporary folder is deleted. The next call removes what a killed process
    left behind. The caller must make sure that only one process at a time writes the same `final`.
    Raises OSError naming `final` if it can't be written, is a file, or the disk is full.
    """
    final = Path(os.path.realpath(final))
    temporary = final.with_name(f".{final.name}.tmp")
    replaced = final.with_name(f".{final.name}.old.tmp")
    if final.exists() and not final.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(final))

    def tidy() -> None:
        if replaced.exists() and not final.exists():  # stopped between the two renames below
            os.replace(replaced, final)
        for leftover in (temporary, replaced):
            if leftover.exists():
                shutil.rmtree(leftover)

    final.parent.mkdir(parents=True, exist_ok=True)
    with _errors_naming(final, instead_of=temporary):
        tidy()
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush_to_disk(file)
            if final.exists():
                os.replace(final, replaced)
            os.replace(temporary, final)
        finally:
            tidy()


@contextmanager
def _errors_naming(path: Path, *, instead_of: Path) -> Iterator[None]:
    """Turn a full disk, or an OSError that names the temporary path, into an OSError that names `path`."""
    try:
        yield
    except OSError as error:
        if str(error.filename) == str(instead_of) or error.errno in DISK_FULL:
            error.filename = str(path)
        raise
    except Exception as error:
        # safetensors and tokenizers are written in Rust: a full disk is no OSError there, but has this text.
        if f"(os error {errno.ENOSPC})" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _flush_to_disk(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def alone_in(folder: Path, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Lock a folder against other processes that ask for the same lock. Calls ``waiting`` before it waits.

    The lock ends with the process and leaves no file behind. Windows has no such lock: there it does nothing.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

"""Download pinned files over HTTP: several at once, with progress; an interrupted download is resumed."""

from __future__ import annotations

import os
import queue
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import requests
from requests.adapters import HTTPAdapter

from llama_adapter.common.files import sha256_file
from llama_adapter.common.progress import clock

SILENT_SECONDS = 5.0
"""A source that sends nothing for this long is given up."""
CONNECTIONS = 50  # at most, for one file whose connections break off but each brought something
BLOCK = 1 << 16  # bytes; an incomplete block is thrown away


class SourceError(Exception):
    """Why a source cannot give a file, in a few words. Another source may have it."""


@dataclass(frozen=True)
class Pinned:
    """A file to download, with the size and hash that it must have."""

    name: str
    sha256: str
    size: int  # bytes


class Session(requests.Session):
    """A requests session that trusts the system's certificates as well: a company's proxy may need them."""

    def __init__(self) -> None:
        super().__init__()
        self.mount("https://", _SystemCertificates())


class _SystemCertificates(HTTPAdapter):
    def init_poolmanager(self, *args: object, **kwargs: object) -> None:
        super().init_poolmanager(*args, ssl_context=ssl.create_default_context(), **kwargs)  # type: ignore[arg-type]


class Transfer:
    """What all threads of one download share: its progress, and whether to go on."""

    def __init__(self, total: int) -> None:
        """`total`: the size of all files together, in bytes."""
        self._total = total
        self._lock = threading.Lock()
        self._there = 0
        self._fresh = 0  # how many of these bytes this download brought
        self._started = self._active = time.monotonic()
        self.stopped = False

    def alive(self) -> None:
        """Record that something happened. Raises SourceError if the download has been given up."""
        self._active = time.monotonic()
        if self.stopped:
            raise SourceError("given up")

    def add(self, count: int, *, fresh: bool = True) -> None:
        """Count bytes: downloaded now (`fresh`) or by an earlier call. Negative if they must come again."""
        self.alive()
        with self._lock:
            self._there += count
            self._fresh += count if fresh else 0

    def silent_for(self) -> float:
        """Seconds since something last happened."""
        return time.monotonic() - self._active

    def line(self) -> str:
        """The progress line: bytes done, rate, time left."""
        rate = self._fresh / max(1e-9, time.monotonic() - self._started)
        left = clock((self._total - self._there) / rate) if rate > 0 else "?"
        return f"{self._there / 1e6:,.0f}/{self._total / 1e6:,.0f} MB  {rate / 1e6:.1f} MB/s  {left} left"


def run_together(jobs: Sequence[Callable[[Transfer], None]], total: int, show: Callable[[str], None]) -> None:
    """Run every job in a thread of its own until all are done; `show` gets progress lines.

    The first error ends all jobs; a SourceError or Ctrl-C is passed on. If nothing happens in any job for
    `SILENT_SECONDS`, they are given up as silent (a second later, since looking up a host name can't be
    interrupted).
    """
    transfer = Transfer(total)
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work(job: Callable[[Transfer], None]) -> None:
        try:
            job(transfer)
            ended.put(None)
        except BaseException as error:
            ended.put(error)

    try:
        for job in jobs:  # daemons: one that hangs in a host name look-up must not keep the process alive
            threading.Thread(target=work, args=(job,), daemon=True).start()
        running = len(jobs)
        while running:
            if transfer.silent_for() > SILENT_SECONDS + 1:
                raise SourceError(f"silent for {SILENT_SECONDS:g} seconds")
            show(transfer.line())
            with suppress(queue.Empty):
                if error := ended.get(timeout=0.1):
                    raise error
                running -= 1
    finally:
        transfer.stopped = True


def download(session: Session, url: str, pinned: Pinned, path: Path, transfer: Transfer) -> None:
    """Download `url` to `path` and check it. Goes on from the part that an earlier call left in `path`.part.

    `url` may be a file: URL. A broken connection is resumed as long as each new one brings something.
    Raises SourceError: not found, silent, broken off, or not the pinned file. In the last case nothing is
    kept.
    """
    part = path.with_name(f"{path.name}.part")
    if urlsplit(url).scheme == "file":
        _copy(Path(url2pathname(urlsplit(url).path)), pinned, part, transfer)
        _check(part, pinned, transfer)
    else:
        if _size(part) > pinned.size:
            part.unlink()
        resumed = part.exists()
        transfer.add(_size(part), fresh=False)
        _receive_all(session, url, pinned, part, transfer)
        try:
            _check(part, pinned, transfer)
        except SourceError:
            if not resumed:
                raise
            # The part from the earlier call may be the cause.
            transfer.add(-pinned.size, fresh=False)
            _receive_all(session, url, pinned, part, transfer)
            _check(part, pinned, transfer)
    os.replace(part, path)


def _copy(source: Path, pinned: Pinned, part: Path, transfer: Transfer) -> None:
    with ExitStack() as stack:
        try:
            original = stack.enter_context(open(source, "rb"))
        except OSError as error:
            raise SourceError(f"{source}: {error.strerror}") from None
        size = os.fstat(original.fileno()).st_size
        if size != pinned.size:
            raise SourceError(_other_size(pinned, size))
        file = stack.enter_context(open(part, "wb"))
        while block := original.read(BLOCK):
            file.write(block)
            transfer.add(len(block))


def _receive_all(session: Session, url: str, pinned: Pinned, part: Path, transfer: Transfer) -> None:
    for _ in range(CONNECTIONS):
        before = _size(part)
        if before == pinned.size:
            return
        try:
            _receive(session, url, pinned, part, transfer)
            return
        except requests.exceptions.RequestException as error:
            broke_off = isinstance(
                error, (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError)
            )
            if not broke_off or _is_timeout(error) or _size(part) <= before:
                raise SourceError(f"{pinned.name}: {plain_reason(error)}") from None
    raise SourceError(f"{pinned.name}: broke off {CONNECTIONS} times")


def _receive(session: Session, url: str, pinned: Pinned, part: Path, transfer: Transfer) -> None:
    """Read from one connection: append what is missing of the file to `part`."""
    there = _size(part)
    headers = {"Accept-Encoding": "identity"}
    if there:
        headers["Range"] = f"bytes={there}-"
    with session.get(url, headers=headers, stream=True, timeout=SILENT_SECONDS) as response:
        transfer.alive()
        status = response.status_code
        if status not in (200, 206) and not (there and status == 416):
            raise SourceError(f"{pinned.name}: answered {status} {response.reason}")
        given = response.headers.get("Content-Range", "")
        if there and not (status == 206 and given.startswith(f"bytes {there}-")):
            transfer.add(-there, fresh=False)  # the server sends the file from its start, or another piece
            there = 0
            part.unlink()
            if status != 200:
                return _receive(session, url, pinned, part, transfer)
        length = response.headers.get("Content-Length", "")
        as_it_is = "Content-Encoding" not in response.headers
        if as_it_is and length.isdigit() and there + int(length) != pinned.size:
            raise SourceError(_other_size(pinned, there + int(length)))
        with open(part, "ab", buffering=0) as file:
            for block in response.iter_content(BLOCK):
                there += len(block)
                if there > pinned.size:
                    break
                file.write(block)
                transfer.add(len(block))
    if there > pinned.size:
        part.unlink()
        raise SourceError(_other_size(pinned, there, at_least=True))
    if there < pinned.size:
        raise requests.exceptions.ConnectionError(f"broke off after {there:,} of {pinned.size:,} bytes")


def _check(part: Path, pinned: Pinned, transfer: Transfer) -> None:
    digest = sha256_file(part, each_block=transfer.alive)
    if digest != pinned.sha256:
        part.unlink()
        raise SourceError(
            f"{pinned.name} has sha256 {digest}, expected {pinned.sha256}: refused, nothing kept"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _other_size(pinned: Pinned, size: int, *, at_least: bool = False) -> str:
    more = "at least " if at_least else ""
    return f"{pinned.name} has {more}{size:,} bytes, expected {pinned.size:,}: another file, refused"


def _is_timeout(error: BaseException) -> bool:
    """Whether the error is a time-out. While reading, requests reports one as a connection error."""
    return isinstance(error, requests.exceptions.Timeout) or "timed out" in str(error)


def plain_reason(error: requests.exceptions.RequestException) -> str:
    """The innermost cause of one of requests' errors, without the wrapping."""
    if _is_timeout(error):
        return f"silent for {SILENT_SECONDS:g} seconds"
    inner: BaseException = error
    while True:
        wrapped = getattr(inner, "reason", None) or (inner.args[0] if inner.args else None)
        if not isinstance(wrapped, BaseException):
            break
        inner = wrapped
    return str(inner).rpartition("object at 0x")[2].partition(">: ")[2] or str(inner)

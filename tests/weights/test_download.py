from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import pytest

from llama_adapter.weights import download as module
from llama_adapter.weights.download import Pinned, Session, SourceError, Transfer, download, run_together

CONTENT = b"some weights"
PINNED = Pinned("weights.bin", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


def test_what_hangs_without_a_word_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as the look-up of a host name does, which has no time limit."""
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.1)
    end = threading.Event()

    def hangs(_: Transfer) -> None:
        end.wait(60)

    with pytest.raises(SourceError, match=r"silent for 0\.1 seconds"):
        run_together([hangs], 10, lambda _: None)
    end.set()


def test_the_first_error_stops_the_others() -> None:
    stopped = threading.Event()

    def goes_on(transfer: Transfer) -> None:
        try:
            while True:
                transfer.add(1)
                time.sleep(0.001)
        except SourceError:
            stopped.set()

    def fails(_: Transfer) -> None:
        raise SourceError("no such file")

    with pytest.raises(SourceError, match="no such file"):
        run_together([goes_on, fails], 10, lambda _: None)
    assert stopped.wait(60)


def test_ctrl_c_stops_all() -> None:
    stopped = threading.Event()

    def goes_on(transfer: Transfer) -> None:
        try:
            while True:
                transfer.alive()
                time.sleep(0.001)
        except SourceError:
            stopped.set()

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_together([goes_on], 10, interrupt)
    assert stopped.wait(60)


def test_a_line_says_how_far_it_is() -> None:
    transfer = Transfer(500_000_000)
    assert transfer.line().startswith("0/500 MB  0.0 MB/s  ? left")
    transfer.add(100_000_000, fresh=False)  # from an earlier call: it does not count for the rate
    assert transfer.line().startswith("100/500 MB  0.0 MB/s  ? left")
    transfer.add(200_000_000)
    assert transfer.line().startswith("300/500 MB  ") and transfer.line().endswith(" left")


def test_a_file_on_disk_is_copied_and_checked(tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "here"
    source.write_bytes(CONTENT)
    download(Session(), source.as_uri(), PINNED, path, Transfer(len(CONTENT)))
    assert path.read_bytes() == CONTENT and sorted(tmp_path.iterdir()) == [path, source]
    for content, reason in ((CONTENT[::-1], "sha256"), (CONTENT[1:], "11 bytes, expected 12")):
        source.write_bytes(content)
        with pytest.raises(SourceError, match=reason):
            download(Session(), source.as_uri(), PINNED, tmp_path / "other", Transfer(len(CONTENT)))
    source.unlink()
    with pytest.raises(SourceError, match="No such file"):
        download(Session(), source.as_uri(), PINNED, tmp_path / "other", Transfer(len(CONTENT)))
    assert sorted(tmp_path.iterdir()) == [path]

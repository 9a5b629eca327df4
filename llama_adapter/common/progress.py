"""One line on standard error that shows how far a long task has come."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """A progress line: overwritten in place on a terminal, printed every half minute in a log."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._shown = time.monotonic() - 25  # so that the first line in a log comes after five seconds

    def show(self, line: str) -> None:
        """Show a line that the next one replaces."""
        now = time.monotonic()
        if self._live and now - self._shown > 0.2:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
            self._shown = now
        elif not self._live and now - self._shown > 30:
            self.say(line)
            self._shown = now

    def say(self, line: str) -> None:
        """Print a line that stays."""
        print(f"\r\033[K{line}" if self._live else line, file=sys.stderr, flush=True)


class RowProgress:
    """Progress over a known number of rows: count, rate and time left. Call it with the rows done so far."""

    def __init__(self, what: str, rows: int) -> None:
        self._what, self._rows = what, rows
        self._line = ProgressLine()
        self._started = time.monotonic()

    def __call__(self, done: int) -> None:
        rate = done / max(1e-9, time.monotonic() - self._started)
        left = clock((self._rows - done) / rate) if done else "?"
        text = f"{self._what}: {done:,}/{self._rows:,} rows  {rate:.1f} rows/s  {left} left"
        (self._line.say if done == self._rows else self._line.show)(text)


def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds, such as 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"

"""How a command ends: a user's mistake is told in one line, a bug keeps its traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

# The disk, or the user's share of it, is used up.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


# Packages that only some commands need, and the extra of this package that installs each.
EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "easy_vqa": "eval",
    "gradio": "demo",
    "matplotlib": "eval",
    "pycocoevalcap": "eval",
    "tensorboard": "train",
}


class UsageError(ValueError):
    """A user's mistake, told in one line: what was given, what was expected, what to do about it."""


def run_command(main: Callable[[], int | None]) -> int:
    """Run `main` as a command and return its exit code. Every entry point ends through here.

    Returns what `main` returns (None is 0); 2 after a `UsageError`, a full disk, a path that can't be used or
    a package of an extra that is not installed, each told in one line on standard error; 130 after Ctrl-C;
    141 when the reader of standard output went away. Any other exception is a bug and goes through with its
    traceback.
    """
    try:
        code = main() or 0
        sys.stdout.flush()  # a reader that went away must show here, not in the interpreter's last flush
        return code
    except UsageError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _refuse(f"this needs {package}: run `pip install 'llama-adapter[{EXTRAS[package]}]'`")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Otherwise the interpreter flushes what is left at exit and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno in DISK_FULL:
            where = f" while writing {error.filename}" if error.filename else ""
            return _refuse(f"the disk is full{where}: free some space and try again")
        if error.filename is None:  # not about a path, so nothing the user gave
            raise
        return _refuse(f"{error.filename}: {error.strerror}")


def _refuse(message: str) -> int:
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    return 2

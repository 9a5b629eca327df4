"""How commands end: a user's mistake prints one line, a bug prints its traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

# The errors for a full disk and for a user's full quota.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


# Packages that only some commands need, each with the extra of llama-adapter that installs it.
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
    """A user's mistake. The message is one line: what was given, what was expected, what to do about it."""


def run_command(main: Callable[[], int | None]) -> int:
    """Run `main` as a command and return the exit code. Every entry point uses this.

    The code is what `main` returns (None counts as 0). It is 2 after a `UsageError`, a full disk, a path that
    can't be used or a missing package of an extra; each prints one line on standard error. It is 130 after
    Ctrl-C, and 141 when the program that reads standard output has closed it. Any other exception is a bug:
    it is passed on with its traceback.
    """
    try:
        code = main() or 0
        sys.stdout.flush()  # so that a closed output raises here, not when the interpreter exits
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
        # Otherwise the interpreter tries to flush the rest at exit and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno in DISK_FULL:
            where = f" while writing {error.filename}" if error.filename else ""
            return _refuse(f"the disk is full{where}: free some space and try again")
        if error.filename is None:  # not about a path, so not about anything the user gave
            raise
        return _refuse(f"{error.filename}: {error.strerror}")


def _refuse(message: str) -> int:
    print("error:", " ".join(message.splitlines()), file=sys.stderr)
    return 2

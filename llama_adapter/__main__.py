"""The console command llama-adapter. `python -m llama_adapter` is the same."""

from __future__ import annotations

import sys

from llama_adapter.common.errors import run_command


def main() -> int:
    """Run the command line and return its exit code."""

    def run() -> None:
        from llama_adapter.commands import console  # from here on Ctrl-C and a full disk print one line

        console.run()

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())

"""python -m demo: see `llama_adapter.commands.demo`."""

import sys

from llama_adapter.commands.demo import main
from llama_adapter.common.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))

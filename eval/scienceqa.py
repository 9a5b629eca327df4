"""python -m eval.scienceqa: see `llama_adapter.commands.eval_scienceqa`."""

import sys

from llama_adapter.commands.eval_scienceqa import main
from llama_adapter.common.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))

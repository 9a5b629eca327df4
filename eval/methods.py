"""python -m eval.methods: see `llama_adapter.commands.eval_methods`."""

import sys

from llama_adapter.commands.eval_methods import main
from llama_adapter.common.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))

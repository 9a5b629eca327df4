"""python -m train.shipped: see `llama_adapter.commands.train_shipped`."""

import sys

from llama_adapter.commands.train_shipped import main
from llama_adapter.common.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))

"""python -m train.vqa: see `llama_adapter.commands.train_vqa`."""

import sys

from llama_adapter.commands.train_vqa import main
from llama_adapter.common.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))

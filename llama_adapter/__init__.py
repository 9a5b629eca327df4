"""LLaMA-Adapter: a frozen decoder learns to follow instructions by training a million parameters.

from llama_adapter import LlamaAdapter

model = LlamaAdapter.from_pretrained()
print(model.chat("Give three tips for staying healthy."))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_adapter.answering.conversation import Conversation
    from llama_adapter.data.templates import Turn
    from llama_adapter.decoding.question import Question
    from llama_adapter.decoding.sampling import Sampling
    from llama_adapter.model import LlamaAdapter
    from llama_adapter.training.recipes import train
    from llama_adapter.training.settings import TrainingSettings

__all__ = [
    "Conversation",
    "LlamaAdapter",
    "Question",
    "Sampling",
    "TrainingSettings",
    "Turn",
    "__version__",
    "train",
]

# Imported on first use: torch and transformers take seconds to import, and `llama-adapter --help` does not
# need them.
_MODULES = {
    "Conversation": "answering.conversation",
    "LlamaAdapter": "model",
    "Question": "decoding.question",
    "Sampling": "decoding.sampling",
    "TrainingSettings": "training.settings",
    "Turn": "data.templates",
    "train": "training.recipes",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("llama-adapter")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""A line about the size of the model and its limits, so that nobody expects too much of it."""

from __future__ import annotations

from pathlib import Path

from llama_adapter.model import NO_ADAPTER, LlamaAdapter
from llama_adapter.quantization.linear import count_weights

# The limits of a decoder with fewer parameters than this: with text, and with pictures.
_LIMITS = (
    (
        1e9,
        "So small a model is often wrong about facts, sums and counts, and loses the thread of long texts",
        "It gets the gist of a picture, and often mistakes colours and counts.",
    ),
    (
        1e10,
        "It can be wrong about facts, and in questions that take several steps",
        "It gets the gist of a picture, not its fine print.",
    ),
    (float("inf"), "It can be wrong", "It gets the gist of a picture, not its fine print."),
)


def describe_limits(model: LlamaAdapter, adapter: str) -> str:
    """The size of the base and of an adapter, and their limits."""
    size = count_weights(model.decoder)
    parts = f"{Path(str(model.base)).name} has {_count(size)} parameters"
    asked = {model.answering_adapter(adapter, pictured=pictured) for pictured in (False, True)} - {NO_ADAPTER}
    if asked:
        trained = sum(p.numel() for name in asked for p in model.get_adapter(name).parameters())
        parts += f", {'this adapter' if len(asked) == 1 else 'the two adapters'} {_count(trained)} more"
    limits, sight = next(texts for below, *texts in _LIMITS if size < below)
    if not model.sees(adapter):
        sight = "It does not see pictures."
    return f"{parts}. {limits}: check what matters. {sight}"


def _count(number: int) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:,}"

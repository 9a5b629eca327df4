"""Checks of input from outside: the length of texts, and that numbers are numbers."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from llama_adapter.common.errors import UsageError
from llama_adapter.decoding.sampling import Sampling

MAX_CHARACTERS = 8000  # of a message
MAX_MESSAGES = 100  # of a history
MAX_NEW_TOKENS = 1024  # so that one answer does not keep the others waiting too long


def check_length(text: Any) -> str:
    """A message, unchanged. Raises UsageError if it is too long or not text."""
    if not isinstance(text, str):
        raise UsageError(f"a message is no text but {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise UsageError(f"a message has {len(text):,} characters; shorten it to {MAX_CHARACTERS:,}")
    return text


def read_sampling(
    temperature: Any, top_p: Any, top_k: Any, repetition_penalty: Any, max_new_tokens: Any, seed: Any
) -> Sampling:
    """The settings for decoding. Raises UsageError for a value that is no number or out of its range."""
    sampling = Sampling(
        temperature=_number("temperature", temperature, float),
        top_p=_number("top-p", top_p, float),
        top_k=_number("top-k", top_k, int),
        repetition_penalty=_number("repetition-penalty", repetition_penalty, float),
        max_new_tokens=_number("max-new-tokens", max_new_tokens, int),
        seed=None if seed in (None, "") else _number("seed", seed, int),
    )
    if sampling.max_new_tokens > MAX_NEW_TOKENS:
        raise UsageError(f"max-new-tokens is {max_new_tokens}; expected at most {MAX_NEW_TOKENS}")
    return sampling


def _number(name: str, value: Any, kind: type) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{name} is {value!r:.40}; expected a number") from None


def warn(error: UsageError) -> None:
    """Show the person what is wrong.

    The text may quote their input, and Gradio reads it as HTML: escape it.
    """
    gr.Warning(html.escape(str(error)), title="")

"""What comes from outside is read with suspicion: no text is too long, and a number is one."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from llama_adapter.common.errors import UsageError
from llama_adapter.decoding.sampling import Sampling

MAX_CHARACTERS = 8000  # of a message
MAX_MESSAGES = 100  # of a history
MAX_NEW_TOKENS = 1024  # one answer shall not keep the others waiting for ever


def check_length(text: Any) -> str:
    """A message, as it is. Raises UsageError for one that is too long or no text."""
    if not isinstance(text, str):
        raise UsageError(f"a message is no text but {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise UsageError(f"a message has {len(text):,} characters; shorten it to {MAX_CHARACTERS:,}")
    return text


def read_sampling(
    temperature: Any, top_p: Any, top_k: Any, repetition_penalty: Any, max_new_tokens: Any, seed: Any
) -> Sampling:
    """The settings for the decoding. Raises UsageError for what is no number or out of its range."""
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
    """Tell the person what is wrong. The text may quote them, and Gradio takes it for HTML."""
    gr.Warning(html.escape(str(error)), title="")

"""Prepares text for the page: Markdown is kept, and HTML is shown as plain text.

Gradio's chat reads every message as Markdown with HTML. So whatever would start a tag, an entity, a picture
or a diagram gets an invisible character in the middle, which makes it ordinary text. Code without a fence
gets one. The page's script removes both from the clipboard.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from llama_adapter.answering.conversation import Conversation, Exchange
from llama_adapter.model import NO_ADAPTER
from llama_adapter.page.code_blocks import fence_code, unfence
from llama_adapter.page.uploads import picture_file

JOINER = "\u2060"  # word joiner: no width, no line break
NOTE = "\u2063"  # invisible separator: the text after it was not written by the model
# Tags; entities; pictures, which a browser would load from anywhere; fences whose content would be drawn.
_MEANING = re.compile(r"<|&|!(?=\[)|[`~]{3,}\s*(?=mermaid)", re.IGNORECASE)

Message = dict[str, Any]


@lru_cache(maxsize=1024)  # for each piece of an answer the whole chat is drawn again
def shown(text: str) -> str:
    """The text in a form that is safe in the page's Markdown."""
    return _MEANING.sub(rf"\g<0>{JOINER}", fence_code(text, JOINER))


def typed(text: str) -> str:
    """The text that `shown` was given, for a message that comes back from the page."""
    return unfence(text, JOINER).replace(JOINER, "")


def named(adapter: str) -> str:
    """An adapter's name as shown to people."""
    return "bare base" if adapter == NO_ADAPTER else adapter


def messages(conversation: Conversation, *, waiting: bool = False) -> list[Message]:
    """A conversation in the form of Gradio's chat, two messages for each exchange.

    ``waiting`` means that the latest question is being answered. Before its first word, the answer has no
    message, and Gradio shows its moving dots there.
    """
    look: list[Message] = []
    for exchange in conversation.exchanges:
        question = _message("user", exchange.question.text)
        question["content"][:0] = [{"path": picture_file(image)} for image in exchange.images]
        look.append(question)
        latest = exchange is conversation.exchanges[-1]
        look.extend(answer_messages(exchange, waiting=waiting and latest))
    return look


def answer_messages(exchange: Exchange, *, waiting: bool = False) -> list[Message]:
    """An answer as a chat of its own. A note below it says who gave it, how long it took, why it ended early
    if it did, and what it was made without."""
    answer = exchange.answer
    if waiting and not answer.text:
        return []
    message = _message("assistant", answer.text or "(no answer)")
    message["content"].append({"type": "text", "text": NOTE + shown(" · ".join(_facts(exchange)))})
    return [message]


def note_message(text: str) -> list[Message]:
    """A note of the page itself, in the place of an answer."""
    return [{"role": "assistant", "content": [{"type": "text", "text": NOTE + shown(text)}]}]


def _facts(exchange: Exchange) -> Iterator[str]:
    answer = exchange.answer
    yield f"{answer.tokens} token{'' if answer.tokens == 1 else 's'}"
    yield f"{answer.tokens_per_second:.1f} tokens/s"
    yield named(exchange.adapter)
    if answer.finish_reason == "length":
        yield "cut off at the length limit"
    if answer.finish_reason == "closed":
        yield "stopped"
    if exchange.unseen:
        yield "made without the picture"
    if exchange.dropped:
        yield f"the conversation's first {2 * exchange.dropped} messages no longer fit"


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "text": shown(text)}]}


def pace(pieces: Iterable[Any], *, seconds: float = 0.05) -> Iterator[None]:
    """Go through the pieces, and yield between them, but not after each: sending takes time."""
    due = 0.0
    for _ in pieces:
        if time.monotonic() >= due:
            yield
            due = time.monotonic() + seconds

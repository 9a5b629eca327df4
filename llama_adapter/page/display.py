"""How the text of a person or a model gets onto the page: as Markdown, with its HTML as plain text.

Gradio's chat takes every message for Markdown with HTML in it. What would start a tag, an entity, a picture
or a diagram gets an invisible character in the middle, which takes the meaning away. Code without a fence
gets one. The page's script keeps both off the clipboard.
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
NOTE = "\u2063"  # invisible separator: what follows was not said by the model
# Tags, entities; pictures, which a browser would fetch from anywhere; fences whose content would be drawn.
_MEANING = re.compile(r"<|&|!(?=\[)|[`~]{3,}\s*(?=mermaid)", re.IGNORECASE)

Message = dict[str, Any]


@lru_cache(maxsize=1024)  # a growing answer has the whole chat drawn again at every piece
def shown(text: str) -> str:
    """Text as the page's Markdown may have it."""
    return _MEANING.sub(rf"\g<0>{JOINER}", fence_code(text, JOINER))


def typed(text: str) -> str:
    """What `shown` was made from, for a message that comes back from the page."""
    return unfence(text, JOINER).replace(JOINER, "")


def named(adapter: str) -> str:
    """An adapter's name as people read it."""
    return "bare base" if adapter == NO_ADAPTER else adapter


def messages(conversation: Conversation, *, waiting: bool = False) -> list[Message]:
    """A conversation as Gradio's chat has it, two messages an exchange.

    ``waiting`` is for the time in which the latest question is answered: before its first word, the answer's
    place is left to Gradio's moving dots.
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
    """An answer as a chat of its own. Under it stands who gave it, how long it took, why it ended where
    that was not by itself, and what it was made without."""
    answer = exchange.answer
    if waiting and not answer.text:
        return []
    message = _message("assistant", answer.text or "(no answer)")
    message["content"].append({"type": "text", "text": NOTE + shown(" · ".join(_facts(exchange)))})
    return [message]


def note_message(text: str) -> list[Message]:
    """In the place of an answer, what the page itself has to say."""
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
    """Go through the pieces and come up for air between them, but not for each: sending takes its time."""
    due = 0.0
    for _ in pieces:
        if time.monotonic() >= due:
            yield
            due = time.monotonic() + seconds

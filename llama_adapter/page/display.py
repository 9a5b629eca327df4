"""How the text of a person or a model gets onto the page: as Markdown, its HTML as the text that it is.

Gradio's chat takes every message for Markdown with HTML in it. What would start a tag, an entity, a picture
or a diagram there gets an invisible character in the middle, which takes the meaning away and can't be
seen. The page's script keeps it off the clipboard.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

from llama_adapter.answering.conversation import Conversation, Exchange
from llama_adapter.model import NO_ADAPTER
from llama_adapter.page.uploads import picture_file

_JOINER = "\u2060"  # word joiner: no width, no line break
_NOTE = "\u2063"  # invisible separator: what follows was not said by the model
# Tags, entities; pictures, which a browser would fetch from anywhere; fences whose content would be drawn.
_MEANING = re.compile(r"<|&|!(?=\[)|[`~]{3,}\s*(?=mermaid)", re.IGNORECASE)

SCRIPT = f"""
const spoken = text => text
    .replace(/\\n*(assistant: )?{_NOTE}.*/g, "")
    .replace(/^user: http\\S+\\/file=\\S+\\/picture\\.png$/gm, "user: (a picture)")
    .replaceAll("{_JOINER}", "");
document.addEventListener("copy", event => {{
    const selected = String(getSelection());
    if (spoken(selected) !== selected) {{
        event.clipboardData.setData("text/plain", spoken(selected));
        event.preventDefault();
    }}
}});
if (navigator.clipboard) {{
    const write = navigator.clipboard.writeText.bind(navigator.clipboard);
    navigator.clipboard.writeText = text => write(spoken(text));
}}
"""

Message = dict[str, Any]


def shown(text: str) -> str:
    """Text as the page's Markdown may have it."""
    return _MEANING.sub(rf"\g<0>{_JOINER}", text)


def typed(text: str) -> str:
    """What `shown` was made from, for a message that comes back from the page."""
    return text.replace(_JOINER, "")


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
        if exchange is conversation.exchanges[-1]:
            dropped, unseen = conversation.dropped, conversation.unseen
            look.extend(answer_messages(exchange, waiting=waiting, dropped=dropped, unseen=unseen))
        else:
            look.extend(answer_messages(exchange))
    return look


def answer_messages(
    exchange: Exchange, *, waiting: bool = False, dropped: int = 0, unseen: bool = False
) -> list[Message]:
    """An answer as a chat of its own, and under it who gave it, its length and its speed.

    ``dropped`` and ``unseen`` are what it was made without, as `Conversation` has them.
    """
    answer = exchange.answer
    if waiting and not answer.text:
        return []
    parts = [
        f"{answer.tokens} token{'' if answer.tokens == 1 else 's'}",
        f"{answer.tokens_per_second:.1f} tokens/s",
        "bare base" if exchange.adapter == NO_ADAPTER else exchange.adapter,
    ]
    if unseen:
        parts.append("made without the picture")
    if dropped:
        parts.append(f"the conversation's first {2 * dropped} messages no longer fit")
    message = _message("assistant", answer.text or "(no answer)")
    message["content"].append({"type": "text", "text": _NOTE + shown(" · ".join(parts))})
    return [message]


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "text": shown(text)}]}


def pace(pieces: Iterable[Any], *, seconds: float = 0.05) -> Iterator[None]:
    """Go through the pieces and come up for air between them, but not for each: sending takes its time."""
    due = 0.0
    for _ in pieces:
        if time.monotonic() >= due:
            yield
            due = time.monotonic() + seconds

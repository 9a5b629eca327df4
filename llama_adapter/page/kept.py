"""A person's chats as JSON: what their browser keeps, and what they save as a file.

Nothing is stored on this machine. Whatever a browser sends back is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from llama_adapter.answering.conversation import Exchange
from llama_adapter.common.errors import UsageError
from llama_adapter.data.templates import Turn, question_turn
from llama_adapter.decoding.answer import Answer, Progress
from llama_adapter.page.chats import MAX_CHATS, Chat, Chats, NewConversation
from llama_adapter.page.display import named
from llama_adapter.page.uploads import kept_url, open_given

VERSION = 1
# A browser stores 5 million characters for a page, and Gradio's encryption adds a third.
MAX_KEPT = 2_500_000
_MAX_TEXT = 100_000  # characters of one message
_FINISH_REASONS = ("stop", "length", "closed")

Kept = dict[str, Any]


def pack(chats: Chats) -> Kept:
    """All chats and the chosen expert, for the browser to keep.

    The oldest chats are left out if there is no room for them. `Chats.left_out` says how many.
    """
    kept: list[Kept] = []
    used = 0
    for chat in chats.all:
        packed = pack_chat(chat)
        used += len(json.dumps(packed))
        if used > MAX_KEPT:
            break
        kept.append(packed)
    chats.left_out = len(chats.all) - len(kept)
    return {"version": VERSION, "adapter": chats.adapter, "open": chats.open.key, "chats": kept}


def pack_chat(chat: Chat) -> Kept:
    """One chat: its messages in OpenAI's form. Each answer has its facts."""
    messages: list[Kept] = []
    for exchange in chat.conversation.exchanges:
        answer = exchange.answer
        asked: Kept = {"role": "user", "content": exchange.question.text}
        if exchange.images:
            asked["images"] = [kept_url(image) for image in exchange.images]
        messages.append(asked)
        messages.append(
            {
                "role": "assistant",
                "content": answer.text,
                "adapter": exchange.adapter,
                "tokens": answer.tokens,
                "seconds": answer.seconds,
                "finish_reason": answer.finish_reason or "closed",
                "unseen": exchange.unseen,
                "dropped": exchange.dropped,
            }
        )
    return {"key": chat.key, "system": chat.conversation.system, "messages": messages}


def unpack(kept: Any, new: NewConversation) -> Chats:
    """The chats that a browser kept. None if it kept none.

    Raises:
        UsageError: something that `pack` does not make.
    """
    chats = Chats(new)
    if kept is None:
        return chats
    if _read(kept, "version", int) != VERSION:
        raise UsageError("the chats that this browser kept are of another version")
    chats.all = [_unpack_chat(each, new) for each in _read(kept, "chats", list)[:MAX_CHATS]] or chats.all
    chats.open = chats.all[0]
    chats.choose(_read(kept, "open", str))
    if kept.get("adapter") is not None:
        chats.adapter = _read(kept, "adapter", str)
    return chats


def _unpack_chat(kept: Any, new: NewConversation) -> Chat:
    conversation = new()
    conversation.system = _read(kept, "system", str)
    messages = _read(kept, "messages", list)
    if len(messages) % 2:
        raise UsageError("a chat that this browser kept has a question without an answer")
    for asked, said in zip(messages[::2], messages[1::2], strict=True):
        made = Progress(
            Turn("assistant", _read(said, "content", str)).text,
            tokens=_read(said, "tokens", int),
            seconds=float(_read(said, "seconds", (int, float))),
            finish_reason=_read(said, "finish_reason", str),
        )
        answer = Answer(iter(()), so_far=made)
        if answer.finish_reason not in _FINISH_REASONS:
            raise UsageError("an answer that this browser kept does not say why it ended")
        exchange = Exchange(
            question=question_turn(_read(asked, "content", str)),
            answer=answer,
            adapter=_read(said, "adapter", str),
            images=tuple(open_given(asked.get("images"))),
            unseen=_read(said, "unseen", bool),
            dropped=min(max(_read(said, "dropped", int), 0), len(conversation.exchanges)),
        )
        conversation.restore(exchange)
    return Chat(conversation, _read(kept, "key", str))


def _read(kept: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    value = kept.get(name) if isinstance(kept, dict) else None
    if not isinstance(value, kind) or (isinstance(value, str) and len(value) > _MAX_TEXT):
        raise UsageError(f"the chats that this browser kept have no readable {name!r}")
    return value


# --- files --------------------------------------------------------------------------------------------------


def as_json(chat: Chat) -> dict[str, str]:
    """A chat as a JSON file: its name and its text."""
    return {"name": f"{_file_name(chat)}.json", "text": json.dumps(pack_chat(chat), indent=2)}


def as_markdown(chat: Chat) -> dict[str, str]:
    """A chat as a Markdown file with its pictures: its name and its text."""
    text = "\n\n".join([f"# {chat.title}", *_paragraphs(chat)])
    return {"name": f"{_file_name(chat)}.md", "text": f"{text}\n"}


def _paragraphs(chat: Chat) -> Iterator[str]:
    if chat.conversation.system.strip():
        yield f"*System text:* {chat.conversation.system}"
    for exchange in chat.conversation.exchanges:
        yield "## Question"
        for number, image in enumerate(exchange.images, start=1):
            yield f"![picture {number}]({kept_url(image)})"
        yield exchange.question.text
        yield f"## Answer of {named(exchange.adapter)}"
        ends = {"length": " *(cut off at the length limit)*", "closed": " *(stopped)*"}
        reason = exchange.answer.finish_reason or "closed"
        yield f"{exchange.answer.text}{ends.get(reason, '')}"
        if exchange.unseen:
            yield "*(made without the picture)*"


def _file_name(chat: Chat) -> str:
    return re.sub(r"[^a-z0-9]+", "-", chat.title.lower()).strip("-") or "chat"

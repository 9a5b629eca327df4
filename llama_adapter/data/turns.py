"""A turn of a conversation, and the order that turns must have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_adapter.common.errors import UsageError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Raises UsageError for an unknown role, and for text that is not valid Unicode.

    Attributes:
        role: "system", "user" or "assistant".
        input: Alpaca's second field: what a user's instruction is about. Empty for most turns.
        learnt: whether training learns an assistant's turn. If False, it is context only.
    """

    role: str
    text: str
    input: str = ""
    learnt: bool = True

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(f"role is {self.role!r}; expected one of {', '.join(ROLES)}")
        check_unicode(self.text)
        check_unicode(self.input)


def question_turn(text: str) -> Turn:
    """A user's question as a turn. Raises UsageError if it is empty or not text."""
    if not text.strip():
        raise UsageError("the question is empty; type one")
    if "\0" in text:
        place = text.index("\0") + 1
        raise UsageError(f"the question is not text: character {place} is a zero byte")
    return Turn("user", text)


def check_unicode(text: str) -> None:
    """Raise UsageError for text that no tokenizer accepts. JSON and command lines can contain such text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"half of a surrogate pair at character {error.start + 1:,}"
        raise UsageError(f"the text is not valid Unicode: {place}") from None


def in_order(turns: Sequence[Turn]) -> bool:
    """Whether `turns` are a conversation: perhaps a system turn, then user and assistant in alternation."""
    roles = [turn.role for turn in turns]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    return bool(roles) and all(role == ("user", "assistant")[i % 2] for i, role in enumerate(roles))


# Questions that a caption can answer. Training uses them in turn; scoring uses the first.
CAPTION_QUESTIONS = (
    "Describe the picture.",
    "What is in this picture?",
    "What does the picture show?",
    "Write a caption for this photo.",
)

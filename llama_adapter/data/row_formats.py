"""A row of data -> its conversations and its pictures. docs/formats.md has the tables.

Nothing that carries meaning is dropped silently. A known column or part of a message that can't be used is
refused by name. Unknown columns are taken as notes about the row (an id, a source) and their names are shown.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_adapter.common.errors import UsageError
from llama_adapter.data.messages import MEDIA, THOUGHTS, TOOLS, RowPictures, read_messages
from llama_adapter.data.row_pictures import PictureFile, looks_like_a_picture, read_picture_columns
from llama_adapter.data.turns import CAPTION_QUESTIONS, Turn, check_unicode, in_order
from llama_adapter.data.values import is_empty, is_empty_json, kind_of, read_text

# The columns that are read, by what they hold. If several of a kind are filled, the first is used.
_CHATS = ("messages", "conversations", "conversation")
_QUESTIONS = {"instruction": "output", "prompt": "completion", "question": "answer", "query": "response"}
_ANSWERS = {"output": "instruction", "response": "instruction", "completion": "prompt", "answer": "question"}
_INPUTS = ("input", "context", "query")
_CAPTIONS = ("captions", "caption")
_SYSTEMS = ("system", "system_prompt")
_HISTORY = "history"
_KNOWN = {*_CHATS, *_QUESTIONS, *_ANSWERS, *_INPUTS, *_CAPTIONS, *_SYSTEMS, _HISTORY}

_PREFERENCE = (
    "answers to compare (preference data) cannot be learnt from here; give each row one answer, the good "
    "one, in 'completion'"
)
_REFUSED = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "function_calls"), TOOLS),
    **dict.fromkeys(("videos", "video", "video_path", "audios", "audio", "audio_path"), MEDIA),
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "completions", "kto_tag"), _PREFERENCE),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), THOUGHTS),
    **dict.fromkeys(("choices", "options"), "write the choices into the question"),
}
# Splits DAQUAR's names such as night_stand: VQA's scores split such words too, and decoders know the single
# words.
_WORDS_JOINED = re.compile(r"(?<=[^\W_])_(?=[^\W_])")


@dataclass(frozen=True)
class RowContent:
    """What a row holds.

    Attributes:
        conversations: each ends with an answer to learn. A row of captions has one for each caption.
        images: the files of its pictures, not opened yet.
        faults: for each conversation that is left out, the reason.
        unanswered: whether a last question without an answer was left out.
        unread: the names of filled columns that are not read.
    """

    conversations: tuple[tuple[Turn, ...], ...]
    images: tuple[PictureFile, ...]
    faults: tuple[str, ...]
    unanswered: bool
    unread: tuple[str, ...]


def read_row(row: Any, number: int, root: Path) -> RowContent:
    """Read a row's conversations and pictures.

    Args:
        number: the row's number in its source. It decides which question its captions answer.
        root: the folder that relative names of pictures start from.

    Raises:
        UsageError: a row of no known form, or one of which something would be lost.
    """
    if not isinstance(row, dict):
        raise UsageError(f"expected an object with named fields, found {kind_of(row)}")
    given = {name: value for name, value in row.items() if not is_empty(value)}
    _refuse_what_would_be_lost(given)
    columns = read_picture_columns(row, root)
    read = {"split", *columns.read}
    pictures = RowPictures(root, list(columns.files))
    form = _form(given, row)
    turns: list[Turn] = []
    if form in _CHATS:
        read.add(form)
        turns = read_messages(row[form], form, pictures)
    elif form is not None:
        turns, names = _one_exchange(row, given, form, pictures)
        read |= names
    if form is not None:
        turns, names = _with_opening(turns, given)
        read |= names

    captions: list[str] = []
    for name in _caption_columns(form, given, row, pictures):
        read.add(name)
        captions += _captions(row, name)
    if form is None and not read & {*_CAPTIONS, "text"}:
        found = ", ".join(map(reprlib.repr, list(row)[:10])) or "none"
        expected = "'messages', 'conversations', 'question' or 'captions'"
        raise UsageError(f"its fields are {found}; expected 'instruction' and 'output', {expected}")
    unread = [name for name in given if name not in read and name not in _REFUSED]
    _refuse_what_is_left(unread, given, turns, columns.files)

    if pictures.files or pictures.placeholders:
        turns = pictures.settle(turns)
        if form == "question" and pictures.files:
            turns = [replace(turn, text=_WORDS_JOINED.sub(" ", turn.text)) for turn in turns]
    images = tuple(pictures.files)
    candidates: list[tuple[tuple[Turn, ...], str | None]] = []
    if form is not None:
        candidates.append(_learnable(turns, images))
    candidates += [_learnable(_caption_turns(text, number + i), images) for i, text in enumerate(captions)]
    faults = tuple(fault for _, fault in candidates if fault is not None)
    return RowContent(
        conversations=tuple(some for some, fault in candidates if fault is None),
        images=images,
        faults=faults if candidates else ("no caption",),
        unanswered=bool(turns) and turns[-1].role != "assistant",
        unread=tuple(map(str, unread)),
    )


def _form(given: Mapping[str, Any], row: Mapping[str, Any]) -> str | None:
    """The column with the conversation or with the question. None if there are only captions, or nothing."""
    for names in (given, row):  # an empty column counts only if no other is filled
        for name in (*_CHATS, *_QUESTIONS):
            if name in names:
                return name
        for name, question in _ANSWERS.items():
            if name in names:
                return next((name for name in _QUESTIONS if name in row), question)
        if any(name in names for name in _CAPTIONS):
            return None
    return None


def _refuse_what_would_be_lost(given: Mapping[str, Any]) -> None:
    for name, why in _REFUSED.items():
        if not is_empty_json(given.get(name)):
            raise UsageError(f"field {name!r}: {why}")
    labels = given.get("labels", given.get("label"))
    if isinstance(labels, bool) or (isinstance(labels, list) and all(isinstance(x, bool) for x in labels)):
        raise UsageError(f"field {'labels' if 'labels' in given else 'label'!r}: {_PREFERENCE}")
    if given.get("weight", 1) != 1:
        raise UsageError(
            "field 'weight': a row's weight is not read; give sources weights, --data SOURCE=0.5"
        )


def _refuse_what_is_left(
    unread: Sequence[str], given: Mapping[str, Any], turns: Sequence[Turn], images: Sequence[PictureFile]
) -> None:
    """Refuse a column that holds more than the turns do, or a picture that would not be seen."""
    said = [text for turn in turns for text in (turn.text, turn.input) if text.strip()]
    for name in unread:
        value = given[name]
        if name in _KNOWN:
            texts = value if isinstance(value, list) else [value]
            if not all(isinstance(t, str) and any(t.strip() in text for text in said) for t in texts):
                raise UsageError(
                    f"field {name!r} is not read beside the others, and would be lost; leave it out, or give "
                    "it a row of its own (docs/formats.md has the forms of rows)"
                )
        elif not images and looks_like_a_picture(value):
            raise UsageError(f"field {name!r} seems to name a picture, and is not read; call it 'image'")


# --- conversations ------------------------------------------------------------------------------------------


def _one_exchange(
    row: Mapping[str, Any], given: Mapping[str, Any], question: str, pictures: RowPictures
) -> tuple[list[Turn], set[str]]:
    """A question and an answer in columns of their own, as text or messages.

    Also returns the columns read.
    """
    names = [name for name in _ANSWERS if name in given] or [name for name in _ANSWERS if name in row]
    answer = names[0] if names else _QUESTIONS[question]
    for name in (question, answer):
        if name not in row:
            raise UsageError(f"field {name!r} is missing")
    read = {question, answer}
    if _holds_messages(row[question]):
        # TRL's form: everything in the prompt is context, and the completion is learnt.
        turns = [replace(turn, learnt=False) for turn in read_messages(row[question], question, pictures)]
    else:
        inputs = [name for name in _INPUTS if name in given and name != question]
        if len(inputs) > 1:
            raise UsageError(f"fields {inputs[0]!r} and {inputs[1]!r}: expected one of them")
        read |= {*inputs}
        turns = [Turn("user", read_text(row, question), read_text(row, inputs[0]) if inputs else "")]
    if _holds_messages(row[answer]):
        said = read_messages(row[answer], answer, pictures)
        if not said or said[0].role != "assistant":
            raise UsageError(f"field {answer!r}: expected messages that start with the assistant's")
        return turns + said, read
    return [*turns, Turn("assistant", read_text(row, answer))], read


def _holds_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def _with_opening(turns: list[Turn], given: Mapping[str, Any]) -> tuple[list[Turn], set[str]]:
    """The turns after the row's system text and history. Also returns the columns read."""
    opening: list[Turn] = []
    systems = {name: read_text(given, name) for name in _SYSTEMS if name in given}
    while turns and turns[0].role == "system":
        opening.append(turns[0])
        turns = turns[1:]
    texts = dict.fromkeys([*systems.values(), "\n\n".join(turn.text for turn in opening)])
    texts.pop("", None)
    if len(texts) > 1:
        names = " and ".join(map(repr, systems))
        raise UsageError(f"field {names}: the row has two system texts that differ; expected one")
    system = [Turn("system", text) for text in texts] or opening[:1]
    history: list[Turn] = []
    if _HISTORY in given:
        pairs = given[_HISTORY]
        if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
            raise UsageError(f"field {_HISTORY!r}: expected a list of pairs, each a question and its answer")
        for question, answer in pairs:
            history += [Turn("user", question), Turn("assistant", answer)]
    return [*system, *history, *turns], {*systems, *({_HISTORY} & given.keys())}


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)
    )


# --- captions -----------------------------------------------------------------------------------------------


def _caption_columns(
    form: str | None, given: Mapping[str, Any], row: Mapping[str, Any], pictures: RowPictures
) -> list[str]:
    """The columns that hold captions. 'text' is one if nothing else is there, as in folders from the hub."""
    names = [name for name in _CAPTIONS if name in given]
    if form is None:
        names = names or [name for name in _CAPTIONS if name in row]
        names = names or ["text"] * ("text" in given and pictures.columns)
        if names and not pictures.files:
            raise UsageError("it has captions but names no picture; expected one in 'image'")
    return names if pictures.files else []


def _captions(row: Mapping[str, Any], name: str) -> list[str]:
    value = row[name]
    if name != "captions" and isinstance(value, str):
        value = [value]
    if value is None and name != "captions":
        return []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UsageError(f"field {name!r}: expected a list of texts, found {kind_of(value)}")
    for text in value:
        check_unicode(text)
    # Flickr8k's captions are split into words, with a space before the full stop.
    return [re.sub(r"\s+([.,!?;:])", r"\1", " ".join(text.split())) for text in value]


def _caption_turns(caption: str, number: int) -> list[Turn]:
    return [Turn("user", CAPTION_QUESTIONS[number % len(CAPTION_QUESTIONS)]), Turn("assistant", caption)]


# --- what there is to learn ---------------------------------------------------------------------------------


def _learnable(turns: Sequence[Turn], images: Sequence[PictureFile]) -> tuple[tuple[Turn, ...], str | None]:
    """The turns up to the last answer to learn, and the reason if there is nothing to learn, else None."""
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    to_learn = [place for place in answers if turns[place].learnt]
    kept = tuple(turns[: to_learn[-1] + 1]) if to_learn else ()
    if not kept:
        return kept, "no answer that is to be learnt" if answers else "no answer"
    if not in_order(kept):
        return kept, "user and assistant do not alternate"
    blank = {turn.role for turn in kept if not (turn.text + turn.input).strip()}
    if "assistant" in blank:
        return kept, "empty answer"
    if "user" in blank and not images:  # a picture alone can be the question
        return kept, "empty question"
    return kept, None

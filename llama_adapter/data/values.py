"""Single values of a row, described in JSON's words for a person who looks at their file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_adapter.common.errors import UsageError
from llama_adapter.data.turns import check_unicode


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing: null, NaN, empty text, an empty list or object."""
    if isinstance(value, str | list | tuple | dict):
        return not value
    return value is None or value != value


def is_empty_json(value: Any) -> bool:
    """`is_empty`, also for JSON written as text, as in LLaMA-Factory's columns of tools."""
    return is_empty(value) or (isinstance(value, str) and value.strip() in ("[]", "{}", "null"))


def read_text(row: Mapping[str, Any], field: str) -> str:
    """The text of a field. Raises UsageError if it is missing or not text."""
    if field not in row:
        raise UsageError(f"field {field!r} is missing")
    value = row[field]
    if not isinstance(value, str):
        raise UsageError(f"field {field!r}: expected text, found {kind_of(value)}")
    try:
        check_unicode(value)
    except UsageError as error:
        raise UsageError(f"field {field!r}: {error}") from None
    return value


def kind_of(value: Any) -> str:
    """A description of what a value is, such as "a number"."""
    if value is None:
        return "null"
    if value == "":
        return "empty text"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return "an object" if isinstance(value, dict) else names.get(type(value), type(value).__name__)

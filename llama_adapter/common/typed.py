"""Reads values from JSON as dataclasses, checked by pydantic."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from llama_adapter.common.errors import UsageError

T = TypeVar("T")

# `__pydantic_config__` of a dataclass that is read strictly: a text is no number, and no key may be unknown.
STRICT: Any = {"strict": True, "extra": "forbid"}


def read_typed(kind: type[T], values: Any, source: str) -> T:
    """Make an object of a dataclass from values that JSON can hold.

    Args:
        source: the file, named in errors.

    Raises:
        UsageError: a missing or unknown key, a value of another type, or one that the dataclass refuses.
    """
    from pydantic import TypeAdapter, ValidationError  # slow to import, and not always needed

    try:
        return TypeAdapter(kind).validate_json(json.dumps(values))
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        place = ".".join(map(str, error["loc"]))
        refused = error.get("ctx", {}).get("error")
        if isinstance(refused, UsageError):
            raise UsageError(f"{source}: {refused}") from None
        if error["type"] == "missing":
            raise UsageError(f"{source}: missing key {place!r}") from None
        if error["type"] == "unexpected_keyword_argument":
            raise UsageError(f"{source}: unknown key {place!r}") from None
        expected = error["msg"].replace("Input should be", "expected")
        where = f"{place!r}: " if place else ""
        raise UsageError(f"{source}: {where}{expected}, found {error['input']!r:.60}") from None

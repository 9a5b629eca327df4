"""Dataclasses made of JSON values: strictly, and with one line for what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from llama_adapter.common.errors import UsageError
from llama_adapter.common.typed import STRICT, read_typed


@dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...]
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        if not self.sizes:
            raise UsageError("sizes: none given")


@dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 0.5
    inner: Inner | None = None
    pairs: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    __pydantic_config__ = STRICT


def test_lists_become_tuples_and_defaults_stay() -> None:
    values = {"name": "a", "inner": {"sizes": [1, 2]}, "pairs": {"q": [3, 4]}}
    assert read_typed(Outer, values, "file") == Outer("a", 0.5, Inner((1, 2)), {"q": (3, 4)})
    assert read_typed(Outer, {"name": "a", "rate": 1}, "file").rate == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "file: missing key 'name'"),
        ({"name": "a", "other": 1}, "file: unknown key 'other'"),
        ({"name": 1}, "file: 'name': expected a valid string, found 1"),
        ({"name": "a", "rate": True}, "file: 'rate': expected a valid number, found True"),
        (
            {"name": "a", "inner": {"sizes": ["2"]}},
            "file: 'inner.sizes.0': expected a valid integer, found '2'",
        ),
        ({"name": "a", "inner": {"sizes": []}}, "file: sizes: none given"),
        ({"name": "a", "pairs": {"q": [1]}}, "file: missing key 'pairs.q.1'"),
        ([1], "file: expected an object"),
    ],
)
def test_anything_else_is_refused_in_a_line(values: Any, said: str) -> None:
    with pytest.raises(UsageError) as error:
        read_typed(Outer, values, "file")
    message = str(error.value)
    assert "\n" not in message and message.startswith(said)

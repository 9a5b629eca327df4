"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llama_adapter.commands.arguments import Parser, positive_float, positive_int, seed_number
from llama_adapter.common.errors import UsageError


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive_int, {"1": 1, "20": 20}, ["0", "-1", "1.5", "x", ""]),
        (positive_float, {"1": 1.0, "1e-3": 0.001}, ["0", "-1", "nan", "inf", "x"]),
        (seed_number, {"0": 0, "4294967295": 2**32 - 1}, ["-1", "4294967296", "1.5"]),
    ],
)
def test_a_number_out_of_its_range_is_told_with_its_option(
    kind: Callable[[str], Any], good: dict[str, float], bad: list[str]
) -> None:
    parser = Parser(prog="try")
    parser.add_argument("--value", type=kind)
    for text, number in good.items():
        assert parser.parse_args(["--value", text]).value == number
    for text in bad:
        with pytest.raises(UsageError, match="argument --value: invalid ") as error:
            parser.parse_args([f"--value={text}"])
        assert kind.__name__ in str(error.value)

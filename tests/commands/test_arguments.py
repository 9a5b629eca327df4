"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.commands.arguments import (
    Parser,
    add_model_options,
    load_model,
    positive_float,
    positive_int,
    seed_number,
)
from llama_adapter.common.errors import UsageError
from llama_adapter.quantization import stored
from llama_adapter.quantization.kernels import find_compiler
from llama_adapter.quantization.libraries import precision_of
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import build_tiny_decoder


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


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize(
    ("answers", "given", "found"),
    [
        (True, [], "int8"),
        (True, ["--quantize", "none"], None),
        (True, ["--quantize", "int4"], "int4"),
        (True, ["--dtype", "float32"], None),
        (False, [], None),
        (False, ["--quantize", "int8"], "int8"),
    ],
)
def test_what_only_answers_is_in_int8_by_default(
    answers: bool, given: list[str], found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "cache_folder", lambda: tmp_path / "cache")
    folder = tmp_path / "base"
    build_tiny_decoder().save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    parser = Parser()
    add_model_options(parser, answers=answers)
    model = load_model(parser.parse_args(["--base", str(folder), "--device", "cpu", *given]))
    assert precision_of(model.decoder) == found

"""The settings of an adapter: what they are by default, what is stored, what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.config import AdapterConfig, DecoderShape, default_adapted_layers
from tests.tiny_models import CONFIG, SHAPE, VISION

SEEING = dataclasses.replace(CONFIG, vision=VISION)


def test_defaults_are_the_paper_s() -> None:
    assert AdapterConfig(base="base", shape=SHAPE, adapted_layers=1).prompt_length == 10
    layers = {30: 29, 32: 30, 40: 38, 80: 75, 16: 15, 12: 12, 1: 1}
    assert {number: default_adapted_layers(number) for number in layers} == layers


def test_the_topmost_layers_are_adapted() -> None:
    assert CONFIG.first_layer == 2


def test_what_is_stored_is_exactly_this() -> None:
    config = dataclasses.replace(CONFIG, training={"epochs": 2})
    stored = {
        "base": "base",
        "shape": {
            "family": "llama",
            "num_layers": 8,
            "hidden_size": 64,
            "num_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 100,
        },
        "adapted_layers": 6,
        "prompt_length": 10,
        "template": "alpaca",
        "vision": None,
        "format_version": 1,
        "training": {"epochs": 2},
        "base_fingerprint": "de911a80a7731c2c",
    }
    assert config.to_dict() == stored
    assert AdapterConfig.from_dict(json.loads(json.dumps(stored)), "file") == config


def test_tuning_is_stored_where_there_is_any() -> None:
    config = dataclasses.replace(CONFIG, tuning_width=12)
    stored = config.to_dict()
    assert stored == {**CONFIG.to_dict(), "tuning_width": 12}
    assert AdapterConfig.from_dict(stored, "file") == config


def test_how_it_sees_is_stored_as_this() -> None:
    stored = SEEING.to_dict()
    assert stored["vision"] == {
        "tower": "tiny",
        "tower_fingerprint": "0" * 16,
        "depths": [1, 2],
        "feature_width": 6,
        "bottleneck": 5,
        "image_tokens": 1,
        "normalised": True,
    }
    assert json.loads(json.dumps(stored)) == stored
    assert AdapterConfig.from_dict(stored, "file") == SEEING
    assert AdapterConfig.from_dict({**stored, "vision": None}, "file") == CONFIG
    before = {name: value for name, value in stored.items() if name != "vision"}
    assert AdapterConfig.from_dict(before, "file") == CONFIG, "as adapters were stored that never saw"


def test_a_projection_stored_before_there_were_norms_has_none() -> None:
    stored = SEEING.to_dict()
    del stored["vision"]["normalised"]
    vision = AdapterConfig.from_dict(stored, "file").vision
    assert vision is not None and vision == dataclasses.replace(VISION, normalised=False)


def test_there_is_one_image_token_or_one_for_each_prompt() -> None:
    dataclasses.replace(CONFIG, vision=dataclasses.replace(VISION, image_tokens=10))
    with pytest.raises(
        UsageError, match="image tokens: 3 given; choose 1, or one for each of the 10 prompts"
    ):
        dataclasses.replace(CONFIG, vision=dataclasses.replace(VISION, image_tokens=3))


def test_every_size_is_in_the_fingerprint() -> None:
    changes: dict[str, Any] = {field.name: 7 for field in dataclasses.fields(DecoderShape)} | {
        "family": "qwen3"
    }
    fingerprints = {
        dataclasses.replace(SHAPE, **{name: value}).fingerprint() for name, value in changes.items()
    }
    assert len(fingerprints | {SHAPE.fingerprint()}) == 1 + len(changes)
    assert all(len(fingerprint) == 16 for fingerprint in fingerprints)


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        for name in path[:-1]:
            values = values[name]
        del values[path[-1]]

    return change


def with_value(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        for name in path[:-1]:
            values = values[name]
        values[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_value(2, "format_version"), "format version 2"),
        (with_value("1", "format_version"), "format version '1'"),
        (with_value(True, "format_version"), "'format_version' must be int"),
        (with_value(1.0, "format_version"), "'format_version' must be int"),
        (without("format_version"), "format version None"),
        (without("base"), "missing key 'base'"),
        (without("adapted_layers"), "missing key 'adapted_layers'"),
        (with_value(1, "surprise"), "unknown key 'surprise'"),
        (without("shape"), "'shape' must be an object"),
        (with_value([], "shape"), "'shape' must be an object"),
        (without("shape", "head_dim"), "missing key 'head_dim'"),
        (with_value(1, "shape", "surprise"), "unknown key 'surprise'"),
        (with_value("eight", "shape", "num_layers"), "'num_layers' must be int"),
        (with_value(True, "prompt_length"), "'prompt_length' must be int"),
        (with_value(10.0, "prompt_length"), "'prompt_length' must be int"),
        (with_value(None, "base"), "'base' must be str"),
        (with_value("two\nlines", "prompt_length"), "'prompt_length' must be int"),
        (with_value(None, "training"), "'training' must be dict"),
        (with_value(9, "adapted_layers"), "choose 1 to 8"),
        (with_value(0, "adapted_layers"), "choose 1 to 8"),
        (with_value(0, "prompt_length"), "choose 1 or more"),
        (with_value(32, "shape", "hidden_size"), "the file was edited"),
        (without("base_fingerprint"), "base_fingerprint"),
        (with_value("0" * 16, "base_fingerprint"), "the file was edited"),
        (with_value("clip-mini", "vision"), "'vision' must be an object or null, found 'clip-mini'"),
        (with_value([], "vision"), "'vision' must be an object or null"),
        (with_value(True, "vision"), "'vision' must be an object or null"),
        (with_value({}, "vision"), "missing key 'depths'"),
        (without("vision", "tower"), "missing key 'tower'"),
        (with_value(1, "vision", "surprise"), "unknown key 'surprise'"),
        (with_value(None, "vision", "tower"), "'tower' must be str"),
        (with_value("six", "vision", "feature_width"), "'feature_width' must be int"),
        (with_value(True, "vision", "image_tokens"), "'image_tokens' must be int"),
        (with_value("12", "vision", "depths"), "'depths' must be list"),
        (with_value([], "vision", "depths"), "depths: [] given"),
        (with_value([0, 1], "vision", "depths"), "depths: [0, 1] given; expected numbers from 1"),
        (with_value([1, "2"], "vision", "depths"), "depths: [1, '2'] given"),
        (with_value([[1]], "vision", "depths"), "depths: [[1]] given"),
        (with_value(0, "vision", "feature_width"), "feature width: 0 given; choose 1 or more"),
        (with_value(0, "vision", "bottleneck"), "bottleneck: 0 given; choose 1 or more"),
        (with_value(1, "vision", "normalised"), "'normalised' must be bool, found 1"),
        (with_value(1, "vision", "bottleneck"), "bottleneck: 1 given; choose 2 or more"),
        (with_value(-1, "vision", "image_tokens"), "image tokens: -1 given; choose 1 or more"),
        (with_value(4, "vision", "image_tokens"), "image tokens: 4 given; choose 1, or one for each"),
    ],
)
def test_values_that_are_no_config_are_one_line(change: Callable[[dict[str, Any]], None], said: str) -> None:
    values = SEEING.to_dict()
    change(values)
    with pytest.raises(UsageError) as error:
        AdapterConfig.from_dict(values, "some/file.json")
    message = str(error.value)
    assert said in message and "\n" not in message and message.startswith("some/file.json: ")


def test_the_values_given_are_left_as_they_were() -> None:
    values = SEEING.to_dict()
    before = json.dumps(values)
    AdapterConfig.from_dict(values, "file")
    assert json.dumps(values) == before

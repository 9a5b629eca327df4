"""The settings of an adapter: their defaults, how they are stored, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.config import AdapterConfig, ScienceQAConfig
from llama_adapter.methods.prompts import PromptsConfig
from llama_adapter.methods.scales import ScalesConfig
from llama_adapter.methods.shape import DecoderShape, default_adapted_layers
from tests.tiny_models import CONFIG, SHAPE, VISION

STORED_SHAPE = {
    "family": "llama",
    "num_layers": 8,
    "hidden_size": 64,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
}
SEEING = dataclasses.replace(CONFIG, parts=(PromptsConfig(), VISION))


def test_defaults_are_the_paper_s() -> None:
    assert AdapterConfig(base="base", shape=SHAPE, adapted_layers=1).prompt_length == 10
    layers = {30: 29, 32: 30, 40: 38, 80: 75, 16: 15, 12: 12, 1: 1}
    assert {number: default_adapted_layers(number) for number in layers} == layers


def test_the_topmost_layers_are_adapted() -> None:
    assert CONFIG.first_layer == 2


def test_what_is_stored_is_exactly_this() -> None:
    config = dataclasses.replace(CONFIG, training={"epochs": 2})
    stored = {
        "format_version": 2,
        "base": "base",
        "base_fingerprint": "de911a80a7731c2c",
        "shape": STORED_SHAPE,
        "adapted_layers": 6,
        "parts": [{"kind": "prompts", "prompt_length": 10}],
        "template": "alpaca",
        "template_date": None,
        "quantization": None,
        "projections": {},
        "scienceqa": None,
        "training": {"epochs": 2},
    }
    assert config.to_dict() == stored
    assert AdapterConfig.from_dict(json.loads(json.dumps(stored)), "file") == config


def test_scales_are_stored_with_the_decoder_s_projections() -> None:
    parts = (PromptsConfig(), ScalesConfig())
    config = dataclasses.replace(CONFIG, parts=parts, projections={"mlp.up_proj": (64, 128)})
    stored = config.to_dict()
    assert stored["parts"] == [{"kind": "prompts", "prompt_length": 10}, {"kind": "scales"}]
    assert stored["projections"] == {"mlp.up_proj": [64, 128]}
    assert AdapterConfig.from_dict(stored, "file") == config and config.method == "prompts+scales"


def test_how_it_sees_is_stored_as_this() -> None:
    stored = SEEING.to_dict()
    assert stored["parts"][1] == {
        "kind": "projection",
        "tower": "tiny",
        "tower_fingerprint": "0" * 16,
        "depths": [1, 2],
        "feature_width": 6,
        "bottleneck": 5,
        "image_tokens": 1,
        "normalised": True,
    }
    assert json.loads(json.dumps(stored)) == stored
    assert AdapterConfig.from_dict(stored, "file") == SEEING and SEEING.method == "prompts"
    assert SEEING.vision == VISION and CONFIG.vision is None


def test_how_it_is_asked_is_stored_and_not_read_from_how_it_was_made() -> None:
    config = dataclasses.replace(CONFIG, scienceqa=ScienceQAConfig("QCM-ALE", caption=True, answer="letter"))
    stored = config.to_dict()
    assert stored["scienceqa"] == {
        "format": "QCM-ALE",
        "caption": True,
        "answer": "letter",
        "rotations": False,
    }
    assert AdapterConfig.from_dict(stored, "file") == config
    made = dataclasses.replace(CONFIG, training={"data": {"format": "QCM-A"}})
    assert AdapterConfig.from_dict(made.to_dict(), "file").scienceqa is None


def version_1(**changes: Any) -> dict[str, Any]:
    """A config in the form that was stored before adapters had parts."""
    return {
        "base": "base",
        "shape": STORED_SHAPE,
        "adapted_layers": 6,
        "prompt_length": 10,
        "template": "alpaca",
        "vision": None,
        "format_version": 1,
        "training": {},
        "base_fingerprint": "de911a80a7731c2c",
        **changes,
    }


def test_what_was_stored_before_there_were_parts_is_read() -> None:
    assert AdapterConfig.from_dict(version_1(), "file") == CONFIG
    config = AdapterConfig.from_dict(version_1(prompt_length=3, tuning_width=12), "file")
    assert config.parts == (PromptsConfig(3), ScalesConfig(12)) and config.projections == {}
    assert AdapterConfig.from_dict(config.to_dict(), "file") == config
    never_saw = version_1()
    del never_saw["vision"]
    assert AdapterConfig.from_dict(never_saw, "file") == CONFIG
    vision = {**dataclasses.asdict(VISION), "depths": [1, 2]}
    assert AdapterConfig.from_dict(version_1(vision=vision), "file") == SEEING
    del vision["normalised"]
    before_norms = AdapterConfig.from_dict(version_1(vision=vision), "file").vision
    assert before_norms == dataclasses.replace(VISION, normalised=False)
    training = {"data": {"format": "QCM-A", "caption": True}, "answer": "option"}
    asked = AdapterConfig.from_dict(version_1(training=training), "file")
    assert asked.scienceqa == ScienceQAConfig("QCM-A", caption=True, answer="option")
    assert asked.training == training
    turned = AdapterConfig.from_dict(version_1(training={**training, "rotations": True}), "file")
    assert turned.scienceqa == ScienceQAConfig("QCM-A", caption=True, answer="option", rotations=True)
    del training["answer"]
    untold = AdapterConfig.from_dict(version_1(training=training), "file").scienceqa
    assert untold == ScienceQAConfig("QCM-A", caption=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vision": "clip-mini"}, "'vision' must be an object or null, found 'clip-mini'"),
        ({"vision": {}}, "missing key 'tower'"),
        ({"prompt_length": "10"}, "'prompt_length': expected a valid integer, found '10'"),
        ({"tuning_width": "10"}, "'width': expected a valid integer, found '10'"),
        ({"surprise": 1}, "unknown key 'surprise'"),
    ],
)
def test_what_is_wrong_there_is_one_line_too(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        AdapterConfig.from_dict(version_1(**changes), "some/file.json")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_there_is_one_image_token_or_one_for_each_prompt() -> None:
    dataclasses.replace(CONFIG, parts=(PromptsConfig(), dataclasses.replace(VISION, image_tokens=10)))
    with pytest.raises(
        UsageError, match="image tokens: 3 given; choose 1, or one for each of the 10 prompts"
    ):
        dataclasses.replace(CONFIG, parts=(PromptsConfig(), dataclasses.replace(VISION, image_tokens=3)))


def test_pictures_come_in_with_the_prompts() -> None:
    with pytest.raises(UsageError, match="pictures come in with the prompts, which this adapter lacks"):
        dataclasses.replace(CONFIG, parts=(VISION,))


def test_every_size_is_in_the_fingerprint() -> None:
    changes: dict[str, Any] = {field.name: 7 for field in dataclasses.fields(DecoderShape)} | {
        "family": "qwen3"
    }
    fingerprints = {
        dataclasses.replace(SHAPE, **{name: value}).fingerprint() for name, value in changes.items()
    }
    assert len(fingerprints | {SHAPE.fingerprint()}) == 1 + len(changes)
    assert all(len(fingerprint) == 16 for fingerprint in fingerprints)


def without(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(values: Any) -> None:
        for name in path[:-1]:
            values = values[name]
        del values[path[-1]]

    return change


def with_value(value: Any, *path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(values: Any) -> None:
        for name in path[:-1]:
            values = values[name]
        values[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_value(3, "format_version"), "format version 3"),
        (with_value("1", "format_version"), "format version '1'"),
        (with_value(True, "format_version"), "format version True"),
        (with_value(1.0, "format_version"), "format version 1.0"),
        (without("format_version"), "format version None"),
        (without("base"), "missing key 'base'"),
        (without("adapted_layers"), "missing key 'adapted_layers'"),
        (with_value(1, "surprise"), "unknown key 'surprise'"),
        (without("shape"), "missing key 'shape'"),
        (with_value([], "shape"), "'shape': expected an object, found []"),
        (without("shape", "head_dim"), "missing key 'shape.head_dim'"),
        (with_value(1, "shape", "surprise"), "unknown key 'shape.surprise'"),
        (
            with_value("eight", "shape", "num_layers"),
            "'shape.num_layers': expected a valid integer, found 'eight'",
        ),
        (
            with_value(True, "parts", 0, "prompt_length"),
            "'prompt_length': expected a valid integer, found True",
        ),
        (
            with_value(10.0, "parts", 0, "prompt_length"),
            "'prompt_length': expected a valid integer, found 10.0",
        ),
        (with_value(None, "base"), "'base': expected a valid string, found None"),
        (with_value("two\nlines", "parts", 0, "prompt_length"), "part 'prompts': 'prompt_length': expected"),
        (with_value(None, "training"), "'training': expected an object, found None"),
        (with_value(9, "adapted_layers"), "choose 1 to 8"),
        (with_value(0, "adapted_layers"), "choose 1 to 8"),
        (with_value(0, "parts", 0, "prompt_length"), "choose 1 or more"),
        (with_value(32, "shape", "hidden_size"), "the file was edited"),
        (without("base_fingerprint"), "base_fingerprint"),
        (with_value("0" * 16, "base_fingerprint"), "the file was edited"),
        (with_value({}, "parts"), "'parts': expected a list, found dict"),
        (without("parts"), "'parts': expected a list, found NoneType"),
        (with_value([], "parts"), "parts: none given; expected some of prompts, projection"),
        (with_value([1], "parts"), "each of 'parts' must be an object with a 'kind', found 1"),
        (with_value("surprise", "parts", 0, "kind"), "a part of kind 'surprise'; this llama-adapter knows"),
        (with_value({"kind": "prompts"}, "parts", 1), "parts: prompts, prompts given"),
        (with_value({"kind": "projection"}, "parts", 1), "part 'projection': missing key 'tower'"),
        (with_value([1], "projections"), "'projections': expected an object, found [1]"),
        (with_value({"q_proj": [1, 0]}, "projections"), "expected widths of 1 or more"),
        (with_value({"q_proj": [1]}, "projections"), "'projections.q_proj.1'"),
        (with_value("QCM", "scienceqa"), "'scienceqa': expected an object, found 'QCM'"),
        (with_value({}, "scienceqa"), "missing key 'scienceqa.format'"),
        (without("parts", 1, "tower"), "missing key 'tower'"),
        (with_value(1, "parts", 1, "surprise"), "unknown key 'surprise'"),
        (with_value(None, "parts", 1, "tower"), "'tower': expected a valid string, found None"),
        (
            with_value("six", "parts", 1, "feature_width"),
            "'feature_width': expected a valid integer, found 'six'",
        ),
        (
            with_value(True, "parts", 1, "image_tokens"),
            "'image_tokens': expected a valid integer, found True",
        ),
        (with_value("12", "parts", 1, "depths"), "'depths': expected a valid array, found '12'"),
        (with_value([], "parts", 1, "depths"), "depths: [] given"),
        (with_value([-2, 1], "parts", 1, "depths"), "depths: [-2, 1] given; expected numbers from -1"),
        (with_value([1, "2"], "parts", 1, "depths"), "'depths.1': expected a valid integer, found '2'"),
        (with_value([[1]], "parts", 1, "depths"), "'depths.0': expected a valid integer, found [1]"),
        (with_value(0, "parts", 1, "feature_width"), "feature width: 0 given; choose 1 or more"),
        (with_value(0, "parts", 1, "bottleneck"), "bottleneck: 0 given; choose 1 or more"),
        (with_value(1, "parts", 1, "normalised"), "'normalised': expected a valid boolean, found 1"),
        (with_value(1, "parts", 1, "bottleneck"), "bottleneck: 1 given; choose 2 or more"),
        (with_value(-1, "parts", 1, "image_tokens"), "image tokens: -1 given; choose 1 or more"),
        (with_value(4, "parts", 1, "image_tokens"), "image tokens: 4 given; choose 1, or one for each"),
    ],
)
def test_values_that_are_no_config_are_one_line(change: Callable[[dict[str, Any]], None], said: str) -> None:
    values = SEEING.to_dict()
    change(values)
    with pytest.raises(UsageError) as error:
        AdapterConfig.from_dict(values, "some/file.json")
    message = str(error.value)
    assert said in message and "\n" not in message and message.startswith("some/file.json")


def test_the_values_given_are_left_as_they_were() -> None:
    values = SEEING.to_dict()
    before = json.dumps(values)
    AdapterConfig.from_dict(values, "file")
    assert json.dumps(values) == before

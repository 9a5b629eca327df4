"""The mean of several adapters' weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.averaging import average
from llama_adapter.methods.prompts import PromptsConfig
from llama_adapter.methods.scales import ScalesConfig
from llama_adapter.model import LlamaAdapter
from tests.refusals import refusal
from tests.tiny_models import CONFIG, VISION, build_tiny_decoder

SEEING = replace(CONFIG, parts=(PromptsConfig(), VISION))


def adapters(*seeds: int) -> dict[str, Adapter]:
    return {f"stage-{seed}": Adapter(SEEING, torch.Generator().manual_seed(seed)) for seed in seeds}


def test_each_weight_is_the_mean() -> None:
    stages = adapters(1, 2, 3)
    mean = average(stages)
    for name, value in mean.state_dict().items():
        expected = torch.stack([stage.state_dict()[name] for stage in stages.values()]).mean(0)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_shares_say_how_much_each_counts() -> None:
    stages = adapters(1, 2)
    one, other = (stage.state_dict() for stage in stages.values())
    for name, value in average(stages, [1, 3]).state_dict().items():
        torch.testing.assert_close(value, 0.25 * one[name] + 0.75 * other[name], rtol=0, atol=1e-6)
    for name, value in average(stages, [5, 15]).state_dict().items():
        torch.testing.assert_close(value, average(stages, [1, 3]).state_dict()[name])


def test_a_part_can_be_the_last_ones_which_may_see_otherwise() -> None:
    one, other = Adapter(CONFIG, torch.Generator().manual_seed(1)), adapters(2)["stage-2"]
    mean = average({"blind": one, "seeing": other}, from_last=["projection"])
    assert mean.config.vision == VISION
    for name, value in mean.state_dict().items():
        if name.startswith("projection."):
            assert torch.equal(value, other.state_dict()[name])
        else:
            expected = (one.state_dict()[name] + other.state_dict()[name]) / 2
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_the_config_is_the_last_ones_and_says_what_was_done() -> None:
    stages = adapters(1, 2)
    stages["stage-2"].config = replace(SEEING, training={"step": 7})
    mean = average(stages, [1, 2])
    made = {"adapters": ["stage-1", "stage-2"], "shares": [1, 2], "from_last": []}
    assert mean.config == replace(SEEING, training={"step": 7, "mean_of": made})


def test_the_adapters_stay_as_they_were() -> None:
    stages = adapters(1, 2)
    before = {name: copy.deepcopy(stage.state_dict()) for name, stage in stages.items()}
    mean = average(stages, from_last=["projection"])
    for parameter in mean.parameters():
        parameter.data.zero_()
    for name, stage in stages.items():
        assert all(torch.equal(value, before[name][key]) for key, value in stage.state_dict().items())


def test_weights_that_were_selected_differently_have_no_mean() -> None:
    model = LlamaAdapter(build_tiny_decoder(), base="tiny")
    one, other = (model.new_adapter(name, method="selected") for name in ("one", "other"))
    for adapter in (one, other):
        for _, places in adapter.named_buffers():
            if not places.is_floating_point():
                places.copy_(torch.arange(len(places)))
    average({"one": one, "other": other})
    places = next(places for _, places in other.named_buffers() if not places.is_floating_point())
    places.add_(1)
    assert "one, other have no mean: they change different weights of the base (selected." in refusal(
        lambda: average({"one": one, "other": other})
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"base": "another"},
            "a and b have no mean: the first has the base base, the second another; give stages",
        ),
        ({"adapted_layers": 5}, "the first has the number of adapted layers 6, the second 5"),
        (
            {"parts": (PromptsConfig(prompt_length=4),)},
            "the settings of their parts 'prompts' differ; copy the last one's with --from-last prompts",
        ),
        ({"parts": (PromptsConfig(), ScalesConfig())}, "the first has prompts, the second prompts, scales"),
    ],
)
def test_adapters_that_do_not_go_together_are_refused(change: dict[str, object], said: str) -> None:
    config = replace(CONFIG, base="base")
    one, other = Adapter(config), Adapter(replace(config, **change))  # type: ignore[arg-type]
    assert said in refusal(lambda: average({"a": one, "b": other}))


def test_a_wrong_request_is_refused() -> None:
    stages = adapters(1, 2)
    assert "a mean of 1 given; name two or more adapters" in refusal(lambda: average(adapters(1)))
    for shares, told in (
        ([1.0], "1"),
        ([1.0, 0.0], "1, 0"),
        ([1.0, -1.0], "1, -1"),
        ([float("nan"), 1], "nan, 1"),
    ):
        assert f"shares {told} given; expected 2 positive numbers" in refusal(
            lambda s=shares: average(stages, s)
        )
    assert "stage-2 has no part 'lora' to copy; it has prompts, projection" in refusal(
        lambda: average(stages, from_last=["lora"])
    )
    assert "which leaves nothing to average; copy fewer" in refusal(
        lambda: average(stages, from_last=["prompts", "projection"])
    )

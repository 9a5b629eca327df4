"""The trainable module: its initial values and what it holds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_adapter.methods.adapter import Adapter
from llama_adapter.methods.projection import Projection
from llama_adapter.methods.prompts import Prompts, PromptsConfig
from tests.tiny_models import CONFIG, VISION


def prompts_of(adapter: Adapter, *pictures: Any) -> Tensor:
    """(R, L, K, D), the prompts that a forward pass reads."""
    return adapter.state(*pictures).parts[Prompts]["embeddings"]


def test_prompts_start_normal_and_gates_at_zero() -> None:
    adapter = Adapter(CONFIG, torch.Generator().manual_seed(0))
    assert adapter.prompts.embeddings.shape == (6, 10, 64) and adapter.prompts.gates.shape == (6, 4)
    assert torch.equal(adapter.prompts.gates, torch.zeros(6, 4))
    assert abs(float(adapter.prompts.embeddings.detach().mean())) < 0.05
    assert abs(float(adapter.prompts.embeddings.detach().std()) - 1) < 0.05
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_its_tensors_have_these_names_and_no_others() -> None:
    assert list(Adapter(CONFIG).state_dict()) == ["prompts.embeddings", "prompts.gates"]


def test_the_prompts_are_given_as_one_row_of_a_batch() -> None:
    adapter = Adapter(CONFIG)
    assert prompts_of(adapter).shape == (1, 6, 10, 64)
    assert torch.equal(prompts_of(adapter)[0], adapter.prompts.embeddings)


def test_the_generator_decides_and_the_global_one_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, same, other = (Adapter(CONFIG, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.prompts.embeddings, same.prompts.embeddings) and not torch.equal(
        one.prompts.embeddings, other.prompts.embeddings
    )
    assert torch.equal(torch.get_rng_state(), before)


# --- pictures -----------------------------------------------------------------------------------------------


def build_seeing(*, image_tokens: int = 1, normalised: bool = True, seed: int = 0) -> Adapter:
    """An adapter whose projection was fitted to features of every size."""
    vision = replace(VISION, image_tokens=image_tokens, normalised=normalised)
    adapter = Adapter(replace(CONFIG, parts=(PromptsConfig(), vision)), torch.Generator().manual_seed(seed))
    adapter.projection.fit(random_features(20) * torch.arange(1.0, 7.0) + 3)
    return adapter


def random_features(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, VISION.feature_width, generator=torch.Generator().manual_seed(seed))


def gelu(number: float) -> float:
    return number * 0.5 * (1 + math.erf(number / math.sqrt(2)))


def plain_image_tokens(projection: Projection, features: Tensor) -> list[list[float]]:
    """(F,) -> each image token, computed number by number (eq. 9)."""
    given = [
        (float(x) - float(mean)) * float(scale)
        for x, mean, scale in zip(features, projection.mean, projection.scale, strict=True)
    ]
    weights = {name: tensor.tolist() for name, tensor in projection.state_dict().items()}

    def linear(name: str, inputs: list[float]) -> list[float]:
        rows = zip(weights[f"{name}.weight"], weights[f"{name}.bias"], strict=True)
        return [sum(w * x for w, x in zip(row, inputs, strict=True)) + bias for row, bias in rows]

    def normalise(inputs: list[float]) -> list[float]:
        if "sizes" not in weights:
            return inputs
        mean = math.fsum(inputs) / len(inputs)
        variance = math.fsum((x - mean) ** 2 for x in inputs) / len(inputs)
        return [(x - mean) / math.sqrt(variance + 1e-5) for x in inputs]

    flat = linear("up", [gelu(x) for x in normalise(linear("down", given))])
    width = len(flat) // projection.tokens
    return [normalise(flat[start : start + width]) for start in range(0, len(flat), width)]


@pytest.mark.parametrize("image_tokens", [1, 10])
@pytest.mark.parametrize("normalised", [True, False])
@torch.no_grad()
def test_a_picture_is_added_to_every_prompt_of_every_layer(image_tokens: int, normalised: bool) -> None:
    adapter = build_seeing(image_tokens=image_tokens, normalised=normalised)
    sizes = torch.ones(6, 64)
    if normalised:
        assert adapter.projection.sizes is not None
        sizes = adapter.projection.sizes.normal_(generator=torch.Generator().manual_seed(4))
    features, owners = random_features(4, seed=1), torch.tensor([2, 0, 2, 2])  # row 1 has no picture
    prompts = prompts_of(adapter, features, owners, 3)
    assert prompts.shape == (3, 6, 10, 64)
    tokens = [plain_image_tokens(adapter.projection, picture) for picture in features]
    for row in range(3):
        own = [tokens[number] for number, owner in enumerate(owners.tolist()) if owner == row]
        for k in range(10):
            place = k if image_tokens > 1 else 0
            columns = zip(*(image[place] for image in own), strict=True)
            image = torch.tensor([math.fsum(column) / len(own) for column in columns] or 0.0)
            for layer in range(6):
                expected = adapter.prompts.embeddings[layer, k] + sizes[layer] * image
                torch.testing.assert_close(prompts[row, layer, k], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(prompts[1], adapter.prompts.embeddings), "bit for bit"


def test_a_row_without_a_picture_is_the_text_adapter_bit_for_bit() -> None:
    seeing, blind = build_seeing(seed=3), Adapter(CONFIG, torch.Generator().manual_seed(3))
    assert torch.equal(prompts_of(seeing), prompts_of(blind))
    mixed = prompts_of(seeing, random_features(1), torch.tensor([1]), 2)
    assert torch.equal(mixed[0], prompts_of(blind)[0]) and not torch.allclose(mixed[1], prompts_of(blind)[0])


def test_several_pictures_may_come_in_any_order() -> None:
    adapter, features = build_seeing(), random_features(3)
    one = prompts_of(adapter, features, torch.tensor([0, 1, 0]), 2)
    other = prompts_of(adapter, features[[2, 1, 0]], torch.tensor([0, 1, 0]), 2)
    torch.testing.assert_close(one, other)
    twice = prompts_of(adapter, features[[0, 0]], torch.tensor([0, 0]), 1)  # averaged, not added up
    torch.testing.assert_close(twice, prompts_of(adapter, features[:1], torch.tensor([0]), 1))


def test_the_projection_standardises_what_it_was_fitted_to() -> None:
    adapter = build_seeing()
    projection = adapter.projection
    features = random_features(50, seed=2) * torch.tensor([0.1, 1, 5, 10, 100, 0]) + 7
    projection.fit(iter(features))
    seen = (features - projection.mean) * projection.scale
    torch.testing.assert_close(seen.mean(0), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(seen.std(0, correction=0)[:5], torch.ones(5))
    assert not seen[:, 5].any(), "a channel that never stirs is nothing"
    assert projection.scale.max() <= 100, "and no picture that does stir it drowns the rest"
    assert {name for name, _ in adapter.named_parameters()} == {
        "prompts.embeddings",
        "prompts.gates",
        "projection.sizes",
        *(f"projection.{layer}.{kind}" for layer in ("down", "up") for kind in ("weight", "bias")),
    }
    assert set(adapter.state_dict()) - {name for name, _ in adapter.named_parameters()} == {
        "projection.mean",
        "projection.scale",
    }

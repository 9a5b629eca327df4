"""The projection of a picture's features to image tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from llama_adapter.methods.projection import Projection
from tests.tiny_models import VISION, build_tiny_model


def projection_of(seed: int = 0, **changed: Any) -> Projection:
    vision = dataclasses.replace(VISION, **changed)
    projection = build_tiny_model().new_adapter("sees", vision=vision, seed=seed).find(Projection)
    assert projection is not None
    return projection


def pictures(count: int, *, seed: int = 0) -> Tensor:
    return torch.randn(count, VISION.feature_width, generator=torch.Generator().manual_seed(seed))


def test_matched_tokens_are_those_of_the_other() -> None:
    """A ridge of almost nothing: the same hidden layer gives the same tokens again."""
    one, other = projection_of(), projection_of()
    with torch.no_grad():
        other.up.weight.normal_(generator=torch.Generator().manual_seed(1))
    wanted = one(pictures(400))
    assert (other(pictures(400)) - wanted).abs().mean() > 0.5
    assert 0.95 < other.match(pictures(400), wanted) <= 1
    unseen = pictures(50, seed=1)
    assert torch.nn.functional.cosine_similarity(other(unseen), one(unseen), dim=-1).min() > 0.95


def test_what_a_wider_hidden_layer_explains() -> None:
    """With the hidden units of the other and more, most of its tokens are explained, and no more than all."""
    one, wider = projection_of(), projection_of(bottleneck=16)
    wider.take_over(one)
    narrow = projection_of(seed=3, bottleneck=2)
    wanted = one(pictures(400))
    assert narrow.match(pictures(400), wanted) < wider.match(pictures(400), wanted) <= 1


def test_the_weights_that_are_taken_over() -> None:
    one, wider = projection_of(seed=1), projection_of(seed=2, bottleneck=8, feature_width=9)
    new = wider.down.weight.detach().clone()
    wider.take_over(one)
    old, added = VISION.bottleneck, 9 - VISION.feature_width
    assert torch.equal(wider.down.weight[:old, added:], one.down.weight)
    assert not wider.down.weight[:old, :added].any()
    assert torch.equal(wider.down.weight[old:], new[old:])  # as they started: there is nothing to take over
    assert torch.equal(wider.down.bias[:old], one.down.bias)
    assert torch.equal(wider.up.weight[:, :old], one.up.weight)
    assert not wider.up.weight[:, old:].any()
    assert torch.equal(wider.mean[added:], one.mean)
    assert torch.equal(wider.up.bias, one.up.bias)

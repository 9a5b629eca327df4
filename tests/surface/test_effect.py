"""What is set on the decoder itself, so that an adapter would do or learn nothing, is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llama_adapter.common.errors import UsageError
from tests.tiny_models import build_tiny_model, random_rows


@pytest.mark.parametrize(
    "switch",
    [
        lambda model: model.decoder.set_attn_implementation("eager"),
        lambda model: model.model.set_attn_implementation("sdpa"),
        lambda model: setattr(model.config, "_attn_implementation", "eager"),
    ],
)
def test_an_attention_that_reads_no_prompts_is_an_error(switch: Callable[[Any], None]) -> None:
    model = build_tiny_model()
    ids = torch.stack(random_rows(7))
    bare = model(ids, adapter="none").logits
    switch(model)
    for use in (model, model.model, model.get_base_model()):
        with pytest.raises(UsageError, match="reads no prompts"):
            use(ids)
    torch.testing.assert_close(model(ids, adapter="none").logits, bare)
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(model(ids).logits, bare, atol=1e-3)


def test_reentrant_recomputation_set_on_the_decoder_is_an_error() -> None:
    model = build_tiny_model().train()
    (row,) = random_rows(7)
    model.decoder.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UsageError, match="use_reentrant=True"):
        model(row[None], labels=row[None])
    with torch.no_grad():
        model(row[None])
    model.activation_checkpointing_enable()
    model(row[None], labels=row[None]).loss.backward()
    assert model.get_adapter("tiny").prompts.gates.grad.abs().max() > 0

"""Rows packed into one sequence, beside the same rows one at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from llama_adapter.data.examples import Example
from llama_adapter.methods.adapter import Adapter
from llama_adapter.model import LlamaAdapter
from llama_adapter.packing.losses import answer_loss
from llama_adapter.packing.pack import pack


def check_packed_as_alone(
    model: LlamaAdapter, name: str, adapter: Adapter, examples: Sequence[Example]
) -> None:
    """Check that packed rows have the loss and the gradients that they have one by one. All in float64."""
    packed = answer_loss(model, pack(examples), adapter=name).sum()
    packed.backward()
    gradients = {key: value.grad.clone() for key, value in adapter.named_parameters()}
    adapter.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        labels = torch.tensor([example.labels])
        output = model(input_ids=torch.tensor([example.input_ids]), labels=labels, adapter=name)
        total = total + output.loss * (labels[:, 1:] != -100).sum()
    total.backward()
    assert float(packed.detach()) == pytest.approx(float(total.detach()), rel=1e-6)
    for key, value in adapter.named_parameters():
        assert torch.allclose(gradients[key], value.grad, rtol=1e-4, atol=1e-6), key

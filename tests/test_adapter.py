"""The trainable module: what it starts from and what it holds."""

from __future__ import annotations

import torch

from llama_adapter.adapter import Adapter
from tests.tiny_models import CONFIG


def test_prompts_start_normal_and_gates_at_zero() -> None:
    adapter = Adapter(CONFIG, torch.Generator().manual_seed(0))
    assert adapter.prompts.shape == (6, 10, 64) and adapter.gates.shape == (6, 4)
    assert torch.equal(adapter.gates, torch.zeros(6, 4))
    assert abs(float(adapter.prompts.detach().mean())) < 0.05
    assert abs(float(adapter.prompts.detach().std()) - 1) < 0.05
    assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_its_tensors_have_these_names_and_no_others() -> None:
    assert list(Adapter(CONFIG).state_dict()) == ["prompts", "gates"]


def test_the_prompts_are_given_as_one_row_of_a_batch() -> None:
    adapter = Adapter(CONFIG)
    assert adapter().shape == (1, 6, 10, 64)
    assert torch.equal(adapter()[0], adapter.prompts)


def test_the_generator_decides_and_the_global_one_is_left_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, same, other = (Adapter(CONFIG, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.prompts, same.prompts) and not torch.equal(one.prompts, other.prompts)
    assert torch.equal(torch.get_rng_state(), before)

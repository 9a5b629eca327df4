"""The arithmetic of the formats, compared with numbers worked out by hand and with error bounds."""

from __future__ import annotations

import pytest
import torch

from llama_adapter.common.errors import UsageError
from llama_adapter.quantization.formats import FORMATS, check_format, dequantize, quantize


def random_matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_int8_by_hand() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([127.0, -64.4, 0.6])
    stored = quantize(weight, "int8")
    assert stored.scales.tolist() == [[1.0]] and stored.offsets is None
    assert stored.numbers[0, :4].tolist() == [127, -64, 1, 0]


def test_int4_by_hand() -> None:
    weight = torch.full((1, 32), -1.0)
    weight[0, 0], weight[0, 16] = 14.0, 2.0
    stored = quantize(weight, "int4")
    assert stored.offsets is not None
    assert (stored.scales.tolist(), stored.offsets.tolist()) == ([[1.0]], [[-1.0]])
    # Column 0 is the low half of byte 0, column 16 its high half: (14 + 1) + 16 * (2 + 1)
    assert stored.numbers[0, 0] == 15 + 16 * 3 and not stored.numbers[0, 1:].any()


@pytest.mark.parametrize("columns", [64, 48, 8, 100])
@pytest.mark.parametrize("name", FORMATS)
def test_no_weight_is_off_by_more_than_a_step(name: str, columns: int) -> None:
    weight = random_matrix(5, columns)
    stored = quantize(weight, name)
    steps = stored.scales.float().repeat_interleave(32, dim=1)[:, :columns]
    # Half a step, and what a rounded scale cuts off the largest; int4 cuts more if this helps other weights.
    most = 0.5 if name == "int8" else 1.0
    assert ((dequantize(stored) - weight).abs() <= steps * most + weight.abs() * 2e-3 + 1e-6).all()


def test_int4_is_better_than_from_the_smallest_to_the_largest() -> None:
    weight = random_matrix(64, 64)
    blocks = weight.unflatten(1, (-1, 32))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    scale = (high - low) / 15
    simple = ((blocks - low) / scale).round() * scale + low
    error = (dequantize(quantize(weight, "int4")) - weight).square().sum()
    assert error < 0.95 * (simple - blocks).square().sum()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_quantised_again_stays_as_it_is(name: str) -> None:
    once = dequantize(quantize(random_matrix(4, 64), name))
    torch.testing.assert_close(dequantize(quantize(once, name)), once, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name: str) -> None:
    assert not dequantize(quantize(torch.zeros(2, 64), name)).any()


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(UsageError, match=r"'int3' is not known; choose one of int8, int4"):
        check_format("int3")

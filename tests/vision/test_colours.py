"""What pictures' pixels tell by their colours alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from llama_adapter.vision.colours import FIGURE_WIDTH, HISTOGRAMS_WIDTH, colour_histograms, figure

BINS = 4
COLOURS = BINS**3
CELLS = 12
RED, WHITE = (BINS - 1) * BINS**2, COLOURS - 1

Draw = Callable[[ImageDraw.ImageDraw], object]


def pixels_of(draw: Draw, *, background: str = "white", side: int = 112) -> Tensor:
    """(1, 3, side, side), 0 to 1."""
    image = Image.new("RGB", (side, side), background)
    draw(ImageDraw.Draw(image))
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(1, side, side, 3).permute(0, 3, 1, 2) / 255


def parts(features: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """A figure's shares of colours (64,), its outline (12, 12), its share of the picture, the logarithm."""
    colours, outline, share = features[0].split([COLOURS, CELLS**2, 2])
    return colours.square() / COLOURS, outline.view(CELLS, CELLS), *share.tolist()


def test_histograms_are_of_the_picture_and_of_its_border() -> None:
    pixels = pixels_of(lambda on: on.rectangle((16, 16, 47, 47), "red"), side=64)  # a quarter, not the border
    features = colour_histograms(pixels)
    assert features.shape == (1, HISTOGRAMS_WIDTH)
    whole, border = features.square().view(2, COLOURS)
    expected = torch.zeros(COLOURS)
    expected[RED], expected[WHITE] = 0.25, 0.75
    torch.testing.assert_close(whole, expected)
    assert border[WHITE] == 1 and border.sum() == 1


def test_a_colour_between_two_bins_counts_for_both() -> None:
    grey = colour_histograms(torch.full((1, 3, 8, 8), 0.5)).square()[0]
    torch.testing.assert_close(grey.sort().values, torch.tensor([0.0] * (2 * COLOURS - 16) + [0.125] * 16))


@pytest.mark.parametrize("background", ["white", "navy"])
@pytest.mark.parametrize(("left", "top", "size"), [(40, 20, 48), (8, 80, 24)])
def test_a_figure_has_its_own_colours_whatever_its_size_and_background(
    background: str, left: int, top: int, size: int
) -> None:
    box = (left, top, left + size - 1, top + size - 1)
    pixels = pixels_of(lambda on: on.rectangle(box, "red"), background=background)
    assert figure(pixels).shape == (1, FIGURE_WIDTH)
    colours, outline, share, log_share = parts(figure(pixels))
    expected = torch.zeros(COLOURS)
    expected[RED] = 1
    torch.testing.assert_close(colours, expected)
    assert outline[1:-1, 1:-1].min() == 1  # a square fills its box
    assert share == pytest.approx(size**2 / 112**2)
    assert log_share == pytest.approx(math.log(share), rel=1e-5)


def test_an_outline_is_the_same_wherever_a_shape_is_and_however_large() -> None:
    draws: dict[str, Callable[[ImageDraw.ImageDraw, int], object]] = {
        "circle": lambda on, size: on.ellipse((20, 30, 20 + size, 30 + size), "green"),
        "triangle": lambda on, size: on.polygon([(9, 20), (9, 20 + size), (9 + size, 20 + size)], "blue"),
    }
    outlines = {
        (name, size): parts(figure(pixels_of(lambda on, draw=draw, size=size: draw(on, size))))[1]
        for name, draw in draws.items()
        for size in (36, 72)
    }

    def apart(one: tuple[str, int], other: tuple[str, int]) -> float:
        return float((outlines[one] - outlines[other]).abs().mean())

    for name in ("circle", "triangle"):
        assert apart((name, 36), (name, 72)) < 0.06 < apart(("circle", 36), ("triangle", 72))
    circle = outlines["circle", 72]
    assert circle[0, 0] < 0.1 and circle[6, 6] == 1  # corners empty, middle full


def test_a_figure_may_touch_the_border() -> None:
    pixels = pixels_of(lambda on: on.rectangle((0, 50, 30, 56), "red"))
    colours, _, share, _ = parts(figure(pixels))
    assert colours[RED] == pytest.approx(1)
    assert share == pytest.approx(31 * 7 / 112**2)


@pytest.mark.parametrize("side", [8, 112, 300])
def test_a_picture_of_one_colour_has_no_figure(side: int) -> None:
    colours, outline, share, _ = parts(figure(torch.full((1, 3, side, side), 0.3)))
    assert not colours.any() and not outline.any()
    assert share == pytest.approx(1 / 112**2)  # one pixel, so that its logarithm is finite


def test_each_picture_is_read_alone() -> None:
    one = pixels_of(lambda on: on.ellipse((10, 10, 60, 60), "yellow"), background="black")
    other = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    together = figure(torch.cat([one, other]))
    torch.testing.assert_close(together, torch.cat([figure(one), figure(other)]))

"""What a picture's pixels tell by their colours alone, without a tower.

Shapes: N pictures, S side of a prepared picture in pixels, P pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_BINS = 4  # for each of red, green and blue
_COLOURS = _BINS**3

_HISTOGRAM_SIDE, _HISTOGRAM_BORDER = 64, 3  # pixels: what a picture is averaged down to, and its border

_FIGURE_SIDE, _FIGURE_BORDER = 112, 4  # the same, where the figure is looked for
_SAMPLES = 96  # pixels of the border that others are compared with
_NEAREST = 3  # up to two samples may lie on a figure that touches the border
_DIFFERENT = 0.2  # distance of colours in a cube of side 1 from which on a pixel belongs to the figure
_OUTLINE_SIDE = 12  # cells
_BEYOND = 0.01  # share of the figure that may lie beyond each side of its box: specks
_LEAST = 1.0  # pixels; a smaller figure counts as one of this size

HISTOGRAMS_WIDTH = 2 * _COLOURS
FIGURE_WIDTH = _COLOURS + _OUTLINE_SIDE**2 + 2


def colour_histograms(pixels: Tensor) -> Tensor:
    """Which colours a picture has, and which of them its border has: (N, 3, S, S), 0 to 1 -> (N, 128).

    The border is mostly background, so a thing's colour is one that the whole has and the border has not.
    Red, green and blue have four bins each. A colour between two bins counts for both, according to its
    distance. The square root of a bin's share makes small areas count.
    """
    small = F.adaptive_avg_pool2d(pixels, _HISTOGRAM_SIDE)
    border = _border(small, _HISTOGRAM_BORDER)
    return torch.cat([_histogram(some) / some.shape[-1] for some in (small.flatten(2), border)], dim=1).sqrt()


def figure(pixels: Tensor) -> Tensor:
    """What stands out from the colours of a picture's border: (N, 3, S, S), 0 to 1 -> (N, 210).

    A pixel belongs to the figure if its colour is far from the border's ("boundary prior", Wei et al. 2012,
    "Geodesic saliency using background priors"). The figure's colours come first, as the square roots of
    shares of the figure, times 8; then its outline, 12 by 12 cells of its square box, with the part of each
    cell that it covers; last its share of the picture, and the logarithm of that. So a small thing shows as
    clearly as a large one.
    """
    small = F.adaptive_avg_pool2d(pixels, _FIGURE_SIDE)
    border = _border(small, _FIGURE_BORDER)
    samples = border[..., :: border.shape[-1] // _SAMPLES]
    everywhere = small.flatten(2)
    distances = torch.cdist(everywhere.transpose(1, 2), samples.transpose(1, 2))
    nearest = distances.topk(_NEAREST, largest=False).values[..., -1]
    covers = (nearest / _DIFFERENT).clamp_max(1).square()  # (N, P): how far each pixel belongs to it
    size = covers.sum(1, keepdim=True).clamp_min(_LEAST)
    colours = (_histogram(everywhere, covers) / size).sqrt() * _COLOURS**0.5
    outlines = torch.stack([_outline(one) for one in covers.unflatten(1, (_FIGURE_SIDE, _FIGURE_SIDE))])
    share = size / covers.shape[1]
    return torch.cat([colours, outlines, share, share.log()], dim=1)


def _border(pixels: Tensor, width: int) -> Tensor:
    """The pixels within ``width`` of an edge: (N, 3, S, S) -> (N, 3, P)."""
    border = torch.ones(pixels.shape[2:], dtype=torch.bool, device=pixels.device)
    border[width:-width, width:-width] = False
    return pixels[..., border]


def _histogram(colours: Tensor, covers: Tensor | None = None) -> Tensor:
    """Colours (N, 3, P), each counted once or as much as ``covers``, (N, P), says -> counts (N, 64)."""
    places = (colours * _BINS - 0.5).clamp(0, _BINS - 1)
    bins = torch.arange(_BINS, device=colours.device)[:, None]
    red, green, blue = (1 - (places[:, :, None] - bins).abs()).clamp_min(0).unbind(1)  # (N, bins, P) each
    if covers is not None:
        red = red * covers[:, None]
    return torch.einsum("nrp,ngp,nbp->nrgb", red, green, blue).flatten(1)


def _outline(covers: Tensor) -> Tensor:
    """The figure in its square box: (side, side) -> (cells,)."""
    (top, bottom), (left, right) = (_ends(covers.sum(axis)) for axis in (1, 0))
    half = max(bottom - top, right - left) / 2
    down, across = (
        slice(max(0, int(middle - half)), min(_FIGURE_SIDE, int(middle + half) + 1))
        for middle in ((top + bottom) / 2, (left + right) / 2)
    )
    return F.adaptive_avg_pool2d(covers[None, down, across], _OUTLINE_SIDE).flatten()


def _ends(sums: Tensor) -> tuple[int, int]:
    """Where the figure starts and ends along one side, from how much of it each row or column has."""
    reached = sums.cumsum(0) / sums.sum().clamp_min(1e-6)
    start, end = int((reached < _BEYOND).sum()), int((reached < 1 - _BEYOND).sum()) + 1
    start = min(start, _FIGURE_SIDE - 2)
    return start, min(max(end, start + 2), _FIGURE_SIDE)

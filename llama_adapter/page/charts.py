"""Charts of a comparison as SVG: the loss of methods against their costs, and their loss in training.

They scale with the page, use its colours, and show a point's numbers under the mouse.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

WIDTH, HEIGHT = 420, 300  # in the picture's own units
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 42
# Colours that colour-blind people can tell apart too (Okabe and Ito).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999", "#b8a900")


def colours_of(methods: Sequence[str]) -> dict[str, str]:
    """A colour for each method. If there are too many methods, colours are used again."""
    return {method: COLOURS[number % len(COLOURS)] for number, method in enumerate(methods)}


def draw_cost(
    points: Mapping[str, tuple[float, float]],
    intervals: Mapping[str, tuple[float, float]],
    front: Sequence[str],
    *,
    label: str,
    colours: Mapping[str, str],
) -> str:
    """The loss of each method against one cost, with a line through the Pareto front.

    Args:
        points: cost and loss by method.
        intervals: the lowest and highest loss; cut off at the edge of the chart.
        front: the methods on the front, by rising cost.
        label: the name of the cost.
    """
    costs, losses = ([point[axis] for point in points.values()] for axis in (0, 1))
    logarithmic = min(costs) > 0 and max(costs) > 10 * min(costs)
    x_of, x_marks = _scale(costs, LEFT, WIDTH - RIGHT, logarithmic=logarithmic)
    y_of, y_marks = _scale(losses, HEIGHT - BOTTOM, TOP)
    parts = _axes(x_of, x_marks, y_of, y_marks, label, "validation loss")
    line = [f"{x_of(points[method][0]):.1f},{y_of(points[method][1]):.1f}" for method in front]
    parts.append(f'<polyline points="{" ".join(line)}" class="front"/>')
    taken: list[tuple[float, float]] = []
    for method, (cost, loss) in points.items():
        x, y = x_of(cost), y_of(loss)
        # With two or three seeds, an interval can be many times as long as the distance between methods.
        low, high = (min(max(y_of(end), TOP), HEIGHT - BOTTOM) for end in intervals[method])
        told = html.escape(f"{method}: loss {loss:.4f}, {label} {_short(cost)}")
        parts.append(
            f'<g fill="{colours[method]}" stroke="{colours[method]}">'
            f'<path d="M{x:.1f} {low:.1f}V{high:.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{told}</title></circle></g>'
        )
        parts.append(_label(x, y, method, taken))
    return _svg(parts, f"Validation loss against {label} of {', '.join(points)}; front: {', '.join(front)}")


def draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]], *, colours: Mapping[str, str]) -> str:
    """The validation loss of each method by step."""
    everything = [point for points in curves.values() for point in points]
    x_of, x_marks = _scale([step for step, _ in everything], LEFT, WIDTH - RIGHT)
    y_of, y_marks = _scale([loss for _, loss in everything], HEIGHT - BOTTOM, TOP)
    parts = _axes(x_of, x_marks, y_of, y_marks, "step", "validation loss")
    for method, points in curves.items():
        line = " ".join(f"{x_of(step):.1f},{y_of(loss):.1f}" for step, loss in points)
        parts.append(f'<polyline points="{line}" stroke="{colours[method]}" class="curve"/>')
        for step, loss in points:
            told = html.escape(f"{method}, step {step}: loss {loss:.4f}")
            parts.append(
                f'<circle cx="{x_of(step):.1f}" cy="{y_of(loss):.1f}" r="3" fill="{colours[method]}">'
                f"<title>{told}</title></circle>"
            )
    return _svg(parts, f"Validation loss by step of {', '.join(curves)}")


def draw_legend(colours: Mapping[str, str]) -> str:
    """Show which colour belongs to which method."""
    entries = (
        f'<span><i style="background: {colour}"></i>{html.escape(method)}</span>'
        for method, colour in colours.items()
    )
    return f'<p class="legend">{"".join(entries)}</p>'


def _scale(
    values: Sequence[float], start: float, end: float, *, logarithmic: bool = False
) -> tuple[Callable[[float], float], list[float]]:
    """A function from values to coordinates of the picture, and the values to mark on the axis."""
    change: Callable[[float], float] = math.log10 if logarithmic else float
    low, high = change(min(values)), change(max(values))
    margin = 0.08 * (high - low) or 0.5
    low, high = low - margin, high + margin
    if logarithmic:
        exponents = range(math.ceil(low), math.floor(high) + 1)
        marks = [10.0**exponent for exponent in exponents]
        if len(marks) < 2:
            marks = [10.0**low, 10.0**high]
    else:
        step = 10.0 ** math.floor(math.log10((high - low) / 3))
        step *= next(factor for factor in (5, 2, 1) if (high - low) / (factor * step) >= 3)
        marks = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda value: start + (change(value) - low) / (high - low) * (end - start), marks


def _axes(
    x_of: Callable[[float], float],
    x_marks: Sequence[float],
    y_of: Callable[[float], float],
    y_marks: Sequence[float],
    x_label: str,
    y_label: str,
) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = [f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" class="axis"/>']
    for mark in x_marks:
        parts.append(f'<path d="M{x_of(mark):.1f} {bottom}v4" class="axis"/>')
        parts.append(_text(x_of(mark), bottom + 16, _short(mark), "middle"))
    for mark in y_marks:
        parts.append(f'<path d="M{LEFT} {y_of(mark):.1f}h{WIDTH - LEFT - RIGHT}" class="grid"/>')
        parts.append(_text(LEFT - 6, y_of(mark) + 4, _short(mark), "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle"))
    middle = (TOP + bottom) / 2
    parts.append(_text(12, middle, y_label, "middle", f' transform="rotate(-90 12 {middle})"'))
    return parts


def _label(x: float, y: float, text: str, taken: list[tuple[float, float]]) -> str:
    """A point's name beside it, moved down until it covers no other name. ``taken`` has all their places."""
    to_left = x + 7 + 6.2 * len(text) > WIDTH
    x, y = (x - 7, y + 4) if to_left else (x + 7, y + 4)
    while any(abs(x - other) < 90 and abs(y - height) < 11 for other, height in taken):
        y += 11
    taken.append((x, y))
    return _text(x, y, text, "end" if to_left else "start")


def _short(number: float) -> str:
    """A number in few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{html.escape(text)}</text>'


def _svg(parts: Sequence[str], summary: str) -> str:
    opening = f'<svg role="img" aria-label="{html.escape(summary)}" viewBox="0 0 {WIDTH} {HEIGHT}">'
    return f'<div class="chart">{opening}{"".join(parts)}</svg></div>'

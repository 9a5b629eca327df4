"""A heat map as SVG: scales with the page, uses its colours, and shows a cell's value under the mouse."""

from __future__ import annotations

import html
from collections.abc import Sequence

CELL, LEFT, TOP = 20, 44, 6  # in the SVG's units

_POSITIVE, _NEGATIVE = "#0d9488", "#ea580c"


def draw_heatmap(
    values: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    names: tuple[str, str],
    summary: str,
    upright: bool = True,
) -> str:
    """HTML of a table of numbers as coloured cells. The largest number has the strongest colour.

    Args:
        values: by row and column. Negative numbers have a colour of their own.
        rows, columns: their labels.
        names: what a row and a column is, such as "layer" and "head".
        summary: a description of the picture for people who can't see it.
        upright: the columns' labels stand upright; if False they are rotated, for texts.
    """
    largest = max((abs(value) for row in values for value in row), default=0.0) or 1.0
    width = LEFT + CELL * len(columns) + 4
    foot = 24 if upright else 16 + 6 * max((len(column) for column in columns), default=0)
    height = TOP + CELL * len(rows) + foot
    parts = []
    for y, (row, label) in enumerate(zip(values, rows, strict=True)):
        top = TOP + CELL * y
        parts.append(_text(LEFT - 6, top + CELL * 0.7, label, 'text-anchor="end"'))
        for x, (value, column) in enumerate(zip(row, columns, strict=True)):
            colour = _POSITIVE if value >= 0 else _NEGATIVE
            told = html.escape(f"{names[0]} {label}, {names[1]} {column}: {value:.3g}")
            parts.append(
                f'<rect x="{LEFT + CELL * x}" y="{top}" width="{CELL - 1}" height="{CELL - 1}" '
                f'fill="{colour}" fill-opacity="{abs(value) / largest:.2f}"><title>{told}</title></rect>'
            )
    bottom = TOP + CELL * len(rows) + 14
    for x, column in enumerate(columns):
        place = LEFT + CELL * x + CELL / 2
        if upright:
            parts.append(_text(place, bottom, column, 'text-anchor="middle"'))
        else:
            turned = f'text-anchor="end" transform="rotate(-60 {place + 4} {bottom - 4})"'
            parts.append(_text(place + 4, bottom - 4, column, turned))
    # A cell is large enough to be touched with a finger. A picture wider than the page can be scrolled.
    look = f"min-width: {width * 0.85:.0f}px; max-width: {width * 1.2:.0f}px"
    opening = (
        f'<svg role="img" aria-label="{html.escape(summary)}" viewBox="0 0 {width} {height}" style="{look}">'
    )
    return f'<div class="heatmap">{opening}{"".join(parts)}</svg></div>'


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" {attributes}>{html.escape(text)}</text>'

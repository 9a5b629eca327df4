"""The corners of the shapes that `data.drawn_picture` draws."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

Point = tuple[float, float]


def shape_corners(name: str, draws: random.Random) -> list[Point]:
    """A shape's corners within the circle or the square of radius 1 about 0."""
    turn = 0.0
    if name in ("circle", "oval"):
        points = _around(72)
    elif name in ("square", "rectangle"):
        points = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    elif name == "triangle":
        right_angled = draws.random() < 0.15
        points = [(-1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)] if right_angled else _around(3)
        turn = draws.choice((0, 0, 0, 180, draws.uniform(0, 360)))
    elif name == "star":
        inner = draws.uniform(0.38, 0.5)
        points = [
            (x * (inner if place % 2 else 1), y * (inner if place % 2 else 1))
            for place, (x, y) in enumerate(_around(10))
        ]
        turn = draws.choice((0, 0, draws.uniform(-36, 36)))
    elif name in ("pentagon", "hexagon"):
        points = _around(5 if name == "pentagon" else 6)
        turn = draws.choice((0, 30 if name == "hexagon" else 0, draws.uniform(0, 72)))
    elif name == "cross":
        arm = draws.uniform(0.18, 0.4)
        quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
        points = [point for place in range(4) for point in _turned(quarter, 90 * place)]
    elif name == "diamond":
        narrow = draws.uniform(0.5, 0.75)
        points = [(0.0, -1.0), (narrow, 0.0), (0.0, 1.0), (-narrow, 0.0)]
    elif name == "heart":
        angles = [2 * math.pi * step / 60 for step in range(60)]
        points = [
            (
                math.sin(angle) ** 3,
                -(
                    13 * math.cos(angle)
                    - 5 * math.cos(2 * angle)
                    - 2 * math.cos(3 * angle)
                    - math.cos(4 * angle)
                )
                / 17,
            )
            for angle in angles
        ]
    else:  # an arrow
        points = [(-1.0, -0.25), (0.1, -0.25), (0.1, -0.7), (1.0, 0.0), (0.1, 0.7), (0.1, 0.25), (-1.0, 0.25)]
        turn = draws.choice((0, 90, 180, 270))
    if name in ("rectangle", "oval"):
        flat = draws.uniform(0.35, 0.65)
        points = [(x, y * flat) for x, y in points]
        turn = draws.choice((0, 0, 90, draws.uniform(0, 180) if name == "oval" else draws.uniform(-20, 20)))
    elif name in ("square", "cross", "heart") and draws.random() < 0.2:
        turn = draws.uniform(-12, 12)
    points = _turned(points, turn)
    reach = max(max(abs(x), abs(y)) for x, y in points)
    return [(x / reach, y / reach) for x, y in points]


def _around(count: int) -> list[Point]:
    """Points evenly spaced on the circle of radius 1, the first at the top."""
    angles = [2 * math.pi * step / count for step in range(count)]
    return [(math.sin(angle), -math.cos(angle)) for angle in angles]


def _turned(points: Sequence[Point], degrees: float) -> list[Point]:
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return [(x * cosine - y * sine, x * sine + y * cosine) for x, y in points]

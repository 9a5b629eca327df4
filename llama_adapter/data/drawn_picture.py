"""What is on a drawing, chosen at random, and its picture."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Collection
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageOps

from llama_adapter.data.shape_corners import Point, shape_corners

RGB = tuple[int, int, int]

# The shades that have each name: first CSS's own, then those of other palettes.
COLOURS = {
    "red": "ff0000 e60000 dc143c cc0000 ff3030 c0392b e74c3c d62728 f44336",
    "green": "008000 00ff00 228b22 32cd32 2ecc71 27ae60 2ca02c 4caf50 006400 3cb44b 90ee90",
    "blue": "0000ff 1e90ff 4169e1 0000cd 3498db 1f77b4 2196f3 0066cc 4363d8 000080 87ceeb",
    "yellow": "ffff00 ffd700 ffeb3b f1c40f fff44f ffe119",
    "orange": "ffa500 ff8c00 ff7f0e e67e22 ff9800 f58231 ff7518",
    "purple": "800080 9b59b6 8e44ad 9400d3 6a0dad 9467bd 9c27b0 911eb4 663399 8a2be2",
    "pink": "ffc0cb ff69b4 ff1493 e377c2 ffb6c1 f48fb1 ff80c0 fabed4",
    "brown": "a52a2a 8b4513 a0522d 795548 964b00 8c564b 654321 6b4423 9a6324 5d4037",
    "black": "000000 0a0a0a 111111 1a1a1a",
    "white": "ffffff fafafa f5f5f5",
    "grey": "808080 7f7f7f a9a9a9 696969 9e9e9e bebebe 666666 95a5a6",
    "teal": "008080 009688 117a7a 0d7377",
    "turquoise": "40e0d0 00ced1 48d1cc 30d5c8",
}
COLOUR_WEIGHTS = [0.5 if name in ("teal", "turquoise") else 1.0 for name in COLOURS]
NEAR = {"teal", "turquoise", "green", "blue"}  # people do not agree where one of these ends

# Each shape with how often it is drawn, and its other names.
SHAPES = {
    "circle": (3.0, ("disc",)),
    "square": (3.0, ()),
    "triangle": (3.0, ()),
    "rectangle": (2.5, ()),
    "star": (2.0, ()),
    "oval": (1.3, ("ellipse",)),
    "pentagon": (1.2, ()),
    "hexagon": (1.2, ()),
    "cross": (1.2, ("plus sign",)),
    "diamond": (1.0, ("rhombus",)),
    "heart": (0.8, ()),
    "arrow": (0.6, ()),
}
_SHAPE_WEIGHTS = [weight for weight, _ in SHAPES.values()]
# (what is asked for, what is there), so that neither yes nor no can be guessed.
UNSURE = {("rectangle", "square"), ("oval", "circle"), ("diamond", "square"), ("square", "diamond")}

# How often a shape is filled, filled with an edge of another colour, or not filled.
STYLES = {"filled": 0.6, "edged": 0.27, "outline": 0.13}
_SIDES = (32, 48, 64, 64, 64, 96, 100, 128, 128, 150, 160, 200, 224, 224, 224, 256, 256, 300, 320, 400)


@dataclass(frozen=True)
class Shape:
    """A shape as it is drawn: its corners are in pixels."""

    name: str
    colour: str
    rgb: RGB
    corners: tuple[Point, ...]
    style: str  # one of STYLES
    edge: str | None  # the name of the edge's colour, if it differs
    edge_rgb: RGB
    edge_width: float


@dataclass(frozen=True)
class Drawing:
    """The content of a picture. `background` is the colour's name if the background has only one."""

    shapes: tuple[Shape, ...]
    background: str | None


@dataclass(frozen=True)
class _Ground:
    """A background: its pattern, its colours, and its name if it has one."""

    pattern: str
    colours: tuple[RGB, ...]
    name: str | None


def draw_picture(draws: random.Random, *, large: bool = False) -> tuple[bytes, Drawing]:
    """A picture as a PNG file, and what is on it.

    Args:
        large: draw a single large shape, not as an outline, on a background of one colour that has a name.
    """
    width = height = draws.choice(_SIDES)
    if draws.random() < 0.15:  # slightly: a tower may squeeze a picture, and a circle with it
        width = round(width * draws.uniform(1.0, 1.3))
        if draws.random() < 0.5:
            width, height = height, width
    ground = _choose_ground(draws, named=large)
    boxes = [_large_box(width, height, draws)] if large else _choose_boxes(width, height, draws)
    styles = ("filled", "edged") if large else STYLES
    shapes = [_choose_shape(box, ground, styles, draws) for box in boxes]
    # Drawn twice as large and halved, which makes edges smooth. Some small pictures keep their rough edges.
    scale = 2 if max(width, height) <= 256 and draws.random() < 0.7 else 1
    image = _paint_ground(ground, (width * scale, height * scale), draws)
    canvas = ImageDraw.Draw(image)
    for shape in shapes:
        _paint_shape(canvas, shape, scale)
    if scale > 1:
        image = image.resize((width, height), Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue(), Drawing(tuple(shapes), ground.name)


def _shade(name: str, draws: random.Random) -> RGB:
    """A shade with this name: CSS's own a third of the time, else another; sometimes slightly changed."""
    shades = COLOURS[name].split()
    shade = shades[0] if draws.random() < 1 / 3 else draws.choice(shades)
    values = [int(shade[place : place + 2], 16) for place in (0, 2, 4)]
    if draws.random() < 0.4:
        values = [min(255, max(0, value + draws.randint(-7, 7))) for value in values]
    red, green, blue = values
    return red, green, blue


def _difference(one: RGB, other: RGB) -> float:
    """How far apart two colours look: 0 to about 765, by Riemersma's weights ("redmean")."""
    mean = (one[0] + other[0]) / 2
    red, green, blue = (own - its for own, its in zip(one, other, strict=True))
    return math.sqrt((2 + mean / 256) * red**2 + 4 * green**2 + (2 + (255 - mean) / 256) * blue**2)


def _any_colour(draws: random.Random) -> str:
    return draws.choices(list(COLOURS), COLOUR_WEIGHTS)[0]


def _choose_ground(draws: random.Random, *, named: bool) -> _Ground:
    kind = draws.random() * (0.65 if named else 1)
    if kind < 0.35:
        return _Ground("plain", ((255, 255, 255),), "white")
    if kind < 0.65:
        name = _any_colour(draws)
        return _Ground("plain", (_shade(name, draws),), name)
    pale = draws.random() < 0.6
    lowest, highest = (190, 255) if pale else (0, 255)

    def any_rgb() -> RGB:
        return draws.randint(lowest, highest), draws.randint(lowest, highest), draws.randint(lowest, highest)

    if kind < 0.82:
        return _Ground("plain", (any_rgb(),), None)
    pattern = draws.choice(("gradient", "gradient", "noise", "stripes", "checks", "paper"))
    first = any_rgb()
    if pattern == "gradient":
        return _Ground(pattern, (first, any_rgb()), None)
    near = draws.randint(10, 40) * draws.choice((-1, 1))
    red, green, blue = (min(255, max(0, value + near)) for value in first)
    return _Ground(pattern, (first, (red, green, blue)), None)


def _paint_ground(ground: _Ground, size: tuple[int, int], draws: random.Random) -> Image.Image:
    width, height = size
    image = Image.new("RGB", size, ground.colours[0])
    if ground.pattern == "plain":
        return image
    mask = Image.new("L", size)
    canvas = ImageDraw.Draw(mask)
    step = max(2, round(min(size) * draws.uniform(0.04, 0.15)))
    if ground.pattern == "gradient":
        mask = Image.linear_gradient("L").rotate(draws.choice((0, 90, 180, 270))).resize(size)
    elif ground.pattern == "noise":
        grain = random.Random(draws.random()).randbytes(64 * 64)
        mask = Image.frombytes("L", (64, 64), grain).resize(size, Image.Resampling.NEAREST)
    elif ground.pattern == "stripes":
        for left in range(0, width, 2 * step):
            canvas.rectangle((left, 0, left + step - 1, height), fill=255)
        if draws.random() < 0.5:
            mask = ImageOps.flip(mask.rotate(90).resize(size))
    elif ground.pattern == "checks":
        for row, top in enumerate(range(0, height, step)):
            for left in range(row % 2 * step, width, 2 * step):
                canvas.rectangle((left, top, left + step - 1, top + step - 1), fill=255)
    else:  # squared paper
        for left in range(0, width, step):
            canvas.line((left, 0, left, height), fill=255)
        for top in range(0, height, step):
            canvas.line((0, top, width, top), fill=255)
    return Image.composite(Image.new("RGB", size, ground.colours[-1]), image, mask)


def _choose_boxes(width: int, height: int, draws: random.Random) -> list[tuple[float, float, float]]:
    """Positions of the shapes: (x, y, radius), the centre and half the size. None overlaps another."""
    side = min(width, height)
    count = draws.choices((1, 2, 3, 4), (0.72, 0.16, 0.08, 0.04))[0] if side >= 64 else 1
    largest = (0.48, 0.24, 0.22, 0.2)[count - 1]
    boxes: list[tuple[float, float, float]] = []
    tries = 0
    while len(boxes) < count:
        tries += 1
        if tries % 50 == 0:  # there may be no room left beside the first ones
            boxes = []
        radius = side * draws.uniform(min(0.1 + 3 / side, largest), largest)
        x, y = (draws.uniform(radius, length - radius) for length in (width, height))
        if count == 1 and draws.random() < 0.4:
            x, y = width / 2, height / 2
        apart = all(max(abs(x - box[0]), abs(y - box[1])) > radius + box[2] + 1 for box in boxes)
        if apart:
            boxes.append((x, y, radius))
    return boxes


def _large_box(width: int, height: int, draws: random.Random) -> tuple[float, float, float]:
    """The position of a shape that fills much of the picture, as in `_choose_boxes`."""
    radius = min(width, height) * draws.uniform(0.3, 0.48)
    return draws.uniform(radius, width - radius), draws.uniform(radius, height - radius), radius


def _choose_shape(
    box: tuple[float, float, float], ground: _Ground, styles: Collection[str], draws: random.Random
) -> Shape:
    """A shape in a colour that stands out from the background."""
    x, y, radius = box
    name = draws.choices(list(SHAPES), _SHAPE_WEIGHTS)[0]
    while True:
        colour = _any_colour(draws)
        rgb = _shade(colour, draws)
        if colour != ground.name and all(_difference(rgb, other) > 150 for other in ground.colours):
            break
    style = draws.choices(list(styles), [STYLES[style] for style in styles])[0]
    edge, edge_rgb = None, rgb
    if style == "edged":
        edge = "black" if draws.random() < 0.55 else _any_colour(draws)
        edge_rgb = _shade(edge, draws)
        if edge == colour or _difference(edge_rgb, rgb) < 80:
            edge, edge_rgb, style = None, rgb, "filled"
    widths = (0.1, 0.28) if style == "outline" else (0.03, 0.14)
    edge_width = max(1.0, radius * draws.uniform(*widths)) if style != "filled" else 0.0
    corners = tuple(
        (x + across * (radius - edge_width / 2), y + down * (radius - edge_width / 2))
        for across, down in shape_corners(name, draws)
    )
    return Shape(name, colour, rgb, corners, style, edge, edge_rgb, edge_width)


def _paint_shape(canvas: ImageDraw.ImageDraw, shape: Shape, scale: int) -> None:
    corners = [(x * scale, y * scale) for x, y in shape.corners]
    if shape.style != "outline":
        canvas.polygon(corners, fill=shape.rgb)
    if shape.style != "filled":
        line = [*corners, *corners[:2]]  # once more along the first side, so that its corner is joined too
        canvas.line(line, fill=shape.edge_rgb, width=max(1, round(shape.edge_width * scale)), joint="curve")

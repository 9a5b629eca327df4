"""Drawings of coloured shapes and questions about them, made by code: the source ``drawings:N``.

There are N pictures of one to four shapes, in many colours, sizes, positions and backgrounds, filled or as
outlines. Each has four questions, in many wordings: about its colours; about its shapes; whether there is a
certain shape (with yes as often as no); and about what it shows, how many shapes there are, or the colour of
the background. American questions ("color") are answered with gray, British ones ("colour") with grey.

The split and a picture's number decide everything about it. ``drawings:100`` are the first hundred of
``drawings:200``, and the split test has other pictures than train.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageOps

from llama_adapter.common.errors import UsageError

DRAWINGS = "drawings"  # the source's name, before the colon and the number of pictures
_MOST = 1_000_000

RGB = tuple[int, int, int]
Point = tuple[float, float]

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
_COLOUR_WEIGHTS = [0.5 if name in ("teal", "turquoise") else 1.0 for name in COLOURS]
_NEAR = {"teal", "turquoise", "green", "blue"}  # people do not agree where one of these ends

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
_UNSURE = {("rectangle", "square"), ("oval", "circle"), ("diamond", "square"), ("square", "diamond")}

_COUNTS = ("no", "one", "two", "three", "four")
_SIDES = (32, 48, 64, 64, 64, 96, 100, 128, 128, 150, 160, 200, 224, 224, 224, 256, 256, 300, 320, 400)

_PICTURES = ("picture", "image", "picture", "image", "drawing")
_FIGURES = ("shape", "shape", "shape", "figure", "object")

# {thing} is a shape's name or "shape", {colour} the word in its spelling, {picture} what it is called.
_COLOUR_QUESTIONS = (
    "What {colour} is the {thing}?",
    "What {colour} is the {thing} in the {picture}?",
    "What is the {colour} of the {thing}?",
    "Which {colour} is the {thing}?",
    "What is the {thing}'s {colour}?",
    "Which {colour} does the {thing} have?",
    "Name the {colour} of the {thing}.",
    "Tell me the {colour} of the {thing}.",
    "In what {colour} is the {thing} drawn?",
    "The {thing} is what {colour}?",
)
_COLOUR_QUESTIONS_FOR_ONE = (
    "What {colour} is it?",
    "What {colour} is this?",
    "What {colour} is this {thing}?",
    "Which {colour} do you see on the {thing}?",
)
_SHAPE_QUESTIONS_FOR_ONE = (
    "What shape is this?",
    "What shape is it?",
    "What shape is in the {picture}?",
    "What shape is shown in the {picture}?",
    "What shape is present?",
    "What shape does the {picture} contain?",
    "What shape does the {picture} show?",
    "Which shape is this?",
    "Which shape is in the {picture}?",
    "What shape do you see?",
    "What shape is drawn here?",
    "What kind of shape is this?",
    "What geometric shape is this?",
    "What is the shape?",
    "What is the shape in the {picture}?",
    "What is this shape called?",
    "Name the shape.",
    "Name the shape in the {picture}.",
    "What figure is this?",
)
_SHAPE_QUESTIONS = (
    "What is the {named} shape?",
    "What shape is {named}?",
    "Which shape is {named}?",
    "What shape is the {named} figure?",
    "What shape is the {named} object?",
    "What shape is the {named} one?",
    "What is the shape of the {named} object?",
)
_DESCRIPTION_QUESTIONS = (
    "What is in this picture?",
    "What is in this picture?",
    "What is in the {picture}?",
    "What is in this {picture}?",
    "What does the {picture} show?",
    "What does this {picture} show?",
    "What is shown in the {picture}?",
    "What do you see?",
    "What do you see in this {picture}?",
    "What can you see in the {picture}?",
    "Describe the {picture}.",
    "Describe this {picture}.",
    "What is this?",
    "What is this {a_picture} of?",
    "What is drawn here?",
    "What has been drawn?",
)
_PRESENCE_QUESTIONS = (
    "Is there {a}?",
    "Is there {a} in the {picture}?",
    "Is there {a} in this {picture}?",
    "Is {a} present?",
    "Is {a} in the {picture}?",
    "Does the {picture} contain {a}?",
    "Does this {picture} contain {a}?",
    "Does the {picture} show {a}?",
    "Does this {picture} have {a} in it?",
    "Can you see {a}?",
    "Do you see {a}?",
    "Do you see {a} in the {picture}?",
    "Can {a} be seen?",
    "Is there any {thing} in the {picture}?",
    "Are there any {things}?",
    "Are there any {things} in the {picture}?",
)
_ABSENCE_QUESTIONS = (  # as easy-VQA asks them
    "Is there not {a}?",
    "Is there not {a} in the {picture}?",
    "Is {a} not present?",
    "Is no {thing} present?",
    "Does the {picture} not contain {a}?",
    "Is the {picture} without {a}?",
)
_BACKGROUND_QUESTIONS = (
    "What {colour} is the background?",
    "What is the {colour} of the background?",
    "What is the background's {colour}?",
    "What is the background {colour}?",
    "Which {colour} is the background?",
    "On what {colour} is the {thing} drawn?",
)
_COUNT_QUESTIONS = (
    "How many {things} are there?",
    "How many {things} are in the {picture}?",
    "How many {things} are there in this {picture}?",
    "How many {things} do you see?",
    "How many {things} can you see?",
    "How many {things} does the {picture} show?",
)


@dataclass(frozen=True)
class _Shape:
    """A shape as it is drawn: its corners are in pixels."""

    name: str
    colour: str
    rgb: RGB
    corners: tuple[Point, ...]
    style: str  # "filled", "edged" (filled, with an edge of another colour), "outline" (not filled)
    edge: str | None  # the name of the edge's colour, if it differs
    edge_rgb: RGB
    edge_width: float


@dataclass(frozen=True)
class _Drawing:
    """The content of a picture. `background` is the colour's name if the background has only one."""

    shapes: tuple[_Shape, ...]
    background: str | None


@dataclass(frozen=True)
class _Ground:
    """A background: its pattern, its colours, and its name if it has one."""

    pattern: str
    colours: tuple[RGB, ...]
    name: str | None


def drawing_rows(source: str, split: str | None = None) -> tuple[list[dict[str, Any]], str]:
    """The rows of ``drawings:N``, with PNG files as pictures, and a SHA-256 of them.

    Raises UsageError for a source without a number.
    """
    count = source.removeprefix(f"{DRAWINGS}:")
    if not count.isdecimal() or not 0 < int(count) <= _MOST:
        raise UsageError(
            f"{source}: {count!r} is not a number of drawings; expected {DRAWINGS}:N, N from 1 to {_MOST:,}"
        )
    rows: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    for number in range(int(count)):
        draws = random.Random(f"{split or 'train'} {number}")
        picture, drawing = _draw(draws)
        digest.update(picture)
        for question, answer in _questions(drawing, draws):
            digest.update(f"{question}\n{answer}\n".encode())
            rows.append({"image": picture, "question": question, "answer": answer})
    return rows, digest.hexdigest()


def is_drawings(source: object) -> bool:
    """Whether a source is one of drawings."""
    return str(source).startswith(f"{DRAWINGS}:")


# --- pictures -----------------------------------------------------------------------------------------------


def _draw(draws: random.Random) -> tuple[bytes, _Drawing]:
    """A picture as a PNG file, and what is on it."""
    width = height = draws.choice(_SIDES)
    if draws.random() < 0.15:  # slightly: a tower may squeeze a picture, and a circle with it
        width = round(width * draws.uniform(1.0, 1.3))
        if draws.random() < 0.5:
            width, height = height, width
    ground = _choose_ground(draws)
    boxes = _choose_boxes(width, height, draws)
    shapes = [_choose_shape(box, ground, draws) for box in boxes]
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
    return file.getvalue(), _Drawing(tuple(shapes), ground.name)


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
    return draws.choices(list(COLOURS), _COLOUR_WEIGHTS)[0]


def _choose_ground(draws: random.Random) -> _Ground:
    kind = draws.random()
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


def _choose_shape(box: tuple[float, float, float], ground: _Ground, draws: random.Random) -> _Shape:
    """A shape in a colour that stands out from the background."""
    x, y, radius = box
    name = draws.choices(list(SHAPES), _SHAPE_WEIGHTS)[0]
    while True:
        colour = _any_colour(draws)
        rgb = _shade(colour, draws)
        if colour != ground.name and all(_difference(rgb, other) > 150 for other in ground.colours):
            break
    style = draws.choices(("filled", "edged", "outline"), (0.6, 0.27, 0.13))[0]
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
        for across, down in _corners(name, draws)
    )
    return _Shape(name, colour, rgb, corners, style, edge, edge_rgb, edge_width)


def _paint_shape(canvas: ImageDraw.ImageDraw, shape: _Shape, scale: int) -> None:
    corners = [(x * scale, y * scale) for x, y in shape.corners]
    if shape.style != "outline":
        canvas.polygon(corners, fill=shape.rgb)
    if shape.style != "filled":
        line = [*corners, *corners[:2]]  # once more along the first side, so that its corner is joined too
        canvas.line(line, fill=shape.edge_rgb, width=max(1, round(shape.edge_width * scale)), joint="curve")


def _corners(name: str, draws: random.Random) -> list[Point]:
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


# --- questions ----------------------------------------------------------------------------------------------


class _Asking:
    """Words one question: chooses the spelling, and names for the picture and its shapes."""

    def __init__(self, drawing: _Drawing, draws: random.Random) -> None:
        self.drawing, self.draws = drawing, draws
        self.british = draws.random() < 0.5
        self.words = {
            "colour": "colour" if self.british else "color",
            "picture": draws.choice(_PICTURES),
        }
        self.words["a_picture"] = _article(self.words["picture"])

    def name(self, colour: str) -> str:
        return "gray" if colour == "grey" and not self.british else colour

    def word(self, questions: Sequence[str], **words: str) -> str:
        return self.draws.choice(questions).format(
            **{**self.words, "things": _plural(words.get("thing", "")), **words}
        )

    def colour(self) -> tuple[str, str]:
        named = [shape.name for shape in self.drawing.shapes]
        alone = len(named) == 1
        known = [shape for shape in self.drawing.shapes if named.count(shape.name) == 1]
        if not known:
            return self.presence()
        shape = self.draws.choice(known)
        if shape.edge is not None and alone and self.draws.random() < 0.08:
            outline = self.draws.choice(("outline", "edge", "border"))
            return self.word(_COLOUR_QUESTIONS[:4], thing=outline), self.name(shape.edge)
        if alone and self.draws.random() < 0.07:
            colours = [shape.colour, self.other_colour()]
            self.draws.shuffle(colours)
            first, second = map(self.name, colours)
            thing = self.draws.choice((shape.name, "shape"))
            return f"Is the {thing} {first} or {second}?", self.name(shape.colour)
        thing = self.draws.choice(_FIGURES) if alone and self.draws.random() < 0.5 else shape.name
        questions = _COLOUR_QUESTIONS + (_COLOUR_QUESTIONS_FOR_ONE if alone else ())
        return self.word(questions, thing=thing), self.name(shape.colour)

    def shape(self) -> tuple[str, str]:
        colours = [shape.colour for shape in self.drawing.shapes]
        alone = len(colours) == 1
        known = [shape for shape in self.drawing.shapes if colours.count(shape.colour) == 1]
        if not known:
            return self.presence()
        shape = self.draws.choice(known)
        if alone and self.draws.random() < 0.07:
            names = [shape.name, self.other_shape()]
            self.draws.shuffle(names)
            return f"Is the shape {_article(names[0])} or {_article(names[1])}?", shape.name
        if alone and self.draws.random() < 0.75:
            return self.word(_SHAPE_QUESTIONS_FOR_ONE), shape.name
        return self.word(_SHAPE_QUESTIONS, named=self.name(shape.colour)), shape.name

    def description(self) -> tuple[str, str]:
        self.british = False  # the question does not show which spelling is wanted
        shapes = [_article(f"{self.name(shape.colour)} {shape.name}") for shape in self.drawing.shapes]
        text = " and ".join([", ".join(shapes[:-1]), shapes[-1]] if len(shapes) > 1 else shapes)
        return self.word(_DESCRIPTION_QUESTIONS), f"{text[0].upper()}{text[1:]}."

    def background(self) -> tuple[str, str]:
        if self.drawing.background is None:
            return self.presence()
        asked = self.draws.choice(_FIGURES[:4])
        return self.word(_BACKGROUND_QUESTIONS, thing=asked), self.name(self.drawing.background)

    def count(self) -> tuple[str, str]:
        shapes = self.drawing.shapes
        if len(shapes) > 1 and self.draws.random() < 0.3:
            name = self.draws.choice(shapes).name
            return self.word(_COUNT_QUESTIONS, thing=name), _COUNTS[sum(own.name == name for own in shapes)]
        return self.word(_COUNT_QUESTIONS, thing=self.draws.choice(_FIGURES)), _COUNTS[len(shapes)]

    def presence(self) -> tuple[str, str]:
        """Whether something is there. Yes and no are equally likely, whatever is asked and how."""
        there = self.draws.random() < 0.5
        shape = self.draws.choice(self.drawing.shapes)
        asks = self.draws.choice(("both", "both", "shape", "shape", "colour"))
        colour, name = shape.colour, shape.name
        if not there:
            wrong = asks if asks != "both" else self.draws.choice(("shape", "colour", "colour", "both"))
            if wrong in ("colour", "both"):
                colour = self.other_colour()
            if wrong in ("shape", "both"):
                name = self.other_shape()
            pairs = {(own.colour, own.name) for own in self.drawing.shapes}
            crossed = (shape.colour, self.draws.choice(self.drawing.shapes).name)
            if asks == "both" and crossed not in pairs:  # the colour of one, the shape of another
                colour, name = crossed
        if self.draws.random() < 0.1 and (others := SHAPES[name][1]):
            name = self.draws.choice(others)
        colour = self.name(colour)
        thing = {"both": f"{colour} {name}", "shape": name, "colour": f"{colour} shape"}[asks]
        if len(self.drawing.shapes) == 1 and self.draws.random() < 0.25:
            return self.word(self.whether_it_is(asks, colour, name, shape)), _yes(there)
        negated = self.draws.random() < 0.12
        questions = _ABSENCE_QUESTIONS if negated else _PRESENCE_QUESTIONS
        return self.word(questions, a=_article(thing), thing=thing), _yes(there is not negated)

    def whether_it_is(self, asks: str, colour: str, name: str, shape: _Shape) -> list[str]:
        """Questions about the only shape. The answer is yes if it has the colour, the name or both."""
        if asks == "colour":
            return [f"Is the shape {colour}?", f"Is it {colour}?", f"Is the {shape.name} {colour}?"]
        if asks == "shape":
            a = _article(name)
            own = self.name(shape.colour)
            return [f"Is the shape {a}?", f"Is it {a}?", f"Is this {a}?", f"Is the {own} shape {a}?"]
        a = _article(f"{colour} {name}")
        return [f"Is it {a}?", f"Is this {a}?", f"Is the shape {a}?"]

    def other_colour(self) -> str:
        """A colour that no shape and no edge has."""
        used = {shape.colour for shape in self.drawing.shapes}
        out = used | {shape.edge for shape in self.drawing.shapes if shape.edge}
        if used & {"teal", "turquoise"}:
            out |= _NEAR
        elif used & _NEAR:
            out |= {"teal", "turquoise"}
        left = {
            name: weight for name, weight in zip(COLOURS, _COLOUR_WEIGHTS, strict=True) if name not in out
        }
        return self.draws.choices(list(left), list(left.values()))[0]

    def other_shape(self) -> str:
        """The name of a shape that is not there."""
        there = {shape.name for shape in self.drawing.shapes}
        left = {
            name: weight
            for name, (weight, _) in SHAPES.items()
            if name not in there and not any((name, own) in _UNSURE for own in there)
        }
        return self.draws.choices(list(left), list(left.values()))[0]


def _questions(drawing: _Drawing, draws: random.Random) -> list[tuple[str, str]]:
    """Four questions about a drawing, each different, with their answers."""
    fourth = draws.choices(("description", "presence", "background", "count"), (0.45, 0.25, 0.15, 0.15))[0]
    asked: dict[str, str] = {}
    for kind in ("colour", "shape", "presence", fourth):
        while True:
            question, answer = getattr(_Asking(drawing, draws), kind)()
            question = _as_typed(question, answer, draws)
            if question not in asked:
                break
        asked[question] = answer
    return list(asked.items())


def _as_typed(question: str, answer: str, draws: random.Random) -> str:
    """The question as people type it: some in lower case, without a mark, or with a wish for the answer."""
    typed = draws.random()
    if typed < 0.3:
        question = question[0].lower() + question[1:]
    if typed < 0.04:
        question = question.rstrip("?.")
    elif typed > 0.9 and " " not in answer:
        wishes = ("Answer with one word.", "Answer in one word.")
        question += (
            f" {draws.choice(('Answer yes or no.', 'Yes or no?') if answer in ('yes', 'no') else wishes)}"
        )
    return question


def _article(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeio' else 'a'} {thing}"


def _plural(thing: str) -> str:
    return f"{thing}es" if thing.endswith("s") else f"{thing}s"


def _yes(true: bool) -> str:
    return "yes" if true else "no"

"""The page's examples, each with what a right answer to it is. A test asks every one of them.

What is shipped for our bases answers them rightly, whatever the seed, but for those marked as too hard for a
base: change them together with it.
The photo is free of rights: see photos/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageDraw

from llama_adapter.answering.questions import Check
from llama_adapter.data.pictures import open_picture
from llama_adapter.weights.catalogue import SMALL_BASE


@dataclass(frozen=True)
class Example:
    """A question that the chat suggests.

    Attributes:
        check: what a right answer has to be.
        picture: what the question is about; None for a question without a picture.
        too_hard_for: bases whose shipped adapters answer it wrongly.
    """

    text: str
    check: Check
    picture: Image.Image | None = None
    too_hard_for: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScienceExample:
    """A question of our own in the style of ScienceQA, with its options, the right one and the context.

    `picture` and `too_hard_for` are as in `Example`.
    """

    text: str
    options: tuple[str, ...]
    right: str
    context: str = ""
    picture: Image.Image | None = None
    too_hard_for: tuple[str, ...] = ()


AnyExample = TypeVar("AnyExample", Example, ScienceExample)


def fitting(examples: Iterable[AnyExample], base: str) -> list[AnyExample]:
    """Those that are not too hard for what is shipped for a base."""
    return [example for example in examples if base not in example.too_hard_for]


def _draw_triangle(canvas: ImageDraw.ImageDraw) -> None:
    canvas.polygon([(250, 100), (90, 400), (420, 380)], fill="#2040d0")


def _draw_circle(canvas: ImageDraw.ImageDraw) -> None:
    canvas.ellipse((100, 100, 400, 400), fill="#f0d020")


def _drawn(draw: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
    """A shape, drawn large and scaled down, so that its edges are smooth."""
    image = Image.new("RGB", (512, 512), "#eef3f6")
    draw(ImageDraw.Draw(image))
    return image.resize((256, 256))


def _photo(name: str) -> Image.Image:
    return open_picture(Path(__file__).with_name("photos") / name)


_SMALL = (SMALL_BASE,)
_TRIANGLE = _drawn(_draw_triangle)

TEXT_EXAMPLES = (
    Example("What is the capital of France?", Check(words=["paris"])),
    Example(
        "Give three tips for staying healthy.",
        Check(
            least=2,
            of=["eat(?:ing)?|diet|foods?|nutri.*", "exercis.*|active|activity|walk.*", "sleep|rest", "water"],
        ),
    ),
    Example("Name three primary colors.", Check(all=["red", "blue", "yellow|green"])),
    Example("What is the opposite of hot?", Check(words=["cold"])),
)
PICTURE_EXAMPLES = (
    Example("What animal is this?", Check(words=["cat", "kitten"]), _photo("cat.jpg"), _SMALL),
    Example("What is in this picture?", Check(all=["yellow", "circle"]), _drawn(_draw_circle), _SMALL),
    Example(
        "What shape is in the image?",
        Check(first=["triangle"], others=["square", "circle", "rectangle"]),
        _TRIANGLE,
    ),
)
SCIENCE_EXAMPLES = (
    ScienceExample(
        "Which cup of tea cools down faster?",
        ("the one outside", "the one in the kitchen"),
        "the one outside",
        "Two cups of tea are equally hot. One stands in a warm kitchen, the other outside in the snow.",
    ),
    ScienceExample("What is the capital of Ohio?", ("Columbus", "Denver", "Salem"), "Columbus"),
    ScienceExample(
        "Which part of a plant takes up water from the soil?", ("the roots", "the flowers"), "the roots"
    ),
    ScienceExample(
        "What shape is shown?",
        ("triangle", "square", "circle"),
        "triangle",
        picture=_TRIANGLE,
        too_hard_for=_SMALL,
    ),
)

"""The page's examples, each with what a right answer to it is. A test asks every one of them.

Change them together with the default base: they are to be answered rightly and steadily by what is shipped.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw

from llama_adapter.answering.questions import Check


@dataclass(frozen=True)
class Example:
    """A question that the chat suggests.

    Attributes:
        check: what a right answer has to be.
        picture: what the question is about; None for a question without a picture.
    """

    text: str
    check: Check
    picture: Image.Image | None = None


@dataclass(frozen=True)
class ScienceExample:
    """A question of our own in the style of ScienceQA, with its options, the right one and the context."""

    text: str
    options: tuple[str, ...]
    right: str
    context: str = ""
    picture: Image.Image | None = None


def _draw(shape: str, colour: str, *, ground: str = "#eef3f6") -> Image.Image:
    """A shape in one colour, drawn large and scaled down, so that its edges are smooth."""
    image = Image.new("RGB", (512, 512), ground)
    canvas = ImageDraw.Draw(image)
    if shape == "circle":
        canvas.ellipse((120, 130, 380, 390), fill=colour)
    else:
        canvas.polygon([(250, 100), (90, 400), (420, 380)], fill=colour)
    return image.resize((256, 256))


_CIRCLE, _TRIANGLE = _draw("circle", "#e02020"), _draw("triangle", "#2040d0")

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
    Example(
        "What color is the circle?",
        Check(first=["red"], others=["blue", "white", "black", "green", "gray", "teal", "yellow", "orange"]),
        _CIRCLE,
    ),
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
    ScienceExample(
        "Which object is attracted by a magnet?",
        ("wooden spoon", "iron nail", "rubber ball"),
        "iron nail",
    ),
    ScienceExample("What is the capital of France?", ("Paris", "Berlin", "Rome"), "Paris"),
    ScienceExample("Which shape is this?", ("triangle", "circle"), "triangle", picture=_TRIANGLE),
)

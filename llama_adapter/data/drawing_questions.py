"""Questions about a drawing, in many wordings, with their answers; and captions of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from llama_adapter.data.drawn_picture import COLOUR_WEIGHTS, COLOURS, NEAR, SHAPES, UNSURE, Drawing, Shape

_COUNTS = ("no", "one", "two", "three", "four")

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


class _Asking:
    """Words one question: chooses the spelling, and names for the picture and its shapes."""

    def __init__(self, drawing: Drawing, draws: random.Random) -> None:
        self.drawing, self.draws = drawing, draws
        self.british = draws.random() < 0.5
        self.words = {
            "colour": "colour" if self.british else "color",
            "picture": draws.choice(_PICTURES),
        }
        self.words["a_picture"] = with_article(self.words["picture"])

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
            return f"Is the shape {with_article(names[0])} or {with_article(names[1])}?", shape.name
        if alone and self.draws.random() < 0.75:
            return self.word(_SHAPE_QUESTIONS_FOR_ONE), shape.name
        return self.word(_SHAPE_QUESTIONS, named=self.name(shape.colour)), shape.name

    def description(self) -> tuple[str, str]:
        self.british = False  # the question does not show which spelling is wanted
        return self.word(_DESCRIPTION_QUESTIONS), sentence(self.shapes())

    def shapes(self) -> str:
        """All shapes with their colours: "a red circle and a blue square"."""
        shapes = [with_article(f"{self.name(shape.colour)} {shape.name}") for shape in self.drawing.shapes]
        return " and ".join([", ".join(shapes[:-1]), shapes[-1]] if len(shapes) > 1 else shapes)

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
        return self.word(questions, a=with_article(thing), thing=thing), _yes(there is not negated)

    def whether_it_is(self, asks: str, colour: str, name: str, shape: Shape) -> list[str]:
        """Questions about the only shape. The answer is yes if it has the colour, the name or both."""
        if asks == "colour":
            return [f"Is the shape {colour}?", f"Is it {colour}?", f"Is the {shape.name} {colour}?"]
        if asks == "shape":
            a = with_article(name)
            own = self.name(shape.colour)
            return [f"Is the shape {a}?", f"Is it {a}?", f"Is this {a}?", f"Is the {own} shape {a}?"]
        a = with_article(f"{colour} {name}")
        return [f"Is it {a}?", f"Is this {a}?", f"Is the shape {a}?"]

    def other_colour(self) -> str:
        """A colour that no shape and no edge has."""
        used = {shape.colour for shape in self.drawing.shapes}
        out = used | {shape.edge for shape in self.drawing.shapes if shape.edge}
        if used & {"teal", "turquoise"}:
            out |= NEAR
        elif used & NEAR:
            out |= {"teal", "turquoise"}
        left = {name: weight for name, weight in zip(COLOURS, COLOUR_WEIGHTS, strict=True) if name not in out}
        return self.draws.choices(list(left), list(left.values()))[0]

    def other_shape(self) -> str:
        """The name of a shape that is not there."""
        there = {shape.name for shape in self.drawing.shapes}
        left = {
            name: weight
            for name, (weight, _) in SHAPES.items()
            if name not in there and not any((name, own) in UNSURE for own in there)
        }
        return self.draws.choices(list(left), list(left.values()))[0]


def ask_about(drawing: Drawing, draws: random.Random, *, colours: bool = False) -> list[tuple[str, str]]:
    """Four questions about a drawing, each different, with their answers.

    Args:
        colours: ask mostly about colours, that of the background too.
    """
    if colours:
        kinds = ["colour", "colour", "background", draws.choice(("description", "presence"))]
    else:
        others = ("description", "presence", "background", "count")
        kinds = ["colour", "shape", "presence", draws.choices(others, (0.45, 0.25, 0.15, 0.15))[0]]
    asked: dict[str, str] = {}
    for kind in kinds:
        while True:
            question, answer = getattr(_Asking(drawing, draws), kind)()
            question = _as_typed(question, answer, draws)
            if question not in asked:
                break
        asked[question] = answer
    return list(asked.items())


def caption(drawing: Drawing, draws: random.Random) -> tuple[str, ...]:
    """Captions that name the shapes, their colours and, if it has one, the background's colour."""
    asking = _Asking(drawing, draws)
    shapes = asking.shapes()
    ground = drawing.background
    place = "" if ground is None else f" on {with_article(f'{asking.name(ground)} background')}"
    return f"{shapes}{place}.", f"{shapes}.", f"{with_article(asking.words['picture'])} of {shapes}{place}."


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


def with_article(thing: str) -> str:
    """The thing with "a" or "an" before it, by its first letter."""
    return f"{'an' if thing[0].lower() in 'aeiou' else 'a'} {thing}"


def sentence(text: str) -> str:
    """The text with a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def _plural(thing: str) -> str:
    return f"{thing}es" if thing.endswith("s") else f"{thing}s"


def _yes(true: bool) -> str:
    return "yes" if true else "no"

"""Rows about photos -> yes/no questions about what is there and what is not: the source ``objects:SOURCE``.

A photo shows an object if a caption, a question or an answer about it names the object. But captions leave
things out. So a photo counts as one without the object only under two conditions: nothing names the object,
and everything that is named is rarely seen together with it (in at most 5 of 100 photos). Each object gets
equally many questions with yes and with no.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_adapter.common.errors import UsageError
from llama_adapter.data.row_formats import read_row
from llama_adapter.data.row_pictures import FILE_COLUMNS, PICTURE_COLUMNS, PictureFile

OBJECTS = "objects"  # the source's name, before the colon and the source of the photos
_RARELY = 0.05

# The objects, with other words that name them. The plurals of all these words count too.
_WORDS = {
    "person": "people man men woman women boy girl child children kid baby lady guy gentleman toddler player "
    "skier surfer snowboarder skateboarder rider biker cyclist hiker climber runner swimmer crowd",
    "dog": "puppy puppies",
    "cat": "kitten",
    "horse": "pony ponies",
    "cow": "cattle bull calf",
    "sheep": "lamb",
    "bird": "duck goose geese seagull parrot pigeon owl",
    "elephant": "",
    "giraffe": "",
    "zebra": "",
    "bear": "",
    "car": "taxi van automobile",
    "bus": "buses",
    "truck": "lorry",
    "train": "locomotive",
    "motorcycle": "motorbike",
    "bicycle": "bike",
    "airplane": "plane jet aircraft aeroplane airliner",
    "boat": "ship sailboat canoe kayak",
    "clock": "",
    "bench": "benches",
    "chair": "armchair",
    "table": "",
    "bed": "",
    "sofa": "couch couches",
    "toilet": "urinal",
    "sink": "",
    "refrigerator": "fridge",
    "television": "tv",
    "computer": "laptop keyboard monitor",
    "phone": "cellphone telephone",
    "book": "",
    "vase": "",
    "umbrella": "parasol",
    "kite": "",
    "ball": "",
    "frisbee": "",
    "skateboard": "",
    "surfboard": "",
    "pizza": "",
    "sandwich": "sandwiches burger hamburger",
    "cake": "cupcake",
    "donut": "doughnut",
    "banana": "",
    "hydrant": "",
    "hat": "cap helmet",
    "tree": "",
    "flower": "",
}
_OTHER_THINGS = re.compile(r"\b(hot dog|teddy bear|toy \w+|table ?cloth|flower ?pot)s?\b")
_ASKED = {"hydrant": "fire hydrant"}

_QUESTIONS = (
    "Is there {a}?",
    "Is there {a} in the {picture}?",
    "Is there {a} in this {picture}?",
    "Is {a} in the {picture}?",
    "Can you see {a}?",
    "Can you see {a} in the {picture}?",
    "Do you see {a} in this {picture}?",
    "Does the {picture} show {a}?",
    "Does this {picture} have {a} in it?",
    "Is {a} visible in the {picture}?",
)
_PICTURES = ("picture", "photo", "image")


def object_rows(rows: Iterable[tuple[int, Any]], root: Path) -> list[dict[str, Any]]:
    """Questions about the pictures of rows. The same rows always give the same questions.

    Args:
        rows: each with its number in its source.
        root: the folder that relative names of pictures start from.

    Raises:
        UsageError: a row of no known form, or rows that name too few objects.
    """
    shown: dict[tuple[PictureFile, ...], set[str]] = {}  # pictures -> what is named
    columns: dict[tuple[PictureFile, ...], dict[str, Any]] = {}
    for number, row in rows:
        try:
            content = read_row(row, number, root)
        except UsageError as error:
            raise UsageError(f"row {number}: {error}") from None
        if len(content.images) != 1:
            continue
        words = shown.setdefault(content.images, set())
        columns.setdefault(
            content.images,
            {name: row[name] for name in (*PICTURE_COLUMNS, *FILE_COLUMNS, "split") if name in row},
        )
        for turns in content.conversations:
            if turns[-1].text.strip().lower().rstrip(".") not in ("yes", "no"):
                words |= _named(turn.text for turn in turns)
    splits: dict[Any, list[tuple[PictureFile, ...]]] = {}
    for images, own in columns.items():
        splits.setdefault(own.get("split"), []).append(images)
    asked: list[dict[str, Any]] = []
    for split, pictures in splits.items():
        draws = random.Random(f"objects {split}")
        for images, name, there in _choose({images: shown[images] for images in pictures}, draws):
            thing = _ASKED.get(name, name)
            a = f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
            question = draws.choice(_QUESTIONS).format(a=a, picture=draws.choice(_PICTURES))
            asked.append({**columns[images], "question": question, "answer": "yes" if there else "no"})
    if not asked:
        raise UsageError(
            "its rows name too few objects to ask whether they are there; give photos with captions"
        )
    return asked


def _named(texts: Iterable[str]) -> set[str]:
    texts = (_OTHER_THINGS.sub(" ", text.lower()) for text in texts)
    words = {word for text in texts for word in re.findall(r"[a-z]+", text)}
    return {_NAME_OF[word] for word in words & _NAME_OF.keys()}


def _choose(
    shown: dict[tuple[PictureFile, ...], set[str]], draws: random.Random
) -> list[tuple[tuple[PictureFile, ...], str, bool]]:
    """Pictures, an object, and whether it is there. Each object has as many pictures with it as without."""
    often = Counter(name for names in shown.values() for name in names)
    together = Counter((one, other) for names in shown.values() for one in names for other in names)
    chosen: list[tuple[tuple[PictureFile, ...], str, bool]] = []
    for name in _WORDS:
        rarely = {other for other in often if together[other, name] <= _RARELY * often[other]}
        with_it = [images for images, names in shown.items() if name in names]
        without = [images for images, names in shown.items() if names and names <= rarely]
        count = min(len(with_it), len(without))
        chosen += [(images, name, True) for images in draws.sample(with_it, count)]
        chosen += [(images, name, False) for images in draws.sample(without, count)]
    draws.shuffle(chosen)
    return chosen


_NAME_OF = {
    form: name
    for name, others in _WORDS.items()
    for word in (name, *others.split())
    for form in (word, f"{word}s", f"{word}es")
}

"""Rows to pack that the tests share: with and without a common opening, and with pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from llama_adapter.data.examples import IGNORED, Example
from llama_adapter.data.records import PictureFile
from llama_adapter.packing.pack import SHORTEST_OPENING

OPENING = list(range(3, 3 + SHORTEST_OPENING + 2))


def example(
    question: list[int], answer: list[int], row: int = 1, images: tuple[PictureFile, ...] = ()
) -> Example:
    return Example(question + answer, [IGNORED] * len(question) + answer, images, row)


EXAMPLES = [
    example([*OPENING, 30, 31], [40, 41, 2], 1),
    example([5, 6, 7], [42, 2], 2),
    example([*OPENING, 32], [43, 44, 45, 2], 3),
    example([*OPENING, 30, 33, 34, 35], [46, 2], 4),
]

# Two rows about the cat that share their opening, one without a picture, and one about dog and cat.
CAT, DOG = Path("cat.png"), Path("dog.png")
SEEN = [
    example([*OPENING, 30, 31], [40, 41, 2], 1, (CAT,)),
    example([*OPENING, 30, 31], [40, 2], 2),
    example([*OPENING, 32], [43, 44, 45, 2], 3, (CAT,)),
    example([*OPENING, 30, 33], [46, 2], 4, (DOG, CAT)),
]

tokens = st.lists(st.integers(3, 63), min_size=1, max_size=6)
rows = st.builds(
    lambda opened, question, answer: example(OPENING * opened + question, answer),
    st.booleans(),
    tokens,
    tokens,
)


def loss_one_by_one(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """The summed loss by whole logits, each row alone."""
    total = torch.zeros((), dtype=torch.float64)
    for row in examples:
        logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum")
    return total

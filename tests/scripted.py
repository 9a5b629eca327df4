"""A tiny model whose answers are known beforehand and come as slowly as a test wants to watch them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llama_adapter.generate import Answer
from llama_adapter.model import LlamaAdapter
from llama_adapter.sampling import Sampling
from llama_adapter.template import Turn
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import VISION, build_tiny_decoder


class MeanColour:
    """A tower in whose features a picture's mean red, green and blue, 0 to 255, can be read."""

    key = "mean colour"
    feature_width = VISION.feature_width

    def prepare(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.tensor([image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) for image in images])

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.cat([pixels, torch.zeros(len(pixels), self.feature_width - 3)], dim=1)


def open_eyes(model: LlamaAdapter) -> None:
    """Let the adapters that were made with `VISION` see without a tower to load."""

    def tower(adapter: str | None = None) -> Any:
        model._vision(model._name(adapter))
        return MeanColour()

    model.tower = tower  # type: ignore[method-assign]


class ScriptedModel(LlamaAdapter):
    """Says who it is, repeats the question, names the pictures' colours and counts on as long as it may.

    Attributes:
        delay: seconds for each token.
        made: tokens made so far, in all answers together.
    """

    delay = 0.0
    made = 0

    def stream_chat(
        self,
        turns: str | Sequence[Turn],
        *,
        image: Any = None,
        adapter: str | None = None,
        sampling: Sampling | None = None,
    ) -> Answer:
        question = turns if isinstance(turns, str) else turns[-1].text
        said = f"{self._name(adapter)} heard: {question}\n\n"
        if image is not None:
            features = image if isinstance(image, Tensor) else self.encode_images(image, adapter=adapter)
            said += f"saw: {' '.join(_hex(row) for row in features.tolist())}\n\n"
        said += " ".join(map(str, range(400)))
        limit = (sampling or Sampling()).max_new_tokens
        tokenizer = self._tokenizer()
        self.encode_question(turns, adapter=adapter)

        def tokens() -> Iterator[int]:
            for token in tokenizer.encode(said, add_special_tokens=False)[:limit]:
                time.sleep(self.delay)
                self.made += 1
                yield token

        return Answer(tokens(), tokenizer)


def _hex(features: list[float]) -> str:
    return "#" + "".join(f"{round(value):02x}" for value in features[:3])


def build_scripted_model(
    *, names: tuple[str, ...] = ("one", "two"), seeing: tuple[str, ...] = (), delay: float = 0.0
) -> ScriptedModel:
    """A scripted model with adapters, those in ``seeing`` with eyes; the first of ``names`` is active."""
    tokenizer = build_tiny_tokenizer()
    decoder = build_tiny_decoder(vocab_size=len(tokenizer), max_position_embeddings=20_000)
    model = ScriptedModel(decoder, tokenizer, base="tiny-base")
    for name in names:
        model.new_adapter(name, prompt_length=3, seed=1)
    for name in seeing:
        model.new_adapter(name, prompt_length=3, vision=VISION, seed=1)
    open_eyes(model)
    model.set_adapter(names[0])
    model.delay = delay
    return model

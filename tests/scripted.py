"""A tiny model whose answers are known beforehand and come as slowly as a test wants to watch them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from llama_adapter.decoding.question import Question, Request
from llama_adapter.methods.part import Part
from llama_adapter.methods.state import AdapterState
from llama_adapter.model import LlamaAdapter
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
        model.vision_config(model.answering_adapter(adapter, pictured=True))
        return MeanColour()

    model.tower = tower  # type: ignore[method-assign]


class Script(Part):
    """Says in a batch whose row is whose: (R, 1, 2), the script's number and how long its question is."""

    kind = "script"


class ScriptedModel(LlamaAdapter):
    """Says who it is, repeats the question, names the pictures' colours and counts on as long as it may.

    Attributes:
        delay: seconds for each token.
        held: while it is set, no token is made.
        made: tokens made so far, in all answers together.
    """

    delay = 0.0
    made = 0
    held = False

    def prepare_request(self, question: Question) -> Request:
        request = super().prepare_request(question)
        said = f"{request.adapter} heard: {question.turns[-1].text}\n\n"
        if request.features is not None:
            said += f"saw: {' '.join(_hex(row) for row in request.features.tolist())}\n\n"
        said += " ".join(map(str, range(400)))
        self._scripts.append(self._tokenizer().encode(said, add_special_tokens=False))
        coded = [len(self._scripts) - 1, request.tokens.shape[1]]
        state = AdapterState(self.shape.num_layers, {Script: {"coded": torch.tensor([[coded]])}})
        return replace(request, adapter=state, features=None)

    @property
    def _scripts(self) -> list[list[int]]:
        scripts: list[list[int]] = self.__dict__.setdefault("scripts", [])
        return scripts

    def forward(self, input_ids: Any = None, **kwargs: Any) -> CausalLMOutputWithPast:
        """Logits of the next word of each row's script."""
        adapter = kwargs.get("adapter")
        if not isinstance(adapter, AdapterState) or Script not in adapter.parts:
            return super().forward(input_ids, **kwargs)
        time.sleep(self.delay)
        while self.held:
            time.sleep(0.01)
        rows, length = input_ids.shape
        self.made += rows
        cache = kwargs["past_key_values"]
        cache = DynamicCache() if cache is None else cache  # an empty one is no less a cache
        states = torch.zeros(rows, 1, length, 1)
        cache.update(states, states, 0)
        read = kwargs.get("position_ids", torch.tensor([[cache.get_seq_length() - 1]]))[:, -1] + 1
        logits = torch.zeros(rows, 1, self.shape.vocab_size)
        coded = adapter.parts[Script]["coded"][:, 0].expand(rows, 2)
        for row, ((script, question), place) in enumerate(zip(coded, read.expand(rows), strict=True)):
            words = [*self._scripts[script], self._tokenizer().eos_token_id]
            logits[row, 0, words[place - question]] = 1e4
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


def _hex(features: list[float]) -> str:
    return "#" + "".join(f"{round(value):02x}" for value in features[:3])


def build_scripted_model(
    *, names: tuple[str, ...] = ("one", "two"), seeing: tuple[str, ...] = (), delay: float = 0.0
) -> ScriptedModel:
    """A scripted model with adapters, those in ``seeing`` with eyes; the first of ``names`` is active."""
    tokenizer = build_tiny_tokenizer()
    decoder = build_tiny_decoder(vocab_size=len(tokenizer), max_position_embeddings=20_000)
    model = ScriptedModel(decoder, tokenizer, base="tiny-base")
    for name in (*names, *seeing):
        vision = VISION if name in seeing else None
        adapter = model.new_adapter(name, prompt_length=3, vision=vision, seed=1)
        torch.nn.init.normal_(adapter.prompts.gates, generator=torch.Generator().manual_seed(1))
    open_eyes(model)
    model.set_adapter(names[0])
    model.delay = delay
    return model

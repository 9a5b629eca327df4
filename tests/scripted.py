"""A tiny model whose answers are known beforehand and come as slowly as a test wants to watch them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from llama_adapter.generate import Answer
from llama_adapter.model import LlamaAdapter
from llama_adapter.sampling import Sampling
from llama_adapter.template import Turn
from tests.tiny import build_tiny_tokenizer
from tests.tiny_models import build_tiny_decoder


class ScriptedModel(LlamaAdapter):
    """Says who it is, repeats the question and counts on for as long as it may.

    Attributes:
        delay: seconds for each token.
        made: tokens made so far, in all answers together.
    """

    delay = 0.0
    made = 0

    def stream_chat(
        self, turns: str | Sequence[Turn], *, adapter: str | None = None, sampling: Sampling | None = None
    ) -> Answer:
        question = turns if isinstance(turns, str) else turns[-1].text
        said = f"{self._name(adapter)} heard: {question}\n\n" + " ".join(map(str, range(400)))
        limit = (sampling or Sampling()).max_new_tokens
        tokenizer = self._tokenizer()
        self.encode_question(turns, adapter=adapter)

        def tokens() -> Iterator[int]:
            for token in tokenizer.encode(said, add_special_tokens=False)[:limit]:
                time.sleep(self.delay)
                self.made += 1
                yield token

        return Answer(tokens(), tokenizer)


def build_scripted_model(*, names: tuple[str, ...] = ("one", "two"), delay: float = 0.0) -> ScriptedModel:
    """A scripted model with adapters; the first of ``names`` is the active one."""
    tokenizer = build_tiny_tokenizer()
    decoder = build_tiny_decoder(vocab_size=len(tokenizer), max_position_embeddings=20_000)
    model = ScriptedModel(decoder, tokenizer, base="tiny-base")
    for name in names:
        model.new_adapter(name, prompt_length=3, seed=1)
    model.set_adapter(names[0])
    model.delay = delay
    return model

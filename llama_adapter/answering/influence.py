"""Where an adapter acts: its gates, and how far each layer's prompts moved the tokens of an answer.

Shapes: L adapted layers, H heads, T tokens of the answer, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_adapter.common.errors import UsageError
from llama_adapter.data.templates import Turn, encode_dialogues
from llama_adapter.methods.prompts import Prompts
from llama_adapter.model import NO_ADAPTER, LlamaAdapter


@dataclass(frozen=True)
class Influence:
    """How far the prompts of each layer moved an answer.

    Attributes:
        first_layer: index of the lowest adapted layer.
        tokens: the answer's tokens, as text.
        shares: (L, T). For each token, the norm of what the layer read from its prompts, gated, divided by
            the norm of what it read from the tokens, at the position from which that token was predicted.
    """

    first_layer: int
    tokens: tuple[str, ...]
    shares: Tensor


@torch.no_grad()
def effective_gates(model: LlamaAdapter, adapter: str) -> Tensor:
    """tanh(gate) of every head, (L, H), from -1 to 1: the factor of its prompts' part."""
    prompts = model.get_adapter(adapter).find(Prompts)
    if prompts is None:
        raise UsageError(f"adapter {adapter!r} has no prompts, so no gates to look at; choose another")
    return prompts.gates.tanh().float().cpu()


@torch.inference_mode()
def measure_influence(
    model: LlamaAdapter,
    turns: Sequence[Turn],
    answer: str,
    *,
    features: Tensor | None = None,
    adapter: str | None = None,
    max_tokens: int = 256,
) -> Influence:
    """The effect of the prompts on an answer, by one forward pass over the question and the answer.

    Args:
        turns: the conversation that was answered. Its last turn is the question.
        features: (I, F) of the pictures that it was answered with.
        max_tokens: how many tokens of the answer are used, from its start. The end token may be one of them.

    Raises:
        UsageError: the bare base, which has no prompts, or an empty answer.
    """
    name = model.answering_adapter(adapter, pictured=features is not None)
    if name == NO_ADAPTER:
        raise UsageError("the bare base has no prompts to look at; choose an adapter")
    assert model.tokenizer is not None
    if model.get_adapter(name).find(Prompts) is None:
        raise UsageError(f"adapter {name!r} has no prompts to look at; choose another")
    question = model.encode_question(turns, adapter=name)
    dialogue = [*turns, Turn("assistant", answer)]
    date = model.template_date(name)
    ((ids, _),) = encode_dialogues([dialogue], model.template(name), model.tokenizer, date=date)
    ids = ids[: len(question) + max_tokens]
    said = ids[len(question) :]
    if not answer.strip() or not said:
        raise UsageError("the answer is empty; there is nothing to look at")
    shares: dict[int, Tensor] = {}

    def observe(layer: int, from_tokens: Tensor, from_prompts: Tensor) -> None:
        places = slice(len(question) - 1, -1)  # each token is predicted at the position before it
        read, moved = (
            part[0, places].flatten(1).float().norm(dim=-1) for part in (from_tokens, from_prompts)
        )
        shares[layer] = (moved / read).cpu()

    owners = None if features is None else torch.zeros(len(features), dtype=torch.long)
    model(
        input_ids=torch.tensor([ids], device=model.decoder.device),
        use_cache=False,
        logits_to_keep=1,
        observe=observe,
        adapter=model.project(name, image_features=features, image_owners=owners),
    )
    return Influence(
        first_layer=min(shares),
        tokens=tuple(str(model.tokenizer.decode([token])) for token in said),
        shares=torch.stack([shares[layer] for layer in sorted(shares)]),
    )

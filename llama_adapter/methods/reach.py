"""How far back the layers of a decoder see: everything, a sliding window or a chunk.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicLayer, PreTrainedModel

from llama_adapter.methods.prepared import computing_device
from llama_adapter.methods.trial_pass import Call, Notes, noting, noting_modules, random_tokens

LONG_PAST = 2**17  # tokens, if the decoder sets no limit


class _ClaimedPast(DynamicLayer):
    """A layer of a cache that claims to hold tokens and holds none."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.tokens


@dataclass(frozen=True)
class Reach:
    """How far back a layer sees; see `AttentionForm`."""

    window: int | None = None
    chunk: int | None = None
    unpackable: str | None = None


def find_reaches(decoder: PreTrainedModel, stock: str) -> dict[nn.Module, Reach]:
    """How far back each layer sees.

    The masks of two tokens after a long past show it. So a window of any length costs only two tokens. Empty
    if the decoder can't be run in this way.
    """
    config = decoder.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or LONG_PAST
    # A pack may be longer than any row. Decoders with learnt positions can't go beyond their limit.
    for past in (max(LONG_PAST, limit), limit - 2):
        try:
            near, far = (_two_tokens(decoder, stock, behind) for behind in (0, past))
            break
        except Exception:  # a family whose cache has more than keys and values
            continue
    else:
        return {}
    if len(near) != len(far):
        return {}
    chunk = getattr(config, "attention_chunk_size", None)
    reaches = {}
    for first, second in zip(near, far, strict=True):
        reaches[second.layer] = _reach(second, past, chunk)
        # Hidden states and positions are the same, so any difference depends on the place in the sequence.
        if not (torch.equal(first.query, second.query) and torch.equal(first.key, second.key)):
            reaches[second.layer] = Reach(unpackable="its layers count the tokens before by themselves")
    return reaches


def _two_tokens(decoder: PreTrainedModel, stock: str, past: int) -> list[Call]:
    """The calls of the layers for two tokens at positions 0 and 1 after a claimed past."""
    layers = decoder.config.get_text_config().num_hidden_layers
    notes = Notes()
    with noting(decoder, stock), noting_modules(decoder, notes):
        decoder(
            input_ids=random_tokens(decoder, 1, 2),
            position_ids=torch.arange(2, device=computing_device(decoder))[None],
            past_key_values=Cache(layers=[_ClaimedPast(past) for _ in range(layers)]),
            adapter=notes,
            use_cache=True,
        )
    return notes.calls


def _reach(call: Call, past: int, chunk: int | None) -> Reach:
    limits = [past + 1] if call.window is None else [past + 1, int(call.window)]
    if call.mask is not None:
        mask = call.mask
        if mask.shape[-2:] != (2, past + 2):
            return Reach(unpackable="its layers have masks of their own")
        sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        if mask.dtype != torch.bool and mask.masked_fill(~sees, 0).any():
            return Reach(unpackable="its attention weighs tokens by their distance")
        if not (sees == sees[:1, :1]).all():
            return Reach(unpackable="its heads see different tokens")
        sees = sees[0, 0]
        query = torch.arange(past, past + 2, device=mask.device)[:, None]
        key = torch.arange(past + 2, device=mask.device)
        counted = int(sees[0].sum())
        if chunk is not None and torch.equal(sees, (key <= query) & (key // chunk == query // chunk)):
            return Reach(chunk=chunk)
        window = counted if counted <= past else past + 2  # the second token sees one token more
        if not torch.equal(sees, (key <= query) & (key > query - window)):
            return Reach(unpackable="its layers see more or less than the tokens just before")
        limits.append(counted)
    return Reach() if min(limits) > past else Reach(window=min(limits))

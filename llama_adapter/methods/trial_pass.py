"""Trial passes through a decoder, in which each layer's calls of its attention are recorded.

The layers read random hidden states, and attention returns zeros: only what they pass to it is of interest.

Shapes: B rows, T tokens, H heads, G key-value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import PREFIX
from llama_adapter.methods.prepared import attention_input, computing_device

# Tensors that an attention function may be given as keywords. Sparse attention passes a choice of tokens.
UNDERSTOOD = ("position_ids", "cache_position", "s_aux", "position_bias")


@dataclass(frozen=True)
class Call:
    """What a layer passed to its attention function: query (B, H, T, d), key and value (B, G, T, d), mask."""

    layer: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    window: int | None
    modules_run: int  # how many modules of the layer ran before this call
    not_understood: str | None  # the keyword of another tensor that was passed


@dataclass
class Notes:
    """Takes the place of prompts in a forward pass. The calls of layers that receive it are recorded."""

    calls: list[Call] = field(default_factory=list)
    hidden: dict[nn.Module, Tensor] = field(default_factory=dict)  # the input of each layer
    # For each layer, the inputs and outputs of its modules, in the order in which they ran.
    modules: dict[nn.Module, list[tuple[str, Tensor, Tensor]]] = field(default_factory=dict)


def _note_call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention function that records its arguments and returns zeros."""
    notes = kwargs.get("adapter")
    if isinstance(notes, Notes):
        run = len(notes.modules.get(module, ()))
        others = (n for n, v in kwargs.items() if isinstance(v, Tensor) and n not in UNDERSTOOD)
        window = kwargs.get("sliding_window")
        notes.calls.append(Call(module, query, key, value, mask, window, run, next(others, None)))
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


@contextmanager
def noting(decoder: PreTrainedModel, stock: str) -> Iterator[None]:
    """A context in which the decoder's layers record the calls of their attention, and do not attend."""
    name = f"{PREFIX}probe_{stock}"
    AttentionInterface.register(name, _note_call)
    AttentionMaskInterface.register(name, AttentionMaskInterface()[stock])
    switch_attention(decoder, name)
    try:
        yield
    finally:
        switch_attention(decoder, stock)


@contextmanager
def random_hidden_states(decoder: PreTrainedModel, given: dict[nn.Module, Tensor]) -> Iterator[None]:
    """A context in which every layer reads random hidden states. These are stored in ``given``.

    The decoder's own states would not do: those of a row's first token are nearly equal for all tokens.
    """
    generator = torch.Generator().manual_seed(0)

    def replace_hidden(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args and "hidden_states" not in kwargs:
            return None
        states = attention_input(args, kwargs)
        given[layer] = torch.randn(states.shape, generator=generator).to(states)
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": given[layer]}
        return (given[layer], *args[1:]), kwargs

    hooks = [layer.register_forward_pre_hook(replace_hidden, with_kwargs=True) for layer in _indexed(decoder)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def noting_modules(decoder: PreTrainedModel, notes: Notes) -> Iterator[None]:
    """A context in which every layer reads random hidden states, and its modules' outputs are recorded."""

    def note(layer: nn.Module, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            notes.modules[layer].append((name, args[0], output))

    hooks = []
    for layer in _indexed(decoder):
        notes.modules[layer] = []
        for name, module in layer.named_modules():
            if name:
                hooks.append(module.register_forward_hook(partial(note, layer, name)))
    try:
        with random_hidden_states(decoder, notes.hidden):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _indexed(decoder: PreTrainedModel) -> list[nn.Module]:
    """The modules that know their layer's index. The attentions are among them."""
    return [m for m in decoder.modules() if isinstance(getattr(m, "layer_idx", None), int)]


def random_tokens(decoder: PreTrainedModel, rows: int, tokens: int) -> Tensor:
    """(B, T) token ids without the padding token, whose embedding may be zeros."""
    config = decoder.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size - 1, (rows, tokens), generator=generator)
    padding = getattr(config, "pad_token_id", None)
    if padding is not None:
        ids += ids >= padding
    return ids.to(computing_device(decoder))


def switch_attention(decoder: PreTrainedModel, implementation: str) -> None:
    """Set the attention of the text part only: towers beside it may not support it."""
    text = decoder.config.get_text_config()
    name = next((n for n in decoder.config.sub_configs if getattr(decoder.config, n, None) is text), "")
    decoder.set_attn_implementation({name: implementation})


def refuse(decoder: PreTrainedModel, reason: str) -> NoReturn:
    family = decoder.config.get_text_config().model_type
    raise UsageError(f"decoders of the family {family!r} cannot be adapted: {reason}")

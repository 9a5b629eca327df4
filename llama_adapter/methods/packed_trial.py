"""Checks that rows packed into one sequence come out of a decoder as they do alone.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import attention_form
from llama_adapter.methods.packed_attention import Segment, mask_of_segments, segment_positions
from llama_adapter.methods.prepared import attention_layers, computing_device
from llama_adapter.methods.trial_pass import random_hidden_states, random_tokens, refuse

LONGEST_ROW = 64  # tokens of a row in the packed pass


@torch.no_grad()
def probe_packed(decoder: PreTrainedModel) -> None:
    """Check that two rows in one sequence give the same results as separately.

    They do not if tokens interact outside of attention (convolutions, state spaces), or if a family has a
    mask of its own. The rows are longer than the layers' windows, unless these are long.
    """
    forms = [attention_form(layer) for layer in attention_layers(decoder)]
    limits = [limit for form in forms for limit in (form.window, form.chunk) if limit is not None]
    length = max([3, *(limit + 3 for limit in limits if limit + 3 <= LONGEST_ROW)])
    rows = random_tokens(decoder, 2, length)
    segments = (Segment(0, length), Segment(length, 2 * length))
    with _noting_outputs(decoder) as apart:
        logits = decoder(rows, use_cache=False).logits
    try:
        with _noting_outputs(decoder) as together:
            packed = decoder(
                input_ids=rows.flatten()[None],
                attention_mask=mask_of_segments(computing_device(decoder)),
                position_ids=segment_positions(segments).to(computing_device(decoder)),
                segments=segments,
                use_cache=False,
            ).logits.view(logits.shape)
    except UsageError:
        return  # such a decoder can answer, and raises this error if rows are packed for training
    tolerance = 1e-1 if logits.dtype.itemsize < 4 else 1e-3
    alike = all(
        (output.view_as(apart[layer]) - apart[layer]).abs().max() <= tolerance * apart[layer].abs().max()
        for layer, output in together.items()
    )
    # The median: in a mixture of experts, a rounding error may send a token to another expert.
    wrong = (packed - logits)[1].abs().amax(-1).median()
    if not alike or not wrong <= tolerance * logits.abs().max():
        refuse(
            decoder,
            "its tokens interact outside of its attention, or it has masks or positions of its own",
        )


@contextmanager
def _noting_outputs(decoder: PreTrainedModel) -> Iterator[dict[nn.Module, Tensor]]:
    """A context in which every layer reads the same random hidden states, and its output is recorded."""
    outputs: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, args: Any, output: Any) -> None:
        outputs[layer] = output[0] if isinstance(output, tuple) else output

    hooks = [layer.register_forward_hook(note) for layer in attention_layers(decoder)]
    try:
        with random_hidden_states(decoder, {}):
            yield outputs
    finally:
        for hook in hooks:
            hook.remove()

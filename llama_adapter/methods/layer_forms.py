"""Finds out how each layer of a decoder computes its keys and values, and how far back it sees.

Shapes: B rows, T tokens, D hidden size, H heads, G key-value heads, d head width, N columns of a product.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.methods.attention import FORM, AttentionForm, layer_index
from llama_adapter.methods.keys_and_values import Columns, KeysAndValues, Layout, Step
from llama_adapter.methods.reach import Reach, find_reaches
from llama_adapter.methods.trial_pass import Call, Notes, noting, noting_modules, random_tokens, refuse

TOKENS = 8  # so many that even in bfloat16 no two columns of a product are equal for all of them


@torch.no_grad()
def find_forms(decoder: PreTrainedModel, stock: str) -> list[nn.Module]:
    """Run the first two passes, and store at each attention layer what they show.

    Returns:
        the layers for which they do not show how far back it sees.
    """
    notes = Notes()
    with noting(decoder, stock), noting_modules(decoder, notes):
        decoder(random_tokens(decoder, TOKENS, 1), adapter=notes, use_cache=False)
    _check_calls(decoder, notes)
    reaches = find_reaches(decoder, stock)
    scalings = _rotary_scalings(decoder)
    known: list[KeysAndValues] = []  # most layers are alike
    for call in notes.calls:
        trace = _Trace(call, notes, scalings)
        form = next((form for form in known if trace.difference(form) is None), None)
        if form is None:
            form = trace.find()
            known.append(form)
        if (what := trace.difference(form)) is not None:
            refuse(decoder, f"layer {layer_index(call.layer)} computes its {what} in a way of its own")
        reach = reaches.get(call.layer, Reach())
        setattr(call.layer, FORM, AttentionForm(form, reach.window, reach.chunk, reach.unpackable))
    return [call.layer for call in notes.calls if call.layer not in reaches]


def _check_calls(decoder: PreTrainedModel, notes: Notes) -> None:
    config = decoder.config.get_text_config()
    layers = [call.layer for call in notes.calls]
    if any(layer not in notes.hidden for layer in layers):
        refuse(decoder, "its attention layers do not say which layer they are, or read no hidden states")
    indices = [layer_index(layer) for layer in layers]
    missing = sorted(set(range(config.num_hidden_layers)) - set(indices))
    if missing:
        refuse(
            decoder,
            f"its layer {missing[0]} never received the prompts: it drops keywords, or has no attention of "
            "the usual form",
        )
    several = [index for index in indices if indices.count(index) > 1]
    if several:
        refuse(decoder, f"its layer {several[0]} calls attention more than once, with foreign values")
    first = notes.calls[0]
    for call in notes.calls:
        index = layer_index(call.layer)
        if (call.key.shape, call.value.shape) != (first.key.shape, first.value.shape):
            refuse(decoder, f"layer {index}'s keys and values differ in size from the others'")
        if call.not_understood is not None:
            refuse(decoder, f"layer {index} needs an attention that takes {call.not_understood!r}")
        if call.query.shape[1] != config.num_attention_heads:
            refuse(decoder, f"layer {index} has {call.query.shape[1]} heads, not the config's number")
        if notes.hidden[call.layer].shape != (TOKENS, 1, config.hidden_size):
            refuse(decoder, f"layer {index}'s keys are not computed from its hidden states")


def _rotary_scalings(decoder: PreTrainedModel) -> set[float]:
    """The factors by which YaRN and LongRoPE scale rotated keys.

    Prompts are not rotated, so not scaled either.
    """
    found = {1.0}
    for module in decoder.modules():
        for name, value in vars(module).items():
            if name.endswith("attention_scaling") and isinstance(value, (int, float)):
                found.add(float(value))
    return found


def _flat(states: Tensor) -> tuple[Tensor, tuple[int, ...], Layout] | None:
    """States of `TOKENS` rows of one token as (rows, N), the shape for one token, and where tokens are."""
    rows, *rest = states.shape
    if rows != TOKENS or not rest:
        return None
    if states.ndim > 2 and rest[0] == 1:
        return states.flatten(1), tuple(rest[1:]), "token second"
    if states.ndim == 4 and rest[1] == 1:
        return states.flatten(1), (rest[0], rest[2]), "token third"
    return states.flatten(1), tuple(rest), "token first"


class _Unknown(Exception):
    """Some columns are not the output of any module of the layer."""


class _Trace:
    """Finds out, by comparing values, where a layer's keys and values come from."""

    def __init__(self, call: Call, notes: Notes, scalings: set[float]) -> None:
        self.call = call
        self.hidden = notes.hidden[call.layer]
        self.scalings = scalings
        self.tolerance = 3e-2 if call.key.dtype.itemsize < 4 else 1e-4
        # Only modules that ran before the attention. Later ones depend on its output.
        run = notes.modules[call.layer][: call.modules_run]
        self.modules = [(name, given, gave) for name, given, gave in run if _flat(given) and _flat(gave)]
        self.steps: list[Step] = []
        self.step_of: dict[int, int] = {}  # the step of each module run, by its index

    def find(self) -> KeysAndValues:
        """The form of the layer. If something stays unknown, a form that `difference` does not accept."""
        nothing = Columns(())
        heads = self.call.key.shape[1]
        try:
            keys = self._locate(self.call.key.flatten(1), len(self.modules), self.scalings)
        except _Unknown:
            return KeysAndValues((), nothing, nothing, heads)
        try:
            values = self._locate(self.call.value.flatten(1), len(self.modules))
        except _Unknown:
            return KeysAndValues(tuple(self.steps), keys, nothing, heads)
        return KeysAndValues(tuple(self.steps), keys, values, heads)

    def difference(self, form: KeysAndValues) -> str | None:
        """Which of keys and values a form computes differently from the layer; None if both are the same."""
        if not form.keys.pieces:
            return "keys"
        if not form.values.pieces:
            return "values"
        try:
            keys, values = form.of(self.call.layer, self.hidden)
        except (RuntimeError, AttributeError):  # the form is that of another kind of layer
            return "keys"
        expected = torch.stack([self.call.key / scaling for scaling in self.scalings])
        if keys.shape != self.call.key.shape or not self._close(keys, expected):
            return "keys"
        if values.shape != self.call.value.shape or not self._close(values, self.call.value[None]):
            return "values"
        return None

    def _close(self, ours: Tensor, theirs: Tensor) -> bool:
        """Whether each number is one of those expected for it, (alternatives, ...)."""
        scale = theirs.abs().max().clamp_min(1e-6)
        return bool(((ours - theirs).abs().amin(0) / scale).max() <= self.tolerance)

    def _locate(self, target: Tensor, before: int, scalings: Iterable[float] = (1.0,)) -> Columns:
        """Where the columns of (rows, N) come from: hidden states, or the first `before` modules that ran."""
        sources = [self.hidden.flatten(1), *(module[2].flatten(1) for module in self.modules[:before])]
        # All columns together, as in most layers?
        for source, states in enumerate(sources):
            if states.shape == target.shape and self._close(states, target[None]):
                return Columns(((self._result(source), 0, states.shape[1]),))
        scale = target.abs().max().clamp_min(1e-6)
        least = torch.full((target.shape[1],), torch.inf, device=target.device)
        found = [(-1, -1)] * target.shape[1]
        for source, states in enumerate(sources):
            for scaling in scalings:
                wanted = (target / scaling).T.float()
                distance, nearest = torch.cdist(wanted, states.T.float(), p=torch.inf).min(dim=1)
                closer = distance < least
                least = torch.where(closer, distance, least)
                for index in closer.nonzero().flatten().tolist():
                    found[index] = (source, int(nearest[index]))
        if not (least.max() / scale <= self.tolerance):
            raise _Unknown
        pieces: list[tuple[int, int, int]] = []
        for source, column in found:
            result = self._result(source)
            if pieces and pieces[-1][0] == result and pieces[-1][2] == column:
                pieces[-1] = (result, pieces[-1][1], column + 1)
            else:
                pieces.append((result, column, column + 1))
        return Columns(tuple(pieces))

    def _result(self, source: int) -> int:
        """The number of the result (see `Columns`) of a source. A module becomes a step when first needed."""
        if source == 0:
            return 0
        if source not in self.step_of:
            name, given, _ = self.modules[source - 1]
            flat = _flat(given)
            assert flat is not None
            states, shape, layout = flat
            reads = self._locate(states, source - 1)
            self.steps.append(Step(name, reads, shape, layout))
            self.step_of[source] = len(self.steps)
        return self.step_of[source]

"""Prepares a decoder for adapters: freezes it, switches its attention, and finds out whether it can be
adapted.

A table of model types would be out of date with every release of transformers, so nothing here asks for the
type. Three short forward passes find out what matters:

1. Single tokens at position 0, where rotary embedding changes nothing. They show which modules and columns
   of a layer give its keys and values, so that prompts can be treated the same way (`keys_and_values`).
2. Two tokens after a long past that the cache only claims to have. They show how far back each layer's mask
   lets them see.
3. Two rows packed into one sequence. They show whether packed rows give the same results as separate ones.

Shapes: B rows, T tokens, D hidden size, H heads, G key-value heads, d head width, N columns of a product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicLayer, PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import (
    FORM,
    PREFIX,
    STOCK,
    AttentionForm,
    attention_form,
    layer_index,
    register,
)
from llama_adapter.methods.decoding_step import attach_decoding_step
from llama_adapter.methods.keys_and_values import Columns, KeysAndValues, Layout, Step, usual_form
from llama_adapter.methods.packed_attention import Segment, mask_of_segments, segment_positions

TOKENS = 8  # so many that even in bfloat16 no two columns of a product are equal for all of them
LONG_PAST = 2**17  # tokens, if the decoder sets no limit
# Tensors that an attention function may be given as keywords. Sparse attention passes a choice of tokens.
UNDERSTOOD = ("position_ids", "cache_position", "s_aux", "position_bias")
LONGEST_ROW = 64  # tokens of a row in the packed pass


def prepare_decoder(decoder: PreTrainedModel) -> PreTrainedModel:
    """Freeze a decoder, switch it to the gated attention, and check that every layer can be adapted.

    Without prompts the decoder computes exactly what it did before, so other users of it are not affected.

    Raises:
        UsageError: a family that can't be adapted, with the reason. The decoder is then unchanged.
    """
    text_config = decoder.config.get_text_config()
    current = str(text_config._attn_implementation)
    if not current.startswith(PREFIX):
        if current not in STOCK:
            raise UsageError(
                f"attention {current!r} cannot be adapted; load the decoder with attn_implementation='sdpa'"
            )
        if text_config.is_encoder_decoder:
            _refuse(decoder, "it has an encoder; this method adapts decoders")
        with _restoring_on_failure(decoder):
            decoder.eval()
            if computing_device(decoder).type == "meta":
                _suppose_usual_forms(decoder)  # on the meta device there are no weights to compute with
                _switch(decoder, register(current))
            else:
                unknown = _find_forms(decoder, current)
                _switch(decoder, register(current))
                _probe_packed(decoder)
                reason = "how far back its layers see could not be found out"
                for layer in unknown:
                    setattr(layer, FORM, replace(attention_form(layer), unpackable=reason))
                attach_decoding_step(decoder)
    decoder.requires_grad_(False)
    return decoder.eval()


def computing_device(decoder: PreTrainedModel) -> torch.device:
    """The device that a decoder computes on. If its weights are offloaded, they are elsewhere.

    The meta device if it can't compute: the decoder has only shapes.
    """
    if decoder.device.type != "meta":
        return decoder.device
    for module in decoder.modules():  # accelerate's hooks bring weights to the device where they are needed
        hook = getattr(module, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):
            if (device := getattr(single, "execution_device", None)) is not None:
                return torch.device(device)
    real = (parameter.device for parameter in decoder.parameters() if parameter.device.type != "meta")
    return next(real, decoder.device)


def attention_layers(decoder: PreTrainedModel) -> list[nn.Module]:
    """The self-attention modules of a prepared decoder, in the order of its layers."""
    return sorted((m for m in decoder.modules() if hasattr(m, FORM)), key=layer_index)


def attention_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states, (B, T, D), among the arguments of an attention module."""
    found: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return found


@torch.no_grad()
def input_sizes(decoder: PreTrainedModel) -> list[float]:
    """The root mean square of the input of each attention in a prepared decoder, in the order of its layers.

    It is measured on 32 random tokens. It is 1 if there are no weights (on the meta device).
    """
    layers = attention_layers(decoder)
    if computing_device(decoder).type == "meta":
        return [1.0] * len(layers)
    vocabulary = decoder.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (1, 32), generator=torch.Generator().manual_seed(0))
    read = hidden_states(decoder, tokens)
    # Without the first token: many decoders direct spare attention to it, and its states are unlike the
    # others.
    return [float(read[layer][:, 1:].float().square().mean().sqrt()) for layer in layers]


@torch.no_grad()
def hidden_states(decoder: PreTrainedModel, tokens: Tensor) -> dict[nn.Module, Tensor]:
    """The input of each attention in a prepared decoder for tokens, (B, T): (B, T, D), by attention."""
    read: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read[layer] = attention_input(args, kwargs)

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in attention_layers(decoder)]
    try:
        decoder(tokens.to(computing_device(decoder)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return read


def _switch(decoder: PreTrainedModel, implementation: str) -> None:
    """Set the attention of the text part only: towers beside it may not support it."""
    text = decoder.config.get_text_config()
    name = next((n for n in decoder.config.sub_configs if getattr(decoder.config, n, None) is text), "")
    decoder.set_attn_implementation({name: implementation})


def _refuse(decoder: PreTrainedModel, reason: str) -> NoReturn:
    family = decoder.config.get_text_config().model_type
    raise UsageError(f"decoders of the family {family!r} cannot be adapted: {reason}")


@contextmanager
def _restoring_on_failure(decoder: PreTrainedModel) -> Iterator[None]:
    """Restore the decoder if anything inside fails. An error of the decoder itself becomes a refusal."""
    training = {module: module.training for module in decoder.modules()}
    configs = {id(m.config): m.config for m in decoder.modules() if isinstance(m, PreTrainedModel)}
    for config in list(configs.values()):
        for name in config.sub_configs:
            if (nested := getattr(config, name, None)) is not None:
                configs.setdefault(id(nested), nested)
    implementations = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        yield
    except BaseException as error:
        for config, implementation in implementations:
            config._attn_implementation_internal = implementation
        for module, flag in training.items():
            module.training = flag
            if hasattr(module, FORM):
                delattr(module, FORM)
        if isinstance(error, UsageError) or not isinstance(error, Exception):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        family = decoder.config.get_text_config().model_type
        raise UsageError(
            f"decoders of the family {family!r} cannot be adapted: a trial run with prompts failed ({said})"
        ) from error


def _suppose_usual_forms(decoder: PreTrainedModel) -> None:
    """Assume the usual form for layers that look like it, without weights to compute with."""
    count = decoder.config.get_text_config().num_hidden_layers
    layers = [m for m in decoder.modules() if hasattr(m, "layer_idx") and hasattr(m, "k_proj")]
    forms = [usual_form(layer) for layer in layers]
    if len(layers) != count or None in forms:
        _refuse(decoder, "without its weights, only layers with k_proj and v_proj are understood")
    for layer, form in zip(layers, forms, strict=True):
        assert form is not None
        setattr(layer, FORM, AttentionForm(form))


# --- what each layer is called with -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
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
class _Notes:
    """Takes the place of prompts in a forward pass. The calls of layers that receive it are recorded."""

    calls: list[_Call] = field(default_factory=list)
    hidden: dict[nn.Module, Tensor] = field(default_factory=dict)  # the input of each layer
    # For each layer, the inputs and outputs of its modules, in the order in which they ran.
    modules: dict[nn.Module, list[tuple[str, Tensor, Tensor]]] = field(default_factory=dict)


def _note_call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """An attention function that records its arguments and returns zeros."""
    notes = kwargs.get("adapter")
    if isinstance(notes, _Notes):
        run = len(notes.modules.get(module, ()))
        others = (n for n, v in kwargs.items() if isinstance(v, Tensor) and n not in UNDERSTOOD)
        window = kwargs.get("sliding_window")
        notes.calls.append(_Call(module, query, key, value, mask, window, run, next(others, None)))
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


@contextmanager
def _noting(decoder: PreTrainedModel, stock: str) -> Iterator[None]:
    """A context in which the decoder's layers record the calls of their attention, and do not attend."""
    name = f"{PREFIX}probe_{stock}"
    AttentionInterface.register(name, _note_call)
    AttentionMaskInterface.register(name, AttentionMaskInterface()[stock])
    _switch(decoder, name)
    try:
        yield
    finally:
        _switch(decoder, stock)


@contextmanager
def _random_hidden_states(decoder: PreTrainedModel, given: dict[nn.Module, Tensor]) -> Iterator[None]:
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
def _noting_modules(decoder: PreTrainedModel, notes: _Notes) -> Iterator[None]:
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
        with _random_hidden_states(decoder, notes.hidden):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _indexed(decoder: PreTrainedModel) -> list[nn.Module]:
    """The modules that know their layer's index. The attentions are among them."""
    return [m for m in decoder.modules() if isinstance(getattr(m, "layer_idx", None), int)]


# --- the form of every layer --------------------------------------------------------------------------------


@torch.no_grad()
def _find_forms(decoder: PreTrainedModel, stock: str) -> list[nn.Module]:
    """Run the first two passes, and store at each attention layer what they show.

    Returns:
        the layers for which they do not show how far back it sees.
    """
    notes = _Notes()
    with _noting(decoder, stock), _noting_modules(decoder, notes):
        decoder(_random_tokens(decoder, TOKENS, 1), adapter=notes, use_cache=False)
    _check_calls(decoder, notes)
    reaches = _reaches(decoder, stock)
    scalings = _rotary_scalings(decoder)
    known: list[KeysAndValues] = []  # most layers are alike
    for call in notes.calls:
        trace = _Trace(call, notes, scalings)
        form = next((form for form in known if trace.difference(form) is None), None)
        if form is None:
            form = trace.find()
            known.append(form)
        if (what := trace.difference(form)) is not None:
            _refuse(decoder, f"layer {layer_index(call.layer)} computes its {what} in a way of its own")
        reach = reaches.get(call.layer, _Reach())
        setattr(call.layer, FORM, AttentionForm(form, reach.window, reach.chunk, reach.unpackable))
    return [call.layer for call in notes.calls if call.layer not in reaches]


def _check_calls(decoder: PreTrainedModel, notes: _Notes) -> None:
    config = decoder.config.get_text_config()
    layers = [call.layer for call in notes.calls]
    if any(layer not in notes.hidden for layer in layers):
        _refuse(decoder, "its attention layers do not say which layer they are, or read no hidden states")
    indices = [layer_index(layer) for layer in layers]
    missing = sorted(set(range(config.num_hidden_layers)) - set(indices))
    if missing:
        _refuse(
            decoder,
            f"its layer {missing[0]} never received the prompts: it drops keywords, or has no attention of "
            "the usual form",
        )
    several = [index for index in indices if indices.count(index) > 1]
    if several:
        _refuse(decoder, f"its layer {several[0]} calls attention more than once, with foreign values")
    first = notes.calls[0]
    for call in notes.calls:
        index = layer_index(call.layer)
        if (call.key.shape, call.value.shape) != (first.key.shape, first.value.shape):
            _refuse(decoder, f"layer {index}'s keys and values differ in size from the others'")
        if call.not_understood is not None:
            _refuse(decoder, f"layer {index} needs an attention that takes {call.not_understood!r}")
        if call.query.shape[1] != config.num_attention_heads:
            _refuse(decoder, f"layer {index} has {call.query.shape[1]} heads, not the config's number")
        if notes.hidden[call.layer].shape != (TOKENS, 1, config.hidden_size):
            _refuse(decoder, f"layer {index}'s keys are not computed from its hidden states")


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

    def __init__(self, call: _Call, notes: _Notes, scalings: set[float]) -> None:
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


# --- how far back a layer sees ------------------------------------------------------------------------------


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
class _Reach:
    """How far back a layer sees; see `AttentionForm`."""

    window: int | None = None
    chunk: int | None = None
    unpackable: str | None = None


def _reaches(decoder: PreTrainedModel, stock: str) -> dict[nn.Module, _Reach]:
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
            reaches[second.layer] = _Reach(unpackable="its layers count the tokens before by themselves")
    return reaches


def _two_tokens(decoder: PreTrainedModel, stock: str, past: int) -> list[_Call]:
    """The calls of the layers for two tokens at positions 0 and 1 after a claimed past."""
    layers = decoder.config.get_text_config().num_hidden_layers
    notes = _Notes()
    with _noting(decoder, stock), _noting_modules(decoder, notes):
        decoder(
            input_ids=_random_tokens(decoder, 1, 2),
            position_ids=torch.arange(2, device=computing_device(decoder))[None],
            past_key_values=Cache(layers=[_ClaimedPast(past) for _ in range(layers)]),
            adapter=notes,
            use_cache=True,
        )
    return notes.calls


def _reach(call: _Call, past: int, chunk: int | None) -> _Reach:
    limits = [past + 1] if call.window is None else [past + 1, int(call.window)]
    if call.mask is not None:
        mask = call.mask
        if mask.shape[-2:] != (2, past + 2):
            return _Reach(unpackable="its layers have masks of their own")
        sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        if mask.dtype != torch.bool and mask.masked_fill(~sees, 0).any():
            return _Reach(unpackable="its attention weighs tokens by their distance")
        if not (sees == sees[:1, :1]).all():
            return _Reach(unpackable="its heads see different tokens")
        sees = sees[0, 0]
        query = torch.arange(past, past + 2, device=mask.device)[:, None]
        key = torch.arange(past + 2, device=mask.device)
        counted = int(sees[0].sum())
        if chunk is not None and torch.equal(sees, (key <= query) & (key // chunk == query // chunk)):
            return _Reach(chunk=chunk)
        window = counted if counted <= past else past + 2  # the second token sees one token more
        if not torch.equal(sees, (key <= query) & (key > query - window)):
            return _Reach(unpackable="its layers see more or less than the tokens just before")
        limits.append(counted)
    return _Reach() if min(limits) > past else _Reach(window=min(limits))


# --- packed rows --------------------------------------------------------------------------------------------


@torch.no_grad()
def _probe_packed(decoder: PreTrainedModel) -> None:
    """Check that two rows in one sequence give the same results as separately.

    They do not if tokens interact outside of attention (convolutions, state spaces), or if a family has a
    mask of its own. The rows are longer than the layers' windows, unless these are long.
    """
    forms = [attention_form(layer) for layer in attention_layers(decoder)]
    limits = [limit for form in forms for limit in (form.window, form.chunk) if limit is not None]
    length = max([3, *(limit + 3 for limit in limits if limit + 3 <= LONGEST_ROW)])
    rows = _random_tokens(decoder, 2, length)
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
        _refuse(
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
        with _random_hidden_states(decoder, {}):
            yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _random_tokens(decoder: PreTrainedModel, rows: int, tokens: int) -> Tensor:
    """(B, T) token ids without the padding token, whose embedding may be zeros."""
    config = decoder.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size - 1, (rows, tokens), generator=generator)
    padding = getattr(config, "pad_token_id", None)
    if padding is not None:
        ids += ids >= padding
    return ids.to(computing_device(decoder))

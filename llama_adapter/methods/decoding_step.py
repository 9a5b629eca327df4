"""One token of a quantised decoder: all its layers in one compiled call.

Reading int8 weights is so fast that the Python code around the layers' products, about a thousand calls for
each token, takes longer. So a decoder with LLaMA's layers (root-mean-square norms, rotary embedding by
halves, grouped keys, SiLU) takes its decoding steps through kernels.cpp, which runs all layers in a loop,
including the adapter. Both ways are run once to check that they compute the same (`attach_decoding_step`).
Everything else, such as questions and training, goes through the decoder's modules.

Shapes: B rows, D hidden size, H heads, G key-value heads, d head width, S positions of the cache, K prompts.
"""

from __future__ import annotations

import ctypes
from array import array
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from llama_adapter.methods.attention import layer_index
from llama_adapter.methods.part import Part
from llama_adapter.methods.terms import ATTENTION, MLP
from llama_adapter.methods.terms import Term as PartTerm
from llama_adapter.quantization.kernels import (
    Added,
    Layer,
    Matrix,
    More,
    Norm,
    Rows,
    Step,
    Term,
    load_kernels,
)
from llama_adapter.quantization.linear import QuantizedLinear

_PROJECTIONS = {  # in the order of kernels.cpp
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"}
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # in families that have them
_SUBLAYERS = (ATTENTION, MLP)
_SITES = (*_PROJECTIONS.values(), *_SUBLAYERS)  # in the order of kernels.cpp
_WIDEST_HEAD = 1024  # the kernel's limit
MORE_PLACES = 256  # by how many positions a cache grows, at least
_TOLERANCE = 1e-3  # relative to the largest hidden state


def attach_decoding_step(decoder: PreTrainedModel) -> None:
    """Let a quantised decoder take its decoding steps in one compiled call, if possible.

    It is not possible without a compiler, if the layers are built differently, or if a trial gives other
    hidden states than the decoder's own modules. Then the decoder is left as it is.
    """
    inner = decoder.base_model
    if not _is_like_llama(inner) or load_kernels() is None:
        return
    step = DecodingStep(inner)
    if _agrees(inner, step):
        inner.forward = step.forward


def _is_like_llama(inner: nn.Module) -> bool:
    """Whether all modules are of kinds that the compiled step knows, with quantised weights."""
    layers = getattr(inner, "layers", None)
    config: Any = inner.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if getattr(config, "sliding_window", None) is not None or {*kinds} != {"full_attention"}:
        return False
    if {name for name, _ in inner.named_children()} != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return False
    assert isinstance(layers, nn.ModuleList)
    known = {*_PROJECTIONS.values(), *_NORMS.values(), "self_attn", "mlp", "mlp.act_fn", ""}
    for layer in layers:
        modules = dict(layer.named_modules())
        names = {name for name in modules if ".quantized" not in name}
        if names - {*_HEAD_NORMS} != known:
            return False
        if not all(type(modules[name]) is QuantizedLinear for name in _PROJECTIONS.values()):
            return False
        norms = [modules[name] for name in (*_NORMS.values(), *_HEAD_NORMS) if name in names]
        if not all(hasattr(norm, "variance_epsilon") and norm.weight.ndim == 1 for norm in norms):
            return False
        attention: Any = modules["self_attn"]
        widths = {norm.weight.shape[0] for norm in norms[2:]}
        if widths - {attention.head_dim} or attention.head_dim % 2 or attention.head_dim > _WIDEST_HEAD:
            return False
        if type(modules["mlp.act_fn"]).__name__ not in ("SiLU", "SiLUActivation"):
            return False
    return True


@torch.no_grad()
def _agrees(inner: Any, step: DecodingStep) -> bool:
    """Whether a trial with two rows, one of them padded, gives the decoder's own hidden states."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, int(inner.config.hidden_size), generator=generator)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]])
    states = []
    for run in (inner.forward, step.forward):
        cache = DynamicCache()
        inner.forward(
            inputs_embeds=tokens[:, :4],
            attention_mask=mask[:, :4],
            position_ids=positions[:, :4],
            past_key_values=cache,
            use_cache=True,
        )
        output = run(
            inputs_embeds=tokens[:, 4:],
            attention_mask=mask,
            position_ids=positions[:, 4:],
            past_key_values=cache,
            use_cache=True,
        )
        states.append(output.last_hidden_state)
    ours, theirs = states
    return step.calls > 0 and bool((ours - theirs).abs().max() <= _TOLERANCE * theirs.abs().max())


class _Room:
    """A cache's keys and values with free positions at the end, so that a new token needs no copying."""

    def __init__(self, layers: Any, length: int) -> None:
        like = layers[0].keys
        rows, heads, _, width = like.shape
        self.capacity = length + max(MORE_PLACES, length // 4)
        self.states = like.new_empty(2 * len(layers), rows, heads, self.capacity, width)
        for number, layer in enumerate(layers):
            self.states[2 * number, :, :, :length] = layer.keys
            self.states[2 * number + 1, :, :, :length] = layer.values
        places = [states.data_ptr() for states in self.states.unbind(0)]
        self.keys, self.values = array("q", places[::2]), array("q", places[1::2])

    def holds(self, layers: Any, length: int) -> bool:
        """Whether the cache still reads these tensors, and a position is free."""
        return (
            length < self.capacity
            and layers[0].keys.shape[0] == self.states.shape[1]
            and all(
                layer.keys.data_ptr() == keys and layer.values.data_ptr() == values
                for layer, keys, values in zip(layers, self.keys, self.values, strict=True)
            )
        )

    def show(self, layers: Any, length: int) -> None:
        """Let the cache read the first positions."""
        states = self.states[:, :, :, :length].unbind(0)
        for number, layer in enumerate(layers):
            layer.keys, layer.values = states[2 * number], states[2 * number + 1]


class DecodingStep:
    """The forward pass of a decoder's inner model, with compiled decoding steps.

    Attributes:
        calls: how many steps were taken in a compiled call.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.calls = 0
        self._prepared: tuple[Any, Norm, list[Tensor]] | None = None
        # An adapter's state never changes, and many tokens are decoded with the same one.
        self._adapters: WeakKeyDictionary[Any, _Added] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has to look up its own tensors' addresses."""
        return {**self.__dict__, "_prepared": None, "_adapters": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _adapters=WeakKeyDictionary())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the inner model's forward."""
        output = None if args else self.step(**kwargs)
        return type(self.inner).forward(self.inner, *args, **kwargs) if output is None else output

    def step(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        adapter: Any = None,
        **others: Any,
    ) -> BaseModelOutputWithPast | None:
        """Compute one token of each row; None if the call asks for anything else."""
        tokens = input_ids if input_ids is not None else inputs_embeds
        layers = getattr(past_key_values, "layers", None)
        if (
            tokens is None
            or tokens.shape[1] != 1
            or tokens.device.type != "cpu"
            or torch.is_grad_enabled()
            or not use_cache
            or not layers
            or any(value is not None and name != "return_dict" for name, value in others.items())
            or type(past_key_values) is not DynamicCache
            or not all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)
            or len(layers) != len(self.inner.layers)
        ):
            return None
        rows, length = tokens.shape[0], past_key_values.get_seq_length()
        starts = _starts(attention_mask, rows, length + 1)
        embeds = self.inner.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if starts is None or embeds.dtype != torch.float32 or layers[0].keys.dtype != torch.float32:
            return None
        added = None if adapter is None else self._added(adapter, rows)
        if adapter is not None and (added is None or not added.known):
            return None
        if position_ids is None:
            position_ids = torch.full((1, 1), length)
        cosines, sines = (
            part.float().expand(rows, -1, -1).contiguous()
            for part in self.inner.rotary_emb(embeds, position_ids)
        )
        attention = self.inner.layers[0].self_attn
        if cosines.shape[-1] != attention.head_dim:
            return None
        room = getattr(past_key_values, "_room", None)
        if room is None or not room.holds(layers, length):
            room = _Room(layers, length)
            past_key_values._room = room  # type: ignore[attr-defined]
        if self._prepared is None:
            self._prepared = self._prepare()
        frozen, last, _ = self._prepared
        hidden = embeds.clone(memory_format=torch.contiguous_format)
        key_heads = layers[0].keys.shape[1]
        step = Step(
            rows=rows,
            threads=torch.get_num_threads(),
            heads=attention.q_proj.out_features // attention.head_dim,
            key_heads=key_heads,
            head_dim=attention.head_dim,
            hidden_size=hidden.shape[-1],
            layers=len(layers),
            length=length,
            capacity=room.capacity,
            starts=starts.data_ptr(),
            cosines=cosines.data_ptr(),
            sines=sines.data_ptr(),
            keys=room.keys.buffer_info()[0],
            values=room.values.buffer_info()[0],
            added=None if added is None else added.address,
            ranks=0 if added is None else added.ranks,
            hidden=hidden.data_ptr(),
            last=last,
        )
        kernels = load_kernels()
        assert kernels is not None
        kernels.decode(ctypes.addressof(frozen), ctypes.addressof(step))
        room.show(layers, length + 1)
        self.calls += 1
        output: Any = hidden  # transformers 5.20 names a narrower type than it takes
        return BaseModelOutputWithPast(output, past_key_values)

    def _added(self, adapter: Any, rows: int) -> _Added | None:
        """What an adapter adds; None if its tensors are neither for this many rows nor for one."""
        tensors = [tensor for part in adapter.parts.values() for tensor in part.values()]
        if any(len(tensor) not in (1, rows) for tensor in tensors):
            return None
        added = self._adapters.get(adapter)
        if added is None:
            added = _Added(adapter, self.inner)
            if not any(tensor.requires_grad for tensor in tensors):  # a training changes its tensors in place
                self._adapters[adapter] = added
        return added

    def _prepare(self) -> tuple[Any, Norm, list[Tensor]]:
        """The frozen parts of all layers, the last norm, and the tensors that the kernel reads."""
        held: list[Tensor] = []

        def norm_of(module: Any) -> Norm:
            if module is None:
                return Norm(None, 0)
            held.append(module.weight.detach().float().contiguous())
            return Norm(held[-1].data_ptr(), module.variance_epsilon)

        def matrix_of(module: QuantizedLinear) -> Matrix:
            bias = None if module.bias is None else module.bias.detach().float().contiguous()
            # Keeps the memory alive even if the module is moved to another device.
            held.extend(buffer.detach() for buffer in module.quantized.buffers())
            if bias is not None:
                held.append(bias)
            return module.quantized.matrix(bias)

        layers = (Layer * len(self.inner.layers))()
        for own, layer in zip(layers, self.inner.layers, strict=True):
            for name, path in _PROJECTIONS.items():
                setattr(own, name, matrix_of(layer.get_submodule(path)))
            for name, path in _NORMS.items():
                setattr(own, name, norm_of(layer.get_submodule(path)))
            own.of_queries = norm_of(getattr(layer.self_attn, "q_norm", None))
            own.of_keys = norm_of(getattr(layer.self_attn, "k_norm", None))
            own.scaling = layer.self_attn.scaling
        return layers, norm_of(self.inner.norm), held


def _starts(mask: Tensor | None, rows: int, places: int) -> Tensor | None:
    """(B,) the first position of each row that is not padding; None if there is padding elsewhere."""
    if mask is None:
        return torch.zeros(rows, dtype=torch.long)
    if mask.shape != (rows, places):
        return None
    there = mask != 0
    starts = places - there.sum(1)
    return starts if bool((there == (torch.arange(places) >= starts[:, None])).all()) else None


class _Added:
    """What an adapter adds to every layer, in the form of kernels.cpp. It keeps the tensors alive.

    Attributes:
        known: False if the adapter does something that the kernel can't do.
        address: the address of the first layer's part.
        ranks: the sum of the ranks of a layer's terms, in the layer where it is largest.
    """

    def __init__(self, adapter: Any, inner: Any) -> None:
        self.known = all(map(_is_known, adapter.parts))
        self.ranks = 0
        self._held: list[Any] = []
        self._layers = (Added * len(inner.layers))()
        self.address = ctypes.addressof(self._layers)
        for own, layer in zip(self._layers, inner.layers, strict=True):
            own.prompts = self._more(adapter.prompts_of(layer.self_attn))
            own.prefix = self._more(adapter.keys_of(layer.self_attn))
            self._add_terms(own, adapter.sites_of(layer_index(layer.self_attn)) or {})

    def _more(self, states: tuple[Tensor, Tensor, Tensor | None] | None) -> More:
        if states is None:
            return More()
        keys, values, mask = states
        more = More(keys=self._rows(keys), values=self._rows(values), count=keys.shape[2])
        if mask is not None:
            self._held.append(mask := mask.contiguous())
            more.mask, more.mask_stride = mask.data_ptr(), _stride(mask)
        return more

    def _add_terms(self, layer: Any, sites: Any) -> None:
        self.known &= {*sites} <= {*_SITES}
        terms: list[Term] = []
        place = 0
        for number, site in enumerate(_SITES):
            layer.first[number] = len(terms)
            for part, tensors in sites.get(site, ()):
                parts_terms = part.terms(tensors)
                if parts_terms is None or (
                    site not in _SUBLAYERS and any(term.reads_output for term in parts_terms)
                ):
                    self.known = False
                    return
                for term in parts_terms:
                    terms.append(self._term(term, place))
                    place += terms[-1].rank
        layer.first[len(_SITES)] = len(terms)
        self._held.append(together := (Term * len(terms))(*terms))
        layer.terms = ctypes.addressof(together)
        self.ranks = max(self.ranks, place)

    def _term(self, term: PartTerm, place: int) -> Term:
        found = Term(place=place, reads_output=term.reads_output, gelu=term.gelu)
        for name in ("scale", "bias", "down_bias"):
            if (states := getattr(term, name)) is not None:
                setattr(found, name, self._rows(states))
        if term.down is not None and term.up is not None:
            found.down, found.up = self._rows(term.down), self._rows(term.up.mT)
            found.rank, found.inputs, found.outputs = *term.down.shape[1:], term.up.shape[1]
        return found

    def _rows(self, states: Tensor) -> Rows:
        """The tensor in the kernel's form: float32, with each row's part contiguous."""
        states = states.float()
        if not states[0].is_contiguous():
            states = states.contiguous()
        self._held.append(states)
        return Rows(states.data_ptr(), _stride(states))


def _is_known(part: type[Part]) -> bool:
    """Whether a part acts only in ways that the kernel knows. Another part may have hooks of its own."""
    asked = [(getattr(part, name), getattr(Part, name)) for name in ("prompts_of", "keys_of")]
    return hasattr(part, "terms") or any(own.__func__ is not usual.__func__ for own, usual in asked)


def _stride(states: Tensor) -> int:
    """The distance from one row of the batch to the next; 0 if all read the same."""
    return 0 if states.shape[0] == 1 else states.stride(0)

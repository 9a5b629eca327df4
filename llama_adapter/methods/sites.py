"""The places in a layer where parts act on a module's output: its linear projections and its sub-layers.

A site is a module that computes y = f(x). Each part that acts there replaces y by ``act(own, x, y)``. Scales
and biases, LoRA and similar parts act at projections, bottleneck adapters at sub-layers.

A site's name is its name within the layer, such as "self_attn.q_proj" or "mlp.up_proj". The sub-layers are
called "attention" and "mlp". The attention notes which parts act in its layer
(`llama_adapter.methods.computing`), the layer's other modules read this note, and it is cleared at the end of
the layer.

Shapes: B rows, T tokens, R sets of a part's tensors (1 or B).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import layer_index
from llama_adapter.methods.computing import note, noted
from llama_adapter.methods.part import Part
from llama_adapter.methods.prepared import attention_input, attention_layers
from llama_adapter.methods.terms import ATTENTION, MLP, Term

Acting = Sequence[tuple[type["SitePart"], Mapping[str, Tensor]]]  # the parts at a site of a layer, in order
_ATTACHED = "_llama_adapter_sites"  # marks a decoder with hooks


class SitePart(Part):
    """A part that acts at sites.

    The names of its tensors in a state are the site, a dot and a name of their own: "self_attn.q_proj.down".
    If its parameters have such names (`register_parameters`), it needs no `Part.add_state` of its own.
    """

    foldable: ClassVar[bool] = False

    def attach(self, decoder: PreTrainedModel) -> None:
        attach_sites(decoder)

    @staticmethod
    def act(own: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """The output of a site, in place of ``y``.

        Args:
            own: the part's tensors of this layer and site, (R, ...) each, in the dtype of ``y``.
            x: (B, T, in), the input of the site.
            y: (B, T, out), its output.
        """
        raise NotImplementedError

    @staticmethod
    def terms(own: Mapping[str, Tensor]) -> Sequence[Term] | None:
        """What `act` does, as a sum of terms. None by default: it can't be written so.

        Args:
            own: as in `act`.
        """
        return None

    @staticmethod
    def fold(own: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias of a projection that computes by itself what it computes with this part.

        Only parts whose ``foldable`` is True have this.

        Args:
            own: as in `act`, with R = 1.
            weight: (out, in), of y = W x + bias.
            bias: (out,); None if there is none.
        """
        raise NotImplementedError


def register_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module parameters with dotted names, such as "self_attn.q_proj.down"."""
    for name, value in tensors.items():
        *path, last = name.split(".")
        owner = module
        for step in path:
            if step not in owner._modules:
                owner.add_module(step, nn.Module())
            owner = owner.get_submodule(step)
        owner.register_parameter(last, nn.Parameter(value))


def projections_of(decoder: PreTrainedModel, adapted_layers: int) -> dict[str, tuple[int, int]]:
    """The linear projections of the topmost layers by name, with the widths of their input and output.

    Raises:
        UsageError: a decoder whose layers differ, or have no linear projections.
    """
    layers = [_sizes(layer) for _, layer in _layers(decoder)[-adapted_layers:]]
    if any(sizes != layers[0] for sizes in layers):
        raise UsageError(
            "this decoder's layers have different projections; adapt fewer layers, or only with prompts"
        )
    if not layers[0]:
        raise UsageError("this decoder's layers have no linear projections; adapt it with prompts alone")
    return layers[0]


def locate_projections(decoder: PreTrainedModel) -> dict[str, tuple[int, str]]:
    """The layer and the site of every linear projection in the layers, by its name in the decoder."""
    names = {module: name for name, module in decoder.named_modules()}
    return {
        names[module]: (layer_index(attention), site)
        for attention, layer in _layers(decoder)
        for site, module in _projections(layer).items()
    }


def locate_layer_weights(decoder: PreTrainedModel) -> dict[str, int]:
    """The layer of each weight that is inside a layer, by its name in the decoder."""
    numbers = {
        id(weight): layer_index(attention)
        for attention, layer in _layers(decoder)
        for weight in layer.parameters()
    }
    return {name: numbers[id(weight)] for name, weight in decoder.named_parameters() if id(weight) in numbers}


def choose_projections(
    projections: Mapping[str, tuple[int, int]], targets: Sequence[str]
) -> dict[str, tuple[int, int]]:
    """Choose projections by their whole name ("self_attn.q_proj") or its end ("q_proj"). No names: all of
    them.

    Raises:
        UsageError: a name that no projection has.
    """
    if not targets:
        return dict(projections)
    chosen = {
        name: size
        for name, size in projections.items()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    }
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in projections)]
    if unknown:
        raise UsageError(
            f"targets: this decoder has no projection {unknown[0]!r}; it has {', '.join(projections)}"
        )
    return chosen


def attach_sites(decoder: PreTrainedModel) -> None:
    """Let parts act at a decoder's sites. A forward pass without parts computes as before."""
    if hasattr(decoder, _ATTACHED):
        return
    setattr(decoder, _ATTACHED, True)
    for attention, layer in _layers(decoder):
        attention.register_forward_pre_hook(_enter, with_kwargs=True)
        for name, projection in _projections(layer).items():
            projection.register_forward_hook(partial(_act, name))
        attention.register_forward_hook(_act_on_attention, with_kwargs=True)
        if (mlp := _mlp(layer, attention)) is not None:
            mlp.register_forward_hook(partial(_act, MLP))
        layer.register_forward_hook(_leave)


def detach_sites(decoder: PreTrainedModel) -> None:
    """Undo `attach_sites`, for a copy of a decoder that should be a plain one."""
    ours = (_enter, _act, _act_on_attention, _leave)
    for module in decoder.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if getattr(hook, "func", hook) in ours]:
                del hooks[number]
    if hasattr(decoder, _ATTACHED):
        delattr(decoder, _ATTACHED)


def _layers(decoder: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """Each attention, with the layer that it belongs to."""
    parents = {child: module for module in decoder.modules() for child in module.children()}
    return [(attention, parents[attention]) for attention in attention_layers(decoder)]


def _projections(layer: nn.Module) -> dict[str, nn.Module]:
    """Its linear modules, quantised or not.

    Not a mixture's experts, which mix the tokens of different rows.
    """
    modules = dict(layer.named_modules())
    return {
        name: modules[name]
        for name in sorted(modules)
        if _size(modules[name]) is not None and not any(part.isdigit() for part in name.split("."))
    }


def _sizes(layer: nn.Module) -> dict[str, tuple[int, int]]:
    sizes = {name: _size(module) for name, module in _projections(layer).items()}
    return {name: size for name, size in sizes.items() if size is not None}


def _size(module: nn.Module) -> tuple[int, int] | None:
    """The widths of a linear module's input and output; None for any other module."""
    if isinstance(module, Conv1D):  # GPT-2's linear module, in spite of its name
        return int(module.nx), int(module.nf)
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    return None


def _mlp(layer: nn.Module, attention: nn.Module) -> nn.Module | None:
    """The layer's MLP. None if the MLP's projections belong to the layer itself, as in OPT."""
    found = [
        child
        for child in layer.children()
        if child is not attention and _size(child) is None and any(_size(m) for m in child.modules())
    ]
    return found[0] if len(found) == 1 else None


def _enter(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    adapter = kwargs.get("adapter")
    note(None if adapter is None else adapter.sites_of(layer_index(attention)))


def _leave(layer: nn.Module, args: Any, output: Any) -> None:
    note(None)


def _act(site: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    acting = noted()
    # Some routers return more than a product.
    if acting is None or site not in acting or not isinstance(output, Tensor):
        return output
    return _applied(acting[site], args[0], output)


def _act_on_attention(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    acting = noted()
    if acting is None or ATTENTION not in acting:
        return output
    first, *others = output
    return (_applied(acting[ATTENTION], attention_input(args, kwargs), first), *others)


def _applied(acting: Acting, x: Tensor, y: Tensor) -> Tensor:
    """The output of a site after its parts have acted. Some decoders have it as (B * T, D)."""
    shape = y.shape
    for part, own in acting:
        if y.ndim != 3:
            rows = max(len(tensor) for tensor in own.values())
            x, y = x.reshape(rows, -1, x.shape[-1]), y.reshape(rows, -1, y.shape[-1])
        y = part.act({name: tensor.to(y.dtype) for name, tensor in own.items()}, x, y)
    return y.view(shape)

"""Products with frozen weights on a CPU while training: float32 by oneDNN, in place of torch's own choice.

torch gives float32 products to MKL, which is fast on Intel's processors and does not use AVX-512 on others;
oneDNN, which torch has too and takes for bfloat16, looks at what a processor can do, not at who made it.
On a processor without AVX-512 MKL is the faster of the two (docs/engine.md), and its products stay. They stay
too where torch has no MKL (ARM, macOS): another library makes them there, and none was measured.
The products are the same but for rounding. That is why only training takes them: an adapter that adds
nothing leaves the base's logits as they are bit for bit, and answers come from those.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Multiplications of a product from which on oneDNN's longer call pays (SmolLM2's head: 28 million a token).
WORTH_A_CALL = 1_000_000


_LOCK = threading.Lock()  # of the classes of all modules, and of how many threads use them
_USERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_THREAD = threading.local()  # ``models``: the ids of those for which this thread is in a context


@contextmanager
def frozen_products(model: nn.Module) -> Iterator[None]:
    """A context in which this thread computes a model's frozen ``nn.Linear`` modules by oneDNN where it pays.

    Other threads go on with torch's own products. A backward pass that recomputes activations belongs inside
    it too. Contexts of one model may be nested: the outermost counts, so that a training enters once.
    ``torch.backends.mkldnn.flags(False)`` around it leaves the products to torch.
    """
    models: set[int] = _THREAD.__dict__.setdefault("models", set())
    backends = torch.backends
    available = backends.mkl.is_available() and backends.mkldnn.is_available() and backends.mkldnn.enabled
    pays = available and backends.cpu.get_cpu_capability() == "AVX512"
    if not pays or id(model) in models:
        yield
        return
    linears = [module for module in model.modules() if type(module) in (nn.Linear, _FrozenLinear)]
    with _LOCK:
        for module in linears:
            module.__class__ = _FrozenLinear
            _USERS[module] = _USERS.get(module, 0) + 1
    models.add(id(model))
    try:
        yield
    finally:
        models.discard(id(model))
        with _LOCK:
            for module in linears:
                _USERS[module] -= 1
                if not _USERS[module]:
                    module.__class__ = nn.Linear
                    del _USERS[module]


class _FrozenLinear(nn.Linear):
    """The class of an nn.Linear in the meantime."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        pays = (
            bool(getattr(_THREAD, "models", None))
            and input.device.type == "cpu"
            and input.dtype == torch.float32
            and input.numel() * weight.shape[0] >= WORTH_A_CALL
            and all(_is_frozen(part) for part in (weight, bias) if part is not None)
            and not torch.is_autocast_enabled("cpu")
        )
        if not pays:
            return super().forward(input)
        rows = input.reshape(-1, weight.shape[1])
        needs_gradient = torch.is_grad_enabled() and input.requires_grad
        product: Tensor = (_Product.apply if needs_gradient else _product)(rows, weight, bias)
        return product.view(*input.shape[:-1], weight.shape[0])


def _is_frozen(weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter)  # not what a quantisation or a sharding puts in its place
    return plain and weight.dtype == torch.float32 and not weight.requires_grad


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(gradient, weight.T, None), None, None


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``rows @ weight.T + bias``: (T, out) from (T, in), (out, in) and (out,)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product

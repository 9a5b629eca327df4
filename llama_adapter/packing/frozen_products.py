"""Faster products with frozen weights while training on a CPU: float32 by oneDNN instead of torch's choice.

torch computes float32 products with MKL. MKL is fast on Intel's processors, and does not use AVX-512 on
others. oneDNN, which torch has too and uses for bfloat16, looks at what a processor can do and not at who
made it. On a processor without AVX-512, MKL is the faster of the two (docs/engine.md), so it is kept there.
Where torch has no MKL (ARM, macOS), another library computes the products. That was not measured, so it is
kept too. The results differ only by rounding. That is why this is used for training only: answers must come
from exactly the base's own logits when an adapter adds nothing.
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

# From this many multiplications on, oneDNN's longer call pays (SmolLM2's head has 28 million a token).
WORTH_A_CALL = 1_000_000


_LOCK = threading.Lock()  # guards the classes of all modules, and the count of threads that use each
_USERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_THREAD = threading.local()  # ``models``: the ids of the models for which this thread is in a context


@contextmanager
def frozen_products(model: nn.Module) -> Iterator[None]:
    """A context in which this thread computes a model's frozen ``nn.Linear`` modules by oneDNN where it pays.

    Other threads keep torch's own products. A backward pass that recomputes activations must run inside the
    context too. Contexts of one model may be nested: only the outermost does anything, so a training enters
    it once. Inside ``torch.backends.mkldnn.flags(False)`` the products are left to torch.
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
    """The class that an nn.Linear has inside the context."""

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
        product: Tensor = (_Product.apply if needs_gradient else compute_product)(rows, weight, bias)
        return product.view(*input.shape[:-1], weight.shape[0])


def _is_frozen(weight: Tensor) -> bool:
    plain = type(weight) in (
        Tensor,
        nn.Parameter,
    )  # not the kind of weight that quantization or sharding makes
    return plain and weight.dtype == torch.float32 and not weight.requires_grad


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return compute_product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return compute_product(gradient, weight.T, None), None, None


def compute_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``rows @ weight.T + bias``: (T, out) from (T, in), (out, in) and (out,)."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product

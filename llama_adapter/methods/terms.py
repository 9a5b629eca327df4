"""What a part does at a site of a layer (`llama_adapter.methods.sites`), as plain tensors.

A part acts by Python code of its own. The compiled decoding step cannot run that: it computes terms.

Shapes: R sets of a part's tensors (1 or B), r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ATTENTION, MLP = "attention", "mlp"  # the sites that are sub-layers


@dataclass(frozen=True)
class Term:
    """One thing that a part does at a site, in the form that a compiled decoding step computes:

        y + scale * y + bias + up f(down z + down_bias)

    with z what the site reads or gives, and f the identity or GELU. What is None is left out.

    Attributes:
        scale, bias: (R, out). down: (R, r, in). down_bias: (R, r). up: (R, out, r).
        reads_output: z is y, not x.
        gelu: f is GELU.
    """

    scale: Tensor | None = None
    bias: Tensor | None = None
    down: Tensor | None = None
    down_bias: Tensor | None = None
    up: Tensor | None = None
    reads_output: bool = False
    gelu: bool = False

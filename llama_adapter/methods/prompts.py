"""Adaptation prompts with gates: LLaMA-Adapter (arXiv 2303.16199, section 3.1).

Each adapted layer has K trainable vectors, the prompts. The layer's own frozen projections make keys and
values of them. Each head has one gate, which scales what the queries read from them
(`llama_adapter.methods.attention`):

    out = tokens + tanh(g_h) * softmax(q (W_k P)^T * s) (W_v P)

With an MLP, which all layers share, the prompts are made from narrower vectors e, as in the non-linear
prompts of the theory of zero-initialised attention (arXiv 2502.03029). The factor c is the size of the
layer's input:

    P = c * (W2 tanh(W1 e + b1) + b2)

Shapes: R prompt sets, L adapted layers, K prompts, D hidden size, H heads, d head width, W width of the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import is_sharded, project_prompts
from llama_adapter.methods.mlp import Mlp
from llama_adapter.methods.part import Inputs, Part, PartConfig, State
from llama_adapter.methods.shape import Layout


@dataclass(frozen=True)
class PromptsConfig(PartConfig):
    """The settings of adaptation prompts."""

    prompt_length: int = 10  # K
    # The width of the vectors, and of a two-layer MLP that makes prompts of them. 0: the vectors are the
    # prompts.
    prompt_mlp: int = field(default=0, metadata={"later": True})

    def __post_init__(self) -> None:
        if self.prompt_length < 1:
            raise UsageError(f"prompt length: {self.prompt_length} given; choose 1 or more (the paper: 10)")
        if self.prompt_mlp < 0:
            raise UsageError(f"prompt MLP: {self.prompt_mlp} given; choose its width, or 0 for none")


class Prompts(Part):
    """K prompts for each of the top L layers, and one gate for each head.

    Attributes:
        embeddings: (L, K, D), drawn from N(0, 1) and scaled to the size of what each layer reads from tokens:
            nothing normalises them before the frozen projections. With an MLP they are (L, K, W), not scaled.
        mlp: from W to D. None: the embeddings are the prompts.
        sizes: (L,), the size of what each layer's attention reads from tokens. Only with an MLP; not trained.
        gates: (L, H), zero at the start, so that an untrained adapter leaves the decoder unchanged.
    """

    kind = "prompts"
    Config = PromptsConfig
    differs_in_packs = True
    sizes: Tensor
    learning_rate = 1e-2
    size = "prompt_length"

    def __init__(
        self, config: PromptsConfig, layout: Layout, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, layout, generator)
        layers, shape = layout.adapted_layers, layout.shape
        width = config.prompt_mlp or shape.hidden_size
        self.embeddings = nn.Parameter(torch.randn(layers, config.prompt_length, width, generator=generator))
        self.gates = nn.Parameter(torch.zeros(layers, shape.num_heads))
        self.mlp = None
        if config.prompt_mlp:
            self.mlp = Mlp(width, shape.hidden_size, generator)
            self.register_buffer("sizes", torch.ones(layers))

    def initialise(self, decoder: PreTrainedModel, input_sizes: Tensor) -> None:
        if self.mlp is not None:
            self.sizes.copy_(input_sizes)
        else:
            self.embeddings.mul_(input_sizes[:, None, None])

    def plain(self) -> Tensor:
        """The prompts that the layers read, (L, K, D)."""
        if self.mlp is None:
            return self.embeddings
        made: Tensor = self.mlp(self.embeddings) * self.sizes[:, None, None]
        return made

    def add_state(self, states: dict[type[Part], State], inputs: Inputs) -> None:
        """Each layer projects its prompts itself, since a sharded layer's weights are only then gathered."""
        states[Prompts] = {"embeddings": self.plain()[None], "gates": self.gates[None]}

    @classmethod
    def precompute(cls, state: State, attentions: Sequence[nn.Module]) -> State:
        if any(map(is_sharded, attentions)):
            # Sharded weights are whole only in the layers' forward, so each layer projects its prompts there.
            return {name: value.detach().clone() for name, value in state.items()}
        layers = zip(attentions, state["embeddings"].unbind(1), state["gates"].unbind(1), strict=True)
        pairs = [project_prompts(attention, own, gates[0]) for attention, own, gates in layers]
        keys, values = (torch.stack(tensors, dim=1) for tensors in zip(*pairs, strict=True))
        return {"keys": keys, "values": values}

    @classmethod
    def prompts_of(cls, state: State, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
        if "keys" in state:
            return state["keys"], state["values"], state.get("mask")
        return *project_prompts(attention, state["embeddings"], state["gates"][0]), None

    @classmethod
    def merge(cls, states: Sequence[State | None]) -> State:
        """Padding needs values of zero, which add exactly nothing. If rows have different numbers of prompts,
        a mask keeps the padding out of the softmax: "mask", (B, L, K), False at padding."""
        if any(state is not None and "keys" not in state for state in states):
            raise UsageError("rows with adapters of their own cannot share a batch on a sharded decoder")
        merged = super().merge(states)
        _, layers, _, longest, _ = merged["keys"].shape
        # A row without prompts keeps all of its zeros unmasked: a softmax over nothing would not be a number.
        counts = torch.tensor([longest if state is None else state["keys"].shape[3] for state in states])
        if len(set(counts.tolist())) > 1:
            there = torch.arange(longest) < counts[:, None]
            merged["mask"] = there.to(merged["keys"].device)[:, None].expand(-1, layers, -1)
        return merged

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        others = [parameter for parameter in self.parameters() if parameter is not self.gates]
        return {"prompts": others, "gates": [self.gates]}

"""Adaptation prompts with gates: LLaMA-Adapter (arXiv 2303.16199, section 3.1).

K trainable vectors for each adapted layer, whose keys and values come from the layer's own frozen
projections, and one gate a head, which lets in what the queries read from them
(`llama_adapter.methods.attention`):

    out = tokens + tanh(g_h) * softmax(q (W_k P)^T * s) (W_v P)

Shapes: R sets of prompts, L adapted layers, K prompts, D hidden size, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import is_sharded, project_prompts
from llama_adapter.methods.part import Inputs, Part, PartConfig, State
from llama_adapter.methods.shape import Layout


@dataclass(frozen=True)
class PromptsConfig(PartConfig):
    """The settings of adaptation prompts."""

    prompt_length: int = 10  # K

    def __post_init__(self) -> None:
        if self.prompt_length < 1:
            raise UsageError(f"prompt length: {self.prompt_length} given; choose 1 or more (the paper: 10)")


class Prompts(Part):
    """K prompts for each of the top L layers and one gate a head.

    Attributes:
        embeddings: (L, K, D), drawn from N(0, 1), then scaled to the size of what each layer reads from
            tokens: nothing normalises them before the frozen projections.
        gates: (L, H), zero at the start, so that an untrained adapter leaves the decoder as it is.
    """

    kind = "prompts"
    Config = PromptsConfig

    def __init__(
        self, config: PromptsConfig, layout: Layout, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, layout, generator)
        layers, shape = layout.adapted_layers, layout.shape
        self.embeddings = nn.Parameter(
            torch.randn(layers, config.prompt_length, shape.hidden_size, generator=generator)
        )
        self.gates = nn.Parameter(torch.zeros(layers, shape.num_heads))

    def initialise(self, decoder: PreTrainedModel, input_sizes: Tensor) -> None:
        self.embeddings.mul_(input_sizes[:, None, None])

    def add_state(self, states: dict[type[Part], State], inputs: Inputs) -> None:
        """Each layer projects its prompts itself, where a sharded layer's weights are gathered."""
        states[Prompts] = {"embeddings": self.embeddings[None], "gates": self.gates[None]}

    @classmethod
    def precompute(cls, state: State, attentions: Sequence[nn.Module]) -> State:
        if any(map(is_sharded, attentions)):
            # The weights are only whole within their layers' forward, where each layer projects its prompts.
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
        """Values of zero add exactly nothing; where rows have more or fewer prompts, a mask keeps the padding
        out of the softmax: "mask", (B, L, K), False at padding."""
        if any(state is not None and "keys" not in state for state in states):
            raise UsageError("rows with adapters of their own cannot share a batch on a sharded decoder")
        merged = super().merge(states)
        _, layers, _, longest, _ = merged["keys"].shape
        # A bare row keeps all of its zeros: a softmax over nothing is no number.
        counts = torch.tensor([longest if state is None else state["keys"].shape[3] for state in states])
        if len(set(counts.tolist())) > 1:
            there = torch.arange(longest) < counts[:, None]
            merged["mask"] = there.to(merged["keys"].device)[:, None].expand(-1, layers, -1)
        return merged

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"prompts": [self.embeddings], "gates": [self.gates]}

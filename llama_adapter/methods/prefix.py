"""Prefix tuning (Li and Liang, arXiv 2101.00190).

Each adapted layer has K trainable keys and values. They come before those of the tokens, in the same softmax.
They have no rotary embedding, and every position sees them:

    out = softmax(q [P_k; k]^T * s) [P_v; v]

A prefix takes attention away from the tokens whatever its keys are. So an untrained prefix changes the
output.

With an MLP (section 4.3 of the paper) the keys and values of all layers are made from K narrow vectors e:

    [P_k; P_v] = c * (W2 tanh(W1 e + b1) + b2)

where c are the sizes of a layer's own keys and values. The MLP is used only in training: for inference its
keys and values are kept.

Shapes: R prefix sets, L adapted layers, K length of the prefix, G key-value heads, d head width, W width of
the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.attention import attention_form
from llama_adapter.methods.decoder import decoder_shape
from llama_adapter.methods.mlp import Mlp
from llama_adapter.methods.part import Inputs, Part, PartConfig, State
from llama_adapter.methods.prepared import attention_layers, hidden_states
from llama_adapter.methods.shape import Layout


@dataclass(frozen=True)
class PrefixConfig(PartConfig):
    """The settings of prefix tuning."""

    prefix_length: int = 10  # K, the number of keys and values in each layer
    prefix_mlp: int = 0  # width of an MLP that makes them in training; 0: none
    # G, and d of keys and of values, if the layers have other numbers than the decoder's config.
    key_value_heads: int = field(default=0, metadata={"derived": True})
    key_width: int = field(default=0, metadata={"derived": True})
    value_width: int = field(default=0, metadata={"derived": True})

    def __post_init__(self) -> None:
        if self.prefix_length < 1:
            raise UsageError(f"prefix length: {self.prefix_length} given; choose 1 or more")
        if self.prefix_mlp < 0:
            raise UsageError(f"prefix MLP: {self.prefix_mlp} given; choose its width, or 0 for none")
        sizes = (self.key_value_heads, self.key_width, self.value_width)
        if min(sizes) < 0 or (max(sizes) > 0 and min(sizes) == 0):
            raise UsageError(f"prefix: heads and widths {sizes} given; expected three numbers above 0")


class Prefix(Part):
    """K keys and values for each layer.

    A new prefix starts as the keys and values that the layers compute for K random tokens. The paper advises
    this (it finds real words better than noise). Noise of the size of a layer's own keys draws attention away
    from the tokens, and trains far worse. In a short trial, noise near zero trained about as well as tokens.

    Attributes:
        keys, values: (L, K, G, d) each. Their d may differ. With an MLP they do not exist; there are instead
        embeddings: (K, W), mlp: from W to all their numbers, and sizes: (2, L), the root mean square of each
            layer's keys and values, which is not trained.
    """

    kind = "prefix"
    Config = PrefixConfig
    learning_rate = 1e-2
    size = "prefix_length"
    config: PrefixConfig
    sizes: Tensor

    def __init__(
        self, config: PrefixConfig, layout: Layout, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, layout, generator)
        layers, shape = layout.adapted_layers, layout.shape
        self.heads = config.key_value_heads or shape.num_key_value_heads
        self.widths = (config.key_width or shape.head_dim, config.value_width or shape.head_dim)
        # `initialise` makes keys and values of these. One more than K: a row's first token is unlike the
        # others.
        self._tokens = torch.randint(shape.vocab_size, (1, config.prefix_length + 1), generator=generator)
        if config.prefix_mlp:
            self.embeddings = nn.Parameter(
                torch.randn(config.prefix_length, config.prefix_mlp, generator=generator)
            )
            self.mlp = Mlp(config.prefix_mlp, layers * self.heads * sum(self.widths), generator)
            self.register_buffer("sizes", torch.ones(2, layers))
        else:
            size = (layers, config.prefix_length, self.heads)
            self.keys, self.values = (
                nn.Parameter(torch.randn(*size, width, generator=generator)) for width in self.widths
            )

    @classmethod
    def complete(cls, config: PrefixConfig, decoder: PreTrainedModel) -> PrefixConfig:
        form = attention_form(attention_layers(decoder)[-1]).keys_and_values
        sizes = (form.heads, form.keys.width // form.heads, form.values.width // form.heads)
        shape = decoder_shape(decoder.config)
        if sizes == (shape.num_key_value_heads, shape.head_dim, shape.head_dim):
            return config
        return replace(config, key_value_heads=sizes[0], key_width=sizes[1], value_width=sizes[2])

    def initialise(self, decoder: PreTrainedModel, input_sizes: Tensor) -> None:
        """Take the keys and values of random tokens, or with an MLP their sizes."""
        if decoder.device.type == "meta":
            return
        found = hidden_states(decoder, self._tokens)
        for number, attention in enumerate(attention_layers(decoder)[-len(input_sizes) :]):
            form = attention_form(attention).keys_and_values
            for which, states in enumerate(form.of(attention, found[attention])):
                own = states[0, :, 1:].transpose(0, 1)
                if self.config.prefix_mlp:
                    self.sizes[which, number] = own.float().square().mean().sqrt()
                else:
                    (self.keys, self.values)[which][number] = own

    def add_state(self, states: dict[type[Part], State], inputs: Inputs) -> None:
        if self.config.prefix_mlp:
            layers = self.layout.adapted_layers
            made = self.mlp(self.embeddings).view(-1, layers, self.heads, sum(self.widths))
            pair = made.transpose(0, 1).split(self.widths, dim=-1)
            keys, values = (
                states * sizes[:, None, None, None] for states, sizes in zip(pair, self.sizes, strict=True)
            )
        else:
            keys, values = self.keys, self.values
        states[Prefix] = {"keys": keys.transpose(1, 2)[None], "values": values.transpose(1, 2)[None]}

    @classmethod
    def keys_of(cls, state: State, attention: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
        return state["keys"], state["values"], state.get("mask")

    @classmethod
    def merge(cls, states: Sequence[State | None]) -> State:
        """If rows have prefixes of different length, in fewer layers, or none, a mask keeps the padding out
        of the softmax: "mask", (B, L, K), False at padding."""
        tensors = ("keys", "values")
        merged = super().merge([state and {name: state[name] for name in tensors} for state in states])
        _, layers, _, longest, _ = merged["keys"].shape
        there = torch.zeros(len(states), layers, longest, dtype=torch.bool, device=merged["keys"].device)
        for own, state in zip(there, states, strict=True):
            if state is not None:
                _, own_layers, _, length, _ = state["keys"].shape
                own[layers - own_layers :, :length] = state.get("mask", True)
        return merged if there.all() else {**merged, "mask": there}

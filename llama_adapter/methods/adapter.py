"""The only trainable module: adaptation prompts, gates, the projection of pictures, scales and biases.

Shapes: L adapted layers, K prompts, D hidden size, H heads, S scales and biases of a layer; N pictures, F
features of one; R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_adapter.methods.config import AdapterConfig, VisionConfig


class Projection(nn.Module):
    """A tower's features -> image tokens (paper, eq. 9): a bottleneck MLP on standardised features.

    The hidden layer and each token are normalised, as in the authors' code, and each layer scales what it
    adds to its prompts: without it a rate at which drawings are learnt sends the tokens of photos far off.

    Attributes:
        mean, scale: (F,), what `fit` found; not trained.
        sizes: (L, D), what a layer multiplies the tokens by; None: they are not normalised.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, vision: VisionConfig, layers: int, hidden_size: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.tokens = vision.image_tokens
        self.sizes = nn.Parameter(torch.ones(layers, hidden_size)) if vision.normalised else None
        self.register_buffer("mean", torch.zeros(vision.feature_width))
        self.register_buffer("scale", torch.ones(vision.feature_width))
        self.down = nn.Linear(vision.feature_width, vision.bottleneck)
        self.up = nn.Linear(vision.bottleneck, self.tokens * hidden_size)
        for layer in (self.down, self.up):  # torch's own initialisation, from our generator
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    def fit(self, pictures: Iterable[Tensor]) -> None:
        """Take mean and deviation of pictures' features, (F,) each: channels differ much."""
        features = torch.stack(list(pictures))
        self.mean.copy_(features.mean(0))
        # A channel that none of them stirs would drown all others on the first picture that does.
        self.scale.copy_(1 / features.std(0, correction=0).clamp_min(1e-2))

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, F) -> image tokens (N, 1 or K, D), the same for all layers."""
        hidden = self._normalise(self.down((features.to(self.mean) - self.mean) * self.scale))
        tokens: Tensor = self.up(F.gelu(hidden)).unflatten(-1, (self.tokens, -1))
        return self._normalise(tokens)

    def _normalise(self, values: Tensor) -> Tensor:
        return values if self.sizes is None else F.layer_norm(values, values.shape[-1:])

    def for_layers(self, tokens: Tensor) -> Tensor:
        """Tokens (R, 1 or K, D) -> what each layer adds to its prompts, (R, 1 or L, 1 or K, D)."""
        return tokens[:, None] if self.sizes is None else tokens[:, None] * self.sizes[:, None]


class Adapter(nn.Module):
    """K prompts for each of the top L layers and one gate a head (paper, section 3.1).

    Attributes:
        prompts: (L, K, D), drawn from N(0, 1), which `LlamaAdapter.new_adapter` scales to the size of what
            its base's layers read; nothing normalises them before the frozen projections.
        gates: (L, H), zero at the start, so that an untrained adapter leaves the decoder as it is.
        projection: of pictures, or None for an adapter that knows nothing of them.
        tuning: (L, S) scales and biases, zero at the start (`llama_adapter.methods.tuning`), or None without.
    """

    def __init__(self, config: AdapterConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        layers, shape = config.adapted_layers, config.shape
        prompts = torch.randn(layers, config.prompt_length, shape.hidden_size, generator=generator)
        self.prompts = nn.Parameter(prompts)
        self.gates = nn.Parameter(torch.zeros(layers, shape.num_heads))
        self.tuning: nn.Parameter | None = None
        if config.tuning_width:
            self.tuning = nn.Parameter(torch.zeros(layers, config.tuning_width))
        self.projection: Projection | None = None
        if config.vision is not None:
            self.projection = Projection(config.vision, layers, shape.hidden_size, generator)

    def forward(self, features: Tensor | None = None, owners: Tensor | None = None, rows: int = 1) -> Tensor:
        """The prompts of every adapted layer, (1, L, K, D), or with pictures (R, L, K, D).

        A row's image token is added to each of its prompts in each layer (paper, eq. 10); the tokens of
        several pictures are averaged; a row without one gets the prompts as they are.

        Args:
            features: (N, F), of all pictures of all rows; None where there is none.
            owners: (N,), the row that each picture belongs to.
            rows: R.
        """
        prompts: Tensor = self.prompts[None]
        if features is None or owners is None:
            return prompts
        assert self.projection is not None
        tokens = self.projection(features)
        counts = torch.bincount(owners, minlength=rows).clamp_min(1)
        shares = tokens / counts[owners, None, None]
        image = shares.new_zeros(rows, *shares.shape[1:]).index_add(0, owners, shares)
        return prompts + self.projection.for_layers(image)

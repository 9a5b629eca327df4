"""Adds pictures to the prompts: projects a vision tower's features (arXiv 2303.16199, section 3.3).

    I = Projection(concat of the tower's global features at M depths)        (eq. 9)
    P_l + I for each layer and prompt                                        (eq. 10)

Shapes: L adapted layers, K prompts, D hidden size; N pictures, F features of one picture; H hidden
units; R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from llama_adapter.common.errors import UsageError
from llama_adapter.methods.part import Inputs, Part, PartConfig, State
from llama_adapter.methods.prompts import Prompts
from llama_adapter.methods.shape import Layout

_RIDGE = 1e-3  # of `match`, a row: hidden values are about 1 in size


@dataclass(frozen=True)
class VisionConfig(PartConfig):
    """How an adapter sees (paper, section 3.3).

    Attributes:
        tower: name, folder, hub id or MODEL:TAG of the open_clip model that it was trained with.
        tower_fingerprint: identifies the tower's weights and preprocessing. Another tower is refused.
        depths: the depths of the tower whose global features are concatenated, lowest first. They count from
            1; 0 is the picture's colours, -1 what stands out from its border.
        feature_width: F, the width of the concatenated features.
        bottleneck: width of the projection's hidden layer.
        image_tokens: 1, added to every prompt (eq. 10), or K, one for each, as in the authors' later code.
        normalised: whether the projection normalises its hidden layer and its tokens, as in the authors'
            code, and scales the tokens for each layer. False in older adapters.
    """

    tower: str
    tower_fingerprint: str
    depths: tuple[int, ...]
    feature_width: int
    bottleneck: int = 128
    image_tokens: int = 1
    normalised: bool = True

    def __post_init__(self) -> None:
        for name in ("feature_width", "bottleneck", "image_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')}: {getattr(self, name)} given; choose 1 or more")
        if self.normalised and self.bottleneck == 1:
            raise UsageError("bottleneck: 1 given; choose 2 or more, since one number normalised is always 0")
        if not self.depths or any(not isinstance(depth, int) or depth < -1 for depth in self.depths):
            raise UsageError(f"depths: {list(self.depths)} given; expected numbers from -1")


class Projection(Part):
    """Turns a tower's features into image tokens, by a bottleneck MLP on standardised features.

    The hidden layer and each token are normalised, as in the authors' code, and each layer scales the tokens
    before it adds them to its prompts. Without this, a learning rate at which drawings are learnt drives the
    tokens of photos far off.

    Attributes:
        mean, scale: (F,), computed by `fit`, not trained.
        sizes: (L, D), the factors for the tokens in each layer. None: tokens are not normalised.
    """

    kind = "projection"
    Config = VisionConfig
    mean: Tensor
    scale: Tensor

    def __init__(
        self, config: VisionConfig, layout: Layout, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config, layout, generator)
        layers, hidden_size = layout.adapted_layers, layout.shape.hidden_size
        self.tokens = config.image_tokens
        self.sizes = nn.Parameter(torch.ones(layers, hidden_size)) if config.normalised else None
        self.register_buffer("mean", torch.zeros(config.feature_width))
        self.register_buffer("scale", torch.ones(config.feature_width))
        self.down = nn.Linear(config.feature_width, config.bottleneck)
        self.up = nn.Linear(config.bottleneck, self.tokens * hidden_size)
        for layer in (self.down, self.up):  # torch's own initialisation, but from our generator
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    def initialise(self, decoder: PreTrainedModel, input_sizes: Tensor) -> None:
        if self.sizes is not None:
            self.sizes.mul_(input_sizes[:, None])

    def fit(self, pictures: Iterable[Tensor]) -> None:
        """Compute mean and deviation of pictures' features, (F,) each: channels differ greatly."""
        features = torch.stack(list(pictures))
        self.mean.copy_(features.mean(0))
        # A channel that is constant in all of them would dominate for the first picture in which it is not.
        self.scale.copy_(1 / features.std(0, correction=0).clamp_min(1e-2))

    def take_over(self, other: Part) -> None:
        """Copy another projection's values.

        The other's depths are the last ones here, and its hidden units the first ones. With as many hidden
        units the tokens stay the same: the weights of the depths that it lacks are zero. With more of them
        the tokens change, since a normalised hidden layer has other values. `match` then makes them alike.
        """
        state = self.state_dict()  # shares the memory of parameters and buffers
        with torch.no_grad():
            for name, value in other.state_dict().items():
                own = state[name]
                if name.startswith("down."):
                    own = own[: len(value)]
                if name == "up.weight":
                    own[:, value.shape[1] :] = 0
                    own = own[:, : value.shape[1]]
                added = own.shape[-1] - value.shape[-1]
                own[..., added:] = value
                if name == "down.weight":
                    own[:, :added] = 0

    def match(self, features: Tensor, tokens: Tensor) -> float:
        """Choose the upper layer so that the tokens of pictures come close to given ones: ridge regression.

        Args:
            features: (N, F).
            tokens: (N, 1 or K, D), such as another projection gives for these pictures.

        Returns:
            the share of these tokens' variance that this explains, 1 at most.
        """
        with torch.no_grad():
            # On the CPU, in double precision, which not every accelerator has.
            hidden, wanted = (part.cpu().double() for part in (self.hidden(features), tokens.flatten(1)))
            means = hidden.mean(0), wanted.mean(0)
            hidden, wanted = hidden - means[0], wanted - means[1]
            products = hidden.t() @ hidden
            products.diagonal().add_(_RIDGE * len(hidden))
            weight = torch.linalg.solve(products, hidden.t() @ wanted).t()
            self.up.weight.copy_(weight)
            self.up.bias.copy_(means[1] - weight @ means[0])
            rest = wanted - hidden @ weight.t()
            return 1 - float(rest.square().sum() / wanted.square().sum().clamp_min(1e-12))

    def hidden(self, features: Tensor) -> Tensor:
        """Features (N, F) -> the hidden layer, (N, H)."""
        return F.gelu(self._normalise(self.down((features.to(self.mean) - self.mean) * self.scale)))

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, F) -> image tokens (N, 1 or K, D), the same for all layers."""
        return self._normalise(self.up(self.hidden(features)).unflatten(-1, (self.tokens, -1)))

    def _normalise(self, values: Tensor) -> Tensor:
        return values if self.sizes is None else F.layer_norm(values, values.shape[-1:])

    def for_layers(self, tokens: Tensor) -> Tensor:
        """Tokens (R, 1 or K, D) -> what each layer adds to its prompts, (R, 1 or L, 1 or K, D)."""
        return tokens[:, None] if self.sizes is None else tokens[:, None] * self.sizes[:, None]

    def add_state(self, states: dict[type[Part], State], inputs: Inputs) -> None:
        """Add each row's image tokens to its prompts in each layer, which gives prompts (R, L, K, D).

        The tokens of several pictures are averaged. A row without a picture keeps its prompts unchanged.
        """
        if inputs.features is None or inputs.owners is None:
            return
        tokens, owners, rows = self(inputs.features), inputs.owners, inputs.rows
        counts = torch.bincount(owners, minlength=rows).clamp_min(1)
        shares = tokens / counts[owners, None, None]
        image = shares.new_zeros(rows, *shares.shape[1:]).index_add(0, owners, shares)
        prompts = states[Prompts]
        prompts["embeddings"] = prompts["embeddings"] + self.for_layers(image)

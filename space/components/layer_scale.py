"""LayerScale: what a residual adds, times a learned factor for each channel, `(B, N, C) -> (B, N, C)`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from space.component import POSITIVE, Choice, Cost, TokenShape, component


@component("layer_scale", "learned", choices={"init": Choice(offered=(1e-6, 1e-5, 1e-4, 0.1), default=1e-6, allowed=POSITIVE)})
class LayerScale(nn.Module):
    """A learned factor for each channel of what a residual adds, `init` at the start (timm's `init_values`).

    Going deeper with Image Transformers, https://arxiv.org/abs/2103.17239, equation 4. timm starts DeiT III at 1e-6.
    """

    def __init__(self, shape: TokenShape, *, init: float):
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((shape.dim,), init))

    @staticmethod
    def cost(shape: TokenShape, *, init: float) -> Cost:
        return Cost(params=shape.dim)

    def init_weights(self, generator: torch.Generator | None) -> None:
        nn.init.constant_(self.gamma, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma

"""Norms before each mixer, before each feed-forward and after the last stage."""

from __future__ import annotations

from torch import nn

from space.component import POSITIVE, Choice, Cost, TokenShape, component


@component("norm", "layer_norm", choices={"eps": Choice(offered=(1e-6, 1e-5), default=1e-6, allowed=POSITIVE)})
class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each token; timm's ViT takes eps 1e-6, PyTorch's default is 1e-5."""

    def __init__(self, shape: TokenShape, *, eps: float):
        super().__init__(shape.dim, eps=eps)

    @staticmethod
    def cost(shape: TokenShape, *, eps: float) -> Cost:
        return Cost.layer_norm(shape.num_tokens, shape.dim)

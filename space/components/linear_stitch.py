"""SN-Net's stitch: an affine map from the tokens of one network to those of another.

Stitchable Neural Networks, https://arxiv.org/abs/2302.06586, section 3.2; SN-Netv2, https://arxiv.org/abs/2307.00154.
"""

from __future__ import annotations

from torch import Tensor, nn

from space.component import Cost, TokenShape, component


@component("downsampling", "linear")
class LinearStitch(nn.Module):
    """One affine map of every token, the class token included: `(B, N, C) -> (B, N, out_dim)`. The grid stays as it is."""

    def __init__(self, shape: TokenShape, *, out_dim: int):
        super().__init__()
        self.proj = nn.Linear(shape.dim, out_dim)

    @staticmethod
    def output_shape(shape: TokenShape, *, out_dim: int) -> TokenShape:
        return shape._replace(dim=out_dim)

    @staticmethod
    def cost(shape: TokenShape, *, out_dim: int) -> Cost:
        return Cost.linear(shape.num_tokens, shape.dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)

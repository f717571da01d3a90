"""Feed-forward networks: every token by itself, `(B, N, C) -> (B, N, C)`."""

from __future__ import annotations

from torch import Tensor, nn

from space.component import POSITIVE, Choice, Cost, LinearMaps, TokenShape, component


@component("feed_forward", "mlp", choices={"hidden_dim": Choice(offered=(64, 128, 256, 384, 512, 768, 1536, 3072), allowed=POSITIVE)})
class FeedForward(nn.Module):
    """Linear, GELU, Linear.

    The hidden width is a count and not a ratio: searched ratios times odd widths need a rounding, and the spec states its result.
    """

    def __init__(self, shape: TokenShape, *, hidden_dim: int):
        super().__init__()
        from timm.layers.mlp import Mlp  # here, since timm takes 1.5 s to import and describing a spec needs none of it

        self.mlp = Mlp(shape.dim, hidden_dim)

    @staticmethod
    def cost(shape: TokenShape, *, hidden_dim: int) -> Cost:
        return Cost.linear(shape.num_tokens, shape.dim, hidden_dim) + Cost.linear(shape.num_tokens, hidden_dim, shape.dim)

    @staticmethod
    def linear_maps(shape: TokenShape, *, hidden_dim: int) -> LinearMaps:
        return ((shape.dim, hidden_dim, 1), (hidden_dim, shape.dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)

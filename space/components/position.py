"""Absolute position embeddings, added once to the tokens: `(B, N, C) -> (B, N, C)`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from space.component import Choice, Cost, TokenShape, component
from space.registry import SpecError


@component("position", "learned", choices={"covers_prefix": Choice(offered=(True, False), default=True)})
class LearnedPosition(nn.Module):
    """One learned vector per token (timm's `pos_embed`); trunc-normal, std 0.02.

    Without `covers_prefix` only patches have one and prefix tokens stay as they are: DeiT III (https://arxiv.org/abs/2204.07118), timm's
    `no_embed_class`.
    """

    def __init__(self, shape: TokenShape, *, covers_prefix: bool):
        super().__init__()
        self.num_left_out = 0 if covers_prefix else shape.num_prefix
        self.pos_embed = nn.Parameter(torch.zeros(1, shape.num_tokens - self.num_left_out, shape.dim))

    @staticmethod
    def output_shape(shape: TokenShape, *, covers_prefix: bool) -> TokenShape:
        if not covers_prefix and not shape.num_prefix:
            # Otherwise one network would have two digests.
            raise SpecError("covers_prefix is False, but there are no prefix tokens; leave it out")
        return shape

    @staticmethod
    def cost(shape: TokenShape, *, covers_prefix: bool) -> Cost:
        return Cost(params=(shape.num_tokens if covers_prefix else shape.num_patches) * shape.dim)

    def init_weights(self, generator: torch.Generator | None) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def forward(self, x: Tensor) -> Tensor:
        if not self.num_left_out:
            return x + self.pos_embed
        return torch.cat([x[:, : self.num_left_out], x[:, self.num_left_out :] + self.pos_embed], dim=1)


@component("position", "sincos", needs_grid=True)
class SinCosPosition(nn.Module):
    """Fixed 2-D sines and cosines as in MAE (https://arxiv.org/abs/2111.06377): no parameters, zeros for prefix tokens."""

    pos: Tensor

    def __init__(self, shape: TokenShape):
        super().__init__()
        assert shape.grid is not None
        patches = sincos_2d(shape.dim, shape.grid)
        pos = torch.cat([torch.zeros(shape.num_prefix, shape.dim), patches])
        # Not persistent: the shape determines it, and weights then load at any image size.
        self.register_buffer("pos", pos.unsqueeze(0), persistent=False)

    @staticmethod
    def output_shape(shape: TokenShape) -> TokenShape:
        if shape.dim % 4:
            raise SpecError(f"the width {shape.dim} is not a multiple of 4 (sine and cosine of column and row)")
        return shape

    @staticmethod
    def cost(shape: TokenShape) -> Cost:
        return Cost()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pos


def sincos_2d(dim: int, grid: tuple[int, int]) -> Tensor:
    """The embedding of every grid position, `(height * width, dim)`: the first half encodes the column, the second the row."""
    height, width = grid
    rates = torch.exp(torch.arange(dim // 4, dtype=torch.float64) * (-math.log(10000.0) / (dim // 4)))

    def encode(index: Tensor) -> Tensor:
        angle = index.double().unsqueeze(1) * rates
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    columns, rows = encode(torch.arange(width)), encode(torch.arange(height))
    return torch.cat([columns.repeat(height, 1), rows.repeat_interleave(width, dim=0)], dim=1).float()

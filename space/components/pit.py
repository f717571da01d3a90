"""PiT's pooling layer between stages.

Rethinking Spatial Dimensions of Vision Transformers (PiT), https://arxiv.org/abs/2103.16302.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from space.component import Cost, TokenShape, component
from space.registry import SpecError

KERNEL, STRIDE, PADDING = 3, 2, 1


@component("downsampling", "depthwise_conv", needs_grid=True)
class DepthwiseDownsampling(nn.Module):
    """A depth-wise 3x3 convolution of stride 2 over the patches, a linear layer for the class token.

    `(B, P + H * W, C) -> (B, P + ceil(H / 2) * ceil(W / 2), out_dim)`, where P is 0 or the class token's 1. The convolution has a group
    for each channel that comes in, so `out_dim` is a multiple of C; zero padding of 1 pixel.
    """

    def __init__(self, shape: TokenShape, *, out_dim: int):
        super().__init__()
        assert shape.grid is not None
        self.grid = shape.grid
        self.num_prefix = shape.num_prefix
        self.conv = nn.Conv2d(shape.dim, out_dim, KERNEL, STRIDE, PADDING, groups=shape.dim)
        self.class_proj = nn.Linear(shape.dim, out_dim) if shape.has_class_token else None

    @staticmethod
    def output_shape(shape: TokenShape, *, out_dim: int) -> TokenShape:
        assert shape.grid is not None
        if shape.num_prefix > int(shape.has_class_token):
            raise SpecError(f"{shape.num_prefix} prefix tokens; the class token alone has a way past the convolution")
        if out_dim % shape.dim:
            raise SpecError(f"the next width {out_dim} is not a multiple of the width {shape.dim}, whose channels are the groups")
        grid = ((shape.grid[0] + 1) // STRIDE, (shape.grid[1] + 1) // STRIDE)
        return shape._replace(dim=out_dim, num_patches=grid[0] * grid[1], grid=grid)

    @staticmethod
    def cost(shape: TokenShape, *, out_dim: int) -> Cost:
        after = DepthwiseDownsampling.output_shape(shape, out_dim=out_dim)
        conv = Cost.linear(after.num_patches, KERNEL * KERNEL, out_dim)
        return conv + Cost.linear(1, shape.dim, out_dim) if shape.has_class_token else conv

    def forward(self, x: Tensor) -> Tensor:
        B, _, C = x.shape
        prefix, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        patches = self.conv(patches.transpose(1, 2).reshape(B, C, *self.grid)).flatten(2).transpose(1, 2)
        return patches if self.class_proj is None else torch.cat([self.class_proj(prefix), patches], dim=1)

"""Patch embeddings: images to tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from space.component import POSITIVE, Choice, Cost, ImageShape, TokenShape, component
from space.registry import ImageSizeError
from space.spec import Component


@component(
    "patch_embed",
    "conv",
    choices={
        "kernel": Choice(offered=(4, 5, 6, 7, 8, 16), allowed=POSITIVE),
        "stride": Choice(offered=(4, 8, 16), allowed=POSITIVE),
        "bias": Choice(offered=(True, False), default=True),
        "norm": Choice(offered=(False, True), default=False),
        "padding": Choice(offered=(True, False), default=True),
    },
)
class ConvPatchEmbed(nn.Module):
    """One strided convolution, `(B, in_chans, height, width) -> (B, N, out_dim)`, optionally followed by a LayerNorm.

    A kernel wider than its stride is zero-padded by the difference, the odd pixel right and below, so that the grid is
    `size / stride` for every kernel. kernel = stride = 16 is the patch embedding of ViT and DeiT; As-ViT
    (https://arxiv.org/abs/2202.11921) takes stride 4, kernels of 4 to 8 and the LayerNorm (eps 1e-5). Without `padding` such a kernel
    stays inside the image, and the grid is `(size - kernel) // stride + 1`: PiT (https://arxiv.org/abs/2103.16302).
    """

    def __init__(self, shape: ImageShape, *, kernel: int, stride: int, bias: bool, norm: bool, padding: bool, out_dim: int):
        super().__init__()
        before, after = _padding(kernel, stride) if padding else (0, 0)
        self.pad = (before, after, before, after)
        self.proj = nn.Conv2d(shape.in_chans, out_dim, kernel, stride, bias=bias)
        self.norm = nn.LayerNorm(out_dim) if norm else nn.Identity()

    @staticmethod
    def canonical(*, kernel: int, stride: int, bias: bool, norm: bool, padding: bool) -> Component:
        return Component("conv", kernel=kernel, stride=stride, bias=bias, norm=norm, padding=padding or kernel <= stride)

    @staticmethod
    def output_shape(shape: ImageShape, *, kernel: int, stride: int, bias: bool, norm: bool, padding: bool, out_dim: int) -> TokenShape:
        if not padding:
            if min(shape.height, shape.width) < kernel:
                raise ImageSizeError(f"an image of {shape.height}x{shape.width} pixels is smaller than the kernel {kernel}")
            grid = ((shape.height - kernel) // stride + 1, (shape.width - kernel) // stride + 1)
        elif shape.height % stride or shape.width % stride:
            raise ImageSizeError(f"an image of {shape.height}x{shape.width} pixels is not a multiple of the stride {stride}")
        else:
            grid = (shape.height // stride, shape.width // stride)
        return TokenShape(out_dim, grid[0] * grid[1], grid)

    @staticmethod
    def cost(shape: ImageShape, *, kernel: int, stride: int, bias: bool, norm: bool, padding: bool, out_dim: int) -> Cost:
        num_patches = ConvPatchEmbed.output_shape(
            shape, kernel=kernel, stride=stride, bias=bias, norm=norm, padding=padding, out_dim=out_dim
        ).num_patches
        conv = Cost.linear(num_patches, kernel * kernel * shape.in_chans, out_dim, bias)
        return conv + Cost.layer_norm(num_patches, out_dim) if norm else conv

    def forward(self, x: Tensor) -> Tensor:
        if any(self.pad):
            x = F.pad(x, self.pad)
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


def _padding(kernel: int, stride: int) -> tuple[int, int]:
    total = max(0, kernel - stride)
    return total // 2, total - total // 2

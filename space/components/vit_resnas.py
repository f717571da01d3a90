"""ViT-ResNAS's stem and its step between stages.

Searching for Efficient Multi-Stage Vision Transformers, https://arxiv.org/abs/2109.00642. There the stem has 24 channels and a stride of
14, and two reductions lead from 224 pixels to grids of 16, 8 and 4 patches a side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from space.component import POSITIVE, Choice, Cost, ImageShape, TokenShape, component
from space.registry import ImageSizeError, SpecError

EPS = 1e-6
"""Of the norm in the reduction, as everywhere in the published networks."""
POSITION_STD = 0.02


@component(
    "patch_embed",
    "residual_conv_stem",
    choices={
        "kernel": Choice(offered=(2, 4, 7), allowed=POSITIVE),
        "mid_dim": Choice(offered=(24, 16, 32), default=24, allowed=POSITIVE),
    },
    slices_output=True,
)
class ResidualConvStem(nn.Module):
    """Three 3x3 convolutions at half the image's size, then patches of theirs: `(B, in_chans, H, W) -> (B, N, out_dim)`.

    Each of the three is `mid_dim` wide, without bias, and followed by a batch norm and a ReLU; what the second and the third give is added
    to what the first gave. The last convolution takes patches of `kernel` x `kernel` positions, so the stem's stride is
    `2 * kernel` pixels. A network of fewer channels shares all but the rows of this last convolution, batch statistics included.
    """

    def __init__(self, shape: ImageShape, *, kernel: int, mid_dim: int, out_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(shape.in_chans, mid_dim, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(mid_dim)
        self.conv2 = nn.Conv2d(mid_dim, mid_dim, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(mid_dim)
        self.conv3 = nn.Conv2d(mid_dim, mid_dim, 3, 1, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(mid_dim)
        self.proj = nn.Conv2d(mid_dim, out_dim, kernel, kernel)

    @staticmethod
    def output_shape(shape: ImageShape, *, kernel: int, mid_dim: int, out_dim: int) -> TokenShape:
        stride = 2 * kernel
        if shape.height % stride or shape.width % stride:
            raise ImageSizeError(f"an image of {shape.height}x{shape.width} pixels is not a multiple of the stride {stride}")
        grid = (shape.height // stride, shape.width // stride)
        return TokenShape(out_dim, grid[0] * grid[1], grid)

    @staticmethod
    def cost(shape: ImageShape, *, kernel: int, mid_dim: int, out_dim: int) -> Cost:
        num_positions = (shape.height // 2) * (shape.width // 2)
        first = Cost.linear(num_positions, 9 * shape.in_chans, mid_dim, bias=False)
        further = Cost.linear(num_positions, 9 * mid_dim, mid_dim, bias=False)
        norm = Cost(params=2 * mid_dim, fvcore_macs=2 * num_positions * mid_dim)
        patches = Cost.linear(num_positions // kernel**2, kernel**2 * mid_dim, out_dim)
        return sum([first, norm, further, norm, further, norm], patches)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(first)))
        x = F.relu(self.norm3(self.conv3(x)))
        return self.proj(x + first).flatten(2).transpose(1, 2)


@component("downsampling", "residual_spatial_reduction", needs_grid=True)
class ResidualSpatialReduction(nn.Module):
    """A strided convolution beside a pooled residual: `(B, P + N, C) -> (B, P + N / 4, out_dim)`, P the class token's 1 or 0.

    All tokens are normalised; the patches then go through a 3x3 convolution of stride 2 and get learned positions, the class token goes
    through a linear layer. The residual is what came in, not normalised: means of 2 x 2 patches and the class token, with zeros for the
    channels from C to `out_dim`. As DeiT's, positions take no weight decay; the released code decays them.
    """

    def __init__(self, shape: TokenShape, *, out_dim: int):
        super().__init__()
        assert shape.grid is not None
        self.grid = shape.grid
        self.num_prefix = shape.num_prefix
        self.num_new_channels = out_dim - shape.dim
        self.norm = nn.LayerNorm(shape.dim, eps=EPS)
        self.conv = nn.Conv2d(shape.dim, out_dim, 3, 2, 1)
        self.class_proj = nn.Linear(shape.dim, out_dim) if shape.has_class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, shape.num_patches // 4, out_dim))

    @staticmethod
    def output_shape(shape: TokenShape, *, out_dim: int) -> TokenShape:
        assert shape.grid is not None
        if shape.num_prefix > int(shape.has_class_token):
            raise SpecError(f"{shape.num_prefix} prefix tokens; the class token alone has a way past the convolution")
        if shape.grid[0] % 2 or shape.grid[1] % 2:
            raise ImageSizeError(f"the grid {shape.grid[0]}x{shape.grid[1]} has an odd side and cannot be halved")
        if out_dim < shape.dim:
            raise SpecError(f"the next width {out_dim} is below the width {shape.dim}, which the residual keeps")
        grid = (shape.grid[0] // 2, shape.grid[1] // 2)
        return shape._replace(dim=out_dim, num_patches=grid[0] * grid[1], grid=grid)

    @staticmethod
    def cost(shape: TokenShape, *, out_dim: int) -> Cost:
        num_reduced = shape.num_patches // 4
        norm, positions = Cost.layer_norm(shape.num_tokens, shape.dim), Cost(params=num_reduced * out_dim)
        patches = norm + Cost.linear(num_reduced, 9 * shape.dim, out_dim) + positions
        return patches + Cost.linear(1, shape.dim, out_dim) if shape.has_class_token else patches

    def init_weights(self, generator: torch.Generator | None) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=POSITION_STD, generator=generator)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        patches = _tokens(self.conv(self._image(normed))) + self.pos_embed
        residual = _tokens(F.avg_pool2d(self._image(x), 2))
        if self.class_proj is not None:
            patches = torch.cat([self.class_proj(normed[:, :1]), patches], dim=1)
            residual = torch.cat([x[:, :1], residual], dim=1)
        return patches + F.pad(residual, (0, self.num_new_channels))

    def _image(self, x: Tensor) -> Tensor:
        """The patches as `(B, C, height, width)`."""
        B, _, C = x.shape
        return x[:, self.num_prefix :].transpose(1, 2).reshape(B, C, *self.grid)


def _tokens(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)

"""Downsampling between stages: a coarser grid of wider tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from space.component import Choice, Cost, Folds, TokenShape, component
from space.registry import ImageSizeError, SpecError


@component("downsampling", "patch_merging", choices={"kernel": Choice(offered=(2, 3, 4))}, needs_grid=True)
class PatchMerging(nn.Module):
    """Overlapping neighbourhoods at stride 2, joined, normalised and projected: `(B, N, C) -> (B, N / 4, out_dim)`.

    As-ViT (https://arxiv.org/abs/2202.11921): zero padding, unfolding of `kernel * kernel` tokens, LayerNorm (eps 1e-5)
    and a linear layer without bias. kernel = 2 sees the same tokens as Swin's patch merging.
    """

    def __init__(self, shape: TokenShape, *, kernel: int, out_dim: int):
        super().__init__()
        assert shape.grid is not None
        self.grid = shape.grid
        self.kernel = kernel
        before, after = (kernel - 2) // 2, (kernel - 1) // 2
        self.pad = (before, after, before, after)
        self.norm = nn.LayerNorm(kernel * kernel * shape.dim)
        self.reduction = nn.Linear(kernel * kernel * shape.dim, out_dim, bias=False)

    @staticmethod
    def output_shape(shape: TokenShape, *, kernel: int, out_dim: int) -> TokenShape:
        assert shape.grid is not None
        if shape.num_prefix:
            raise SpecError(f"{shape.num_prefix} prefix tokens have no place on the grid that is merged")
        if shape.grid[0] % 2 or shape.grid[1] % 2:
            raise ImageSizeError(f"the grid {shape.grid[0]}x{shape.grid[1]} has an odd side and cannot be halved")
        grid = (shape.grid[0] // 2, shape.grid[1] // 2)
        return TokenShape(out_dim, grid[0] * grid[1], grid)

    @staticmethod
    def cost(shape: TokenShape, *, kernel: int, out_dim: int) -> Cost:
        num_merged, dim = shape.num_patches // 4, kernel * kernel * shape.dim
        return Cost.layer_norm(num_merged, dim) + Cost.linear(num_merged, dim, out_dim, bias=False)

    @staticmethod
    def folds(shape: TokenShape, *, kernel: int, out_dim: int) -> dict[str, Folds]:
        neighbourhood = (shape.dim, kernel, kernel)
        return {"norm.weight": (neighbourhood,), "norm.bias": (neighbourhood,), "reduction.weight": ((out_dim,), neighbourhood)}

    def forward(self, x: Tensor) -> Tensor:
        B, _, C = x.shape
        image = F.pad(x.transpose(1, 2).reshape(B, C, *self.grid), self.pad)
        neighbourhoods = F.unfold(image, self.kernel, stride=2).transpose(1, 2)
        return self.reduction(self.norm(neighbourhoods))

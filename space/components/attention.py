"""Softmax self-attention over all tokens or inside windows.

Attention goes through `F.scaled_dot_product_attention` and leaves its backend to the caller: forward-mode
differentiation on the CPU needs `sdpa_kernel(SDPBackend.MATH)`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from space.component import POSITIVE, AttentionTap, Choice, Cost, LinearMaps, TokenShape, component
from space.registry import SpecError
from space.spec import Component

HEADS = {
    "num_heads": Choice(offered=(1, 2, 3, 4, 6, 8, 12, 16), allowed=POSITIVE),
    "head_dim": Choice(offered=(8, 16, 32, 48, 64), allowed=POSITIVE),
    "qkv_bias": Choice(offered=(True, False), default=True),
}
"""Queries, keys and values are `num_heads * head_dim` wide, whatever the width of the tokens."""


@component("mixer", "attention", choices=HEADS, offers_tap=AttentionTap.CLASS_ROW)
class Attention(nn.Module):
    """Multi-head self-attention over all tokens: `(B, N, C) -> (B, N, C)`."""

    def __init__(self, shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(shape.dim, 3 * num_heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(num_heads * head_dim, shape.dim)

    @staticmethod
    def cost(shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool) -> Cost:
        return attention_cost(shape, shape.num_tokens, num_heads, head_dim, qkv_bias)

    @staticmethod
    def linear_maps(shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool) -> LinearMaps:
        return attention_maps(shape, num_heads, head_dim)

    @staticmethod
    def tap_cost(shape: TokenShape, tap: AttentionTap, *, num_heads: int, head_dim: int, qkv_bias: bool) -> Cost:
        macs = num_heads * shape.num_tokens * head_dim
        return Cost(macs=macs, fvcore_macs=macs)

    def forward(self, x: Tensor, tap: AttentionTap = AttentionTap.NONE) -> Tensor | tuple[Tensor, Tensor]:
        """Attended tokens; with `tap=CLASS_ROW` also the class token's attention, `(B, H, N)`."""
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        y = self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        return (y, class_row(q, k)) if tap else y


@component(
    "mixer",
    "window_attention",
    choices=HEADS | {"splits": Choice(offered=(1, 2, 4, 8), allowed=POSITIVE)},
    needs_grid=True,
)
class WindowAttention(nn.Module):
    """Multi-head self-attention inside `splits * splits` equal windows of the grid: `(B, N, C) -> (B, N, C)`.

    A window is `grid / splits` patches wide and high, neither shifted nor biased: As-ViT (https://arxiv.org/abs/2202.11921).
    """

    def __init__(self, shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool, splits: int):
        super().__init__()
        assert shape.grid is not None
        self.grid = shape.grid
        self.splits = splits
        self.num_heads = num_heads
        self.qkv = nn.Linear(shape.dim, 3 * num_heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(num_heads * head_dim, shape.dim)

    @staticmethod
    def canonical(*, num_heads: int, head_dim: int, qkv_bias: bool, splits: int) -> Component:
        heads = {"num_heads": num_heads, "head_dim": head_dim, "qkv_bias": qkv_bias}
        return Component("attention", **heads) if splits == 1 else Component("window_attention", **heads, splits=splits)

    @staticmethod
    def output_shape(shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool, splits: int) -> TokenShape:
        assert shape.grid is not None
        if shape.num_prefix:
            raise SpecError(f"{shape.num_prefix} prefix tokens belong to no window; use 'attention' or no prefix")
        if shape.grid[0] % splits or shape.grid[1] % splits:
            raise SpecError(f"splits is {splits}, which does not divide the grid {shape.grid[0]}x{shape.grid[1]}")
        return shape

    @staticmethod
    def cost(shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool, splits: int) -> Cost:
        return attention_cost(shape, shape.num_patches // splits**2, num_heads, head_dim, qkv_bias)

    @staticmethod
    def linear_maps(shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool, splits: int) -> LinearMaps:
        return attention_maps(shape, num_heads, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        windows = to_windows(x, self.grid, self.splits)
        q, k, v = split_heads(self.qkv(windows), self.num_heads)
        y = self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        return from_windows(y, self.grid, self.splits)


def attention_cost(shape: TokenShape, num_keys: int, num_heads: int, head_dim: int, qkv_bias: bool) -> Cost:
    """Projections of all tokens and both products, every query seeing `num_keys` keys."""
    width = num_heads * head_dim
    products = 2 * shape.num_tokens * num_keys * width
    qkv = Cost.linear(shape.num_tokens, shape.dim, 3 * width, qkv_bias)
    return qkv + Cost(macs=products, fvcore_macs=products) + Cost.linear(shape.num_tokens, width, shape.dim)


def attention_maps(shape: TokenShape, num_heads: int, head_dim: int) -> LinearMaps:
    """Queries, keys and values of every head, and the projection of all heads."""
    return ((shape.dim, head_dim, 3 * num_heads), (num_heads * head_dim, shape.dim, 1))


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, `(B, N, 3HD) -> 3 x (B, H, N, D)`."""
    B, N, width = qkv.shape
    q, k, v = qkv.reshape(B, N, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def merge_heads(x: Tensor) -> Tensor:
    """`(B, H, N, D) -> (B, N, HD)`."""
    return x.transpose(1, 2).flatten(2)


def class_row(q: Tensor, k: Tensor) -> Tensor:
    """Attention of token 0 to every token, `(B, H, N)`: recomputed alone, so the full map never exists."""
    D = q.shape[-1]
    return ((q[:, :, :1] * D**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1).squeeze(2)


def to_windows(x: Tensor, grid: tuple[int, int], splits: int) -> Tensor:
    """Tokens in row-major order to windows, `(B, N, C) -> (B * splits^2, N / splits^2, C)`."""
    _, N, C = x.shape
    height, width = grid[0] // splits, grid[1] // splits
    windows = x.reshape(-1, splits, height, splits, width, C).transpose(2, 3)
    return windows.reshape(-1, N // splits**2, C)


def from_windows(windows: Tensor, grid: tuple[int, int], splits: int) -> Tensor:
    """The inverse of `to_windows`."""
    C = windows.shape[-1]
    height, width = grid[0] // splits, grid[1] // splits
    x = windows.reshape(-1, splits, splits, height, width, C).transpose(2, 3)
    return x.reshape(-1, grid[0] * grid[1], C)

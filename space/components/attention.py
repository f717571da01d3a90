"""Softmax self-attention over all tokens or inside windows.

Attention goes through `F.scaled_dot_product_attention` and leaves its backend to the caller: forward-mode
differentiation on the CPU needs `sdpa_kernel(SDPBackend.MATH)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from space.component import POSITIVE, AttentionColumns, AttentionTap, Choice, Cost, Folds, LinearMaps, TokenShape, component
from space.registry import SpecError
from space.spec import Component

HEADS = {
    "num_heads": Choice(offered=(1, 2, 3, 4, 6, 8, 12, 16), allowed=POSITIVE),
    "head_dim": Choice(offered=(8, 16, 32, 48, 64), allowed=POSITIVE),
    "qkv_bias": Choice(offered=(True, False), default=True),
}
"""Queries, keys and values are `num_heads * head_dim` wide, whatever the width of the tokens."""


@component("mixer", "attention", choices=HEADS, offers_tap=AttentionTap.FULL_MAP, takes_sizes=True)
class Attention(nn.Module):
    """Multi-head self-attention over all tokens: `(B, N, C) -> (B, N, C)`.

    A token of size s is attended to as s equal tokens: log s is added to the logits of its key (Token merging,
    https://arxiv.org/abs/2210.09461, equation 1). The map of N x N weights is made only for a tap of COLUMN_SUMS or more, or `between`.
    """

    def __init__(self, shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(shape.dim, 3 * num_heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(num_heads * head_dim, shape.dim)

    @staticmethod
    def cost(shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool) -> Cost:
        return attention_cost(shape, shape.num_tokens, num_heads, head_dim, qkv_bias)

    @staticmethod
    def folds(shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool) -> dict[str, Folds]:
        return attention_folds(shape, num_heads, head_dim, qkv_bias)

    @staticmethod
    def linear_maps(shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool) -> LinearMaps:
        return attention_maps(shape, num_heads, head_dim)

    @staticmethod
    def tap_cost(shape: TokenShape, tap: AttentionTap, *, num_heads: int, head_dim: int, qkv_bias: bool) -> Cost:
        # Where the map is made, the taps are read from it; the class row alone is computed a second time.
        return Cost(fvcore_macs=num_heads * shape.num_tokens * head_dim if tap == AttentionTap.CLASS_ROW else 0)

    @staticmethod
    def merged_cost(shape: TokenShape, merged: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool) -> Cost:
        width, N, M = num_heads * head_dim, shape.num_tokens, merged.num_tokens
        projections = (Cost.linear(N, shape.dim, 2 * width, qkv_bias), Cost.linear(M, shape.dim, width, qkv_bias))
        products = (N * N + M * M) * width
        return sum(projections, Cost(macs=products, fvcore_macs=products)) + Cost.linear(M, width, shape.dim)

    def forward(
        self,
        x: Tensor,
        tap: AttentionTap = AttentionTap.NONE,
        sizes: Tensor | None = None,
        between: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Any:
        """Attended tokens; with a `tap` the pair of them and what it reads.

        `sizes` `(B, N)` are those of the tokens. `between` is called with the map and gives the map `(B, H, M, M)` and the tokens
        `(B, M, C)` that are attended to in their place, normalised: the output is then `(B, M, C)`.
        """
        if between is not None:
            width = self.proj.in_features
            queries_keys, values = self._projected(x, slice(0, 2 * width)), slice(2 * width, None)
            q, k = queries_keys.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            weights, x = between(attention_map(q, k, sizes))
            v = self._projected(x, values).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            return self.proj(merge_heads(weights @ v))
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        if tap >= AttentionTap.COLUMN_SUMS:
            weights = attention_map(q, k, sizes)
            y = self.proj(merge_heads(weights @ v))
            return y, weights if tap == AttentionTap.FULL_MAP else columns(weights)
        if sizes is None:
            y = self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        else:
            y = self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=_key_bias(sizes, q))))
        return (y, class_row(q, k, sizes)) if tap else y

    def _projected(self, x: Tensor, rows: slice) -> Tensor:
        bias = None if self.qkv.bias is None else self.qkv.bias[rows]
        return F.linear(x, self.qkv.weight[rows], bias)


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
    def folds(shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool, splits: int) -> dict[str, Folds]:
        return attention_folds(shape, num_heads, head_dim, qkv_bias)

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


def attention_folds(shape: TokenShape, num_heads: int, head_dim: int, qkv_bias: bool) -> dict[str, Folds]:
    """The tensors of `qkv` and `proj`, cut to fewer or narrower heads: each of queries, keys and values by itself."""
    heads = (num_heads, head_dim)
    bias = {"qkv.bias": ((3, *heads),)} if qkv_bias else {}
    return {"qkv.weight": ((3, *heads), (shape.dim,)), **bias, "proj.weight": ((shape.dim,), heads)}


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


def class_row(q: Tensor, k: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Attention of token 0 to every token, `(B, H, N)`: recomputed alone, so the full map never exists."""
    return attention_map(q[:, :, :1], k, sizes).squeeze(2)


def attention_map(q: Tensor, k: Tensor, sizes: Tensor | None = None) -> Tensor:
    """The weights of every key for every query, `(B, H, Q, D), (B, H, N, D) -> (B, H, Q, N)`; `sizes` `(B, N)` are those of the keys."""
    D = q.shape[-1]
    logits = (q * D**-0.5) @ k.transpose(-2, -1)
    return (logits if sizes is None else logits + _key_bias(sizes, logits)).softmax(dim=-1)


def columns(weights: Tensor) -> AttentionColumns:
    """What each key receives in the map `(B, H, N, N)`."""
    return AttentionColumns(weights.sum(dim=2), weights.diagonal(dim1=2, dim2=3))


def _key_bias(sizes: Tensor, like: Tensor) -> Tensor:
    """What sizes `(B, N)` add to the logits, `(B, 1, 1, N)`."""
    return sizes.log()[:, None, None].to(like.dtype)


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

"""AutoFormer's attention: the relative position of two patches changes both their attention and what is read.

AutoFormer: Searching Transformers for Visual Recognition, https://arxiv.org/abs/2107.00651, after Shaw et al., "Self-Attention with
Relative Position Representations", https://arxiv.org/abs/1803.02155. With r(i, j) the sum of a learned vector of the distance in rows
and one of the distance in columns, one such table for keys (K) and one for values (V), shared by the heads:

    a_ij = softmax_j( q_i . (k_j + r_K(i, j)) / sqrt(D) ),      y_i = sum_j a_ij (v_j + r_V(i, j))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from space.component import POSITIVE, Choice, Cost, Folds, LinearMaps, TokenShape, component
from space.components.attention import HEADS, attention_cost, attention_folds, attention_maps, merge_heads, split_heads
from space.registry import SpecError

TABLE_STD = 0.02


@component(
    "mixer",
    "relative_attention",
    choices=HEADS | {"max_distance": Choice(offered=(7, 14), default=14, allowed=POSITIVE, is_sliced=False)},
    needs_grid=True,
)
class RelativeAttention(nn.Module):
    """Multi-head self-attention over all tokens with relative positions in keys and values: `(B, N, C) -> (B, N, C)`.

    Distances beyond `max_distance` rows or columns count as that. One further entry of each table stands for a distance to or from the
    class token. This attention holds the map of all pairs, `(B, H, N, N)`, and two tables of all pairs, `(N, N, head_dim)`.
    """

    index: Tensor

    def __init__(self, shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool, max_distance: int):
        super().__init__()
        assert shape.grid is not None
        self.num_heads = num_heads
        self.qkv = nn.Linear(shape.dim, 3 * num_heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(num_heads * head_dim, shape.dim)
        num_entries = _num_entries(max_distance)
        self.key_rows, self.key_columns, self.value_rows, self.value_columns = (
            nn.Parameter(torch.zeros(num_entries, head_dim)) for _ in range(4)
        )
        # Not persistent: the shape determines it.
        self.register_buffer("index", distance_entries(shape.grid, shape.num_prefix, max_distance), persistent=False)

    @staticmethod
    def output_shape(shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool, max_distance: int) -> TokenShape:
        if shape.num_prefix > int(shape.has_class_token):
            raise SpecError(f"{shape.num_prefix} prefix tokens; the class token alone has a relative position")
        return shape

    @staticmethod
    def cost(shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool, max_distance: int) -> Cost:
        products = 2 * shape.num_tokens**2 * num_heads * head_dim
        tables = 4 * _num_entries(max_distance) * head_dim
        plain = attention_cost(shape, shape.num_tokens, num_heads, head_dim, qkv_bias)
        return plain + Cost(params=tables, macs=products, fvcore_macs=products)

    @staticmethod
    def linear_maps(shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool, max_distance: int) -> LinearMaps:
        return attention_maps(shape, num_heads, head_dim)

    @staticmethod
    def folds(shape: TokenShape, *, num_heads: int, head_dim: int, qkv_bias: bool, max_distance: int) -> dict[str, Folds]:
        return attention_folds(shape, num_heads, head_dim, qkv_bias)

    def init_weights(self, generator: torch.Generator | None) -> None:
        for table in (self.key_rows, self.key_columns, self.value_rows, self.value_columns):
            nn.init.trunc_normal_(table, std=TABLE_STD, generator=generator)

    def no_weight_decay(self) -> set[str]:
        return {"key_rows", "key_columns", "value_rows", "value_columns"}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        q = q * q.shape[-1] ** -0.5
        rows, columns = self.index
        keys = self.key_rows[rows] + self.key_columns[columns]
        values = self.value_rows[rows] + self.value_columns[columns]
        attention = (q @ k.transpose(-2, -1) + _per_query(q, keys.transpose(-2, -1))).softmax(dim=-1)
        return self.proj(merge_heads(attention @ v + _per_query(attention, values)))


def distance_entries(grid: tuple[int, int], num_prefix: int, max_distance: int) -> Tensor:
    """The entries of the row and the column tables for every pair of tokens, `(2, N, N)`; 0 stands for a pair with a prefix token."""
    height, width = grid
    place = torch.arange(height * width)
    places = torch.stack([place // width, place % width])
    distances = places[:, None, :] - places[:, :, None]
    entries = torch.zeros(2, num_prefix + len(place), num_prefix + len(place), dtype=torch.long)
    entries[:, num_prefix:, num_prefix:] = distances.clamp(-max_distance, max_distance) + max_distance + 1
    return entries


def _num_entries(max_distance: int) -> int:
    return 2 * max_distance + 2


def _per_query(x: Tensor, tables: Tensor) -> Tensor:
    """Rows times the table of their own token, `(B, H, N, A)` and `(N, A, E)` to `(B, H, N, E)`."""
    B, H, N, _ = x.shape
    by_token = x.permute(2, 0, 1, 3).reshape(N, B * H, -1) @ tables
    return by_token.reshape(N, B, H, -1).permute(1, 2, 0, 3)

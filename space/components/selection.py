"""Tensor functions that token reductions share: taking tokens and merging them."""

from __future__ import annotations

import torch
from torch import Tensor

from space.component import Tokens


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens at `index`, `(B, N, C), (B, K) -> (B, K, C)`."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def keep(tokens: Tokens, num_prefix: int, patches: Tensor) -> Tokens:
    """The prefix tokens, then the patches at `patches` `(B, K)`, counted without the prefix, in this order, with their sizes."""
    B = patches.shape[0]
    prefix = torch.arange(num_prefix, device=patches.device).expand(B, -1)
    index = torch.cat([prefix, num_prefix + patches], dim=1)
    sizes = None if tokens.sizes is None else tokens.sizes.gather(1, index)
    return tokens._replace(x=take(tokens.x, index), sizes=sizes)


def sum_into(x: Tensor, into: Tensor, num_merged: int) -> Tensor:
    """Tokens added up by where they go, `(B, N, C), (B, N) -> (B, num_merged, C)`: token n is part of merged token `into[:, n]`."""
    B, _, C = x.shape
    return x.new_zeros(B, num_merged, C).scatter_add(1, into.unsqueeze(-1).expand(-1, -1, C), x)


def sizes_of(tokens: Tokens) -> Tensor:
    """The sizes `(B, N)`, ones where the tokens have none."""
    return tokens.x.new_ones(tokens.x.shape[:2]) if tokens.sizes is None else tokens.sizes


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """The cosine of every pair, `(B, N, C), (B, M, C) -> (B, N, M)`."""
    return torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).transpose(1, 2)

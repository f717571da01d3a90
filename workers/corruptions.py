"""Corruptions of test images at rising levels: patch-mix attack, patch drop, patch permutation.

The attack is that of Hardwiring ViT Patch Selectivity into CNNs using Patch Mixing (https://arxiv.org/abs/2306.17848); drop and
permutation are those of Intriguing Properties of Vision Transformers (https://arxiv.org/abs/2105.10497). The random numbers of an
image depend on the seed, the name of the corruption and the image's id alone: not on its batch, nor on the other images. So all
networks get the same corruptions, and the cells that one level replaces are replaced at the next level too. Permutations cannot
nest: tiles of different sizes are shuffled independently.

Letters: g cells per side of a grid, t tiles per side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from space.randomness import stream

PUBLISHED_GRIDS = (7, 14)
"""Cells per side at 224 pixels, coarse and fine: cells of 32 and 16 pixels."""
MIX_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
DROP_SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)


def default_grids(img_size: int) -> tuple[int, int]:
    """Cells per side, coarse and fine: the largest divisors of the image not above 7 and 14 (4 and 8 at 32 pixels).

    Raises ValueError if the image size has no two such divisors.
    """
    coarse, fine = (max(grid for grid in range(1, published + 1) if img_size % grid == 0) for published in PUBLISHED_GRIDS)
    if not 1 < coarse < fine:
        raise ValueError(f"img_size {img_size} has no two grids: it needs a divisor from 2 to 7 and a larger one up to 14")
    return coarse, fine


def tile_sides(img_size: int, fine_grid: int) -> tuple[int, ...]:
    """Tiles per side, fewest first: the powers of two that divide the image and lie below the fine grid, then that grid."""
    powers = (2**exponent for exponent in range(fine_grid.bit_length()))
    return (*(side for side in powers if side < fine_grid and img_size % side == 0), fine_grid)


def cell_counts(shares: Sequence[float], num_cells: int) -> tuple[int, ...]:
    """Each share of `num_cells`, rounded to whole cells, half a cell upwards; equal counts are given once."""
    return tuple(dict.fromkeys(int(share * num_cells + 0.5) for share in shares))


def random_orders(ids: np.ndarray, num_places: int, *, seed: int, name: str) -> Tensor:
    """A uniformly random permutation of `0..num_places-1` for each image id: `(B,) -> (B, num_places)`, int64."""
    return torch.from_numpy(_uniforms(ids, num_places, seed=seed, name=name).argsort(axis=1))


def other_class_partners(ids: np.ndarray, pool: np.ndarray, labels: np.ndarray, *, seed: int) -> np.ndarray:
    """For each image of `ids` the id of a uniformly random image of `pool` that has another class: `(B,) -> (B,)`.

    `labels` are those of all images, by id. Raises ValueError if the pool holds one class only.
    """
    by_class = pool[np.argsort(labels[pool], kind="stable")]
    sorted_labels = labels[by_class]
    first, behind = (np.searchsorted(sorted_labels, labels[ids], side) for side in ("left", "right"))
    num_others = len(pool) - (behind - first)
    if not num_others.all():
        raise ValueError("all test images are of one class; a patch-mix attack takes its patches from images of another class")
    # Images of other classes start behind the block of the own class and continue at the front.
    drawn = (_uniforms(ids, 1, seed=seed, name="partner")[:, 0] * num_others).astype(np.int64)
    return by_class[(behind + drawn) % len(pool)]


def mix_cells(images: Tensor, partners: Tensor, order: Tensor, num_replaced: int) -> Tensor:
    """Images `(B, 3, H, W)` whose first `num_replaced` cells in `order` `(B, g*g)` are their partners' at the same place."""
    return torch.where(_is_among_first(order, num_replaced, images), partners, images)


def drop_cells(images: Tensor, order: Tensor, num_dropped: int) -> Tensor:
    """Images `(B, 3, H, W)` whose first `num_dropped` cells in `order` `(B, g*g)` have the mean colour: 0 once normalised."""
    return images.masked_fill(_is_among_first(order, num_dropped, images), 0.0)


def permute_tiles(images: Tensor, order: Tensor) -> Tensor:
    """Images `(B, 3, H, W)` cut into tiles, the tile at each place being the one that `order` `(B, t*t)` names there."""
    B, C, H, W = images.shape
    t = _side(order, images)
    tiles = images.view(B, C, t, H // t, t, W // t).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    moved = tiles.gather(1, order[:, :, None, None, None].expand_as(tiles))
    return moved.view(B, t, t, C, H // t, W // t).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


def _is_among_first(order: Tensor, count: int, images: Tensor) -> Tensor:
    """Pixel mask `(B, 1, H, W)` of the first `count` cells in `order` `(B, g*g)`."""
    B, _, H, W = images.shape
    g = _side(order, images)
    is_first = torch.zeros(B, g * g, dtype=torch.bool, device=order.device).scatter_(1, order[:, :count], True)
    cells = is_first.view(B, 1, g, 1, g, 1)
    return cells.expand(B, 1, g, H // g, g, W // g).reshape(B, 1, H, W)


def _side(order: Tensor, images: Tensor) -> int:
    H, W = images.shape[-2:]
    side = round(order.shape[1] ** 0.5)
    if side * side != order.shape[1] or H % side or W % side:
        raise ValueError(f"{order.shape[1]} cells do not tile an image of {H} x {W} pixels")
    return side


def _uniforms(ids: np.ndarray, num_columns: int, *, seed: int, name: str) -> np.ndarray:
    """A row of uniforms from [0, 1) for each image id, float64."""
    key = stream(seed, name)
    # A counter-based generator gives the row of an id without drawing the rows before it.
    rows = [np.random.Generator(np.random.Philox(key=key, counter=int(each) << 64)).random(num_columns) for each in ids]
    return np.stack(rows) if rows else np.empty((0, num_columns))

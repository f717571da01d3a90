"""Corruptions of test images: what they replace, what they keep, and what they depend on."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.corruptions import (
    DROP_SHARES,
    MIX_SHARES,
    cell_counts,
    default_grids,
    drop_cells,
    mix_cells,
    other_class_partners,
    permute_tiles,
    random_orders,
    tile_sides,
)

IMG_SIZE = 16
NUM_IMAGES = 6
seeds = st.integers(0, 2**32)
grids = st.sampled_from([2, 4, 8])


def pictures(seed: int, sign: int = 1) -> torch.Tensor:
    """Images in which no value occurs twice, and none is zero."""
    values = torch.randperm(NUM_IMAGES * 3 * IMG_SIZE**2, generator=torch.Generator().manual_seed(seed)) + 1
    return sign * values.float().view(NUM_IMAGES, 3, IMG_SIZE, IMG_SIZE)


def cells(images: torch.Tensor, grid: int) -> torch.Tensor:
    """`(B, 3, H, W) -> (B, grid*grid, pixels of a cell)`."""
    side = IMG_SIZE // grid
    return images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def orders(grid: int, seed: int, name: str = "mix") -> torch.Tensor:
    return random_orders(np.arange(NUM_IMAGES), grid**2, seed=seed, name=name)


def test_grids_are_the_published_ones_at_224_pixels_and_fit_smaller_images():
    assert default_grids(224) == (7, 14)
    assert {size: default_grids(size) for size in (8, 28, 32, 48, 64, 96)} == {
        8: (4, 8),
        28: (7, 14),
        32: (4, 8),
        48: (6, 12),
        64: (4, 8),
        96: (6, 12),
    }
    # Patch Mixing's figure has 1, 4, 16, 64, 196 tiles at 224 pixels.
    assert [side**2 for side in tile_sides(224, 14)] == [1, 4, 16, 64, 196]
    assert tile_sides(32, 8) == (1, 2, 4, 8)
    assert tile_sides(28, 14) == (1, 2, 4, 14)


@pytest.mark.parametrize("img_size", [6, 31, 49])
def test_a_size_without_two_grids_is_refused(img_size):
    with pytest.raises(ValueError, match=f"img_size {img_size} has no two grids"):
        default_grids(img_size)


def test_counts_are_the_nearest_whole_cells_and_never_twice_the_same():
    assert cell_counts(MIX_SHARES, 16) == (0, 2, 3, 5, 6, 8)
    assert cell_counts(MIX_SHARES, 196) == (0, 20, 39, 59, 78, 98)
    assert cell_counts(DROP_SHARES, 64) == (0, 13, 26, 38, 51)
    assert cell_counts(MIX_SHARES, 4) == (0, 1, 2)


@settings(max_examples=30)
@given(seeds, grids, st.data())
def test_a_mixed_image_has_exactly_so_many_cells_of_its_partner_and_the_rest_of_its_own(seed, grid, data):
    num_replaced = data.draw(st.integers(0, grid**2))
    own, partners, order = pictures(seed), pictures(seed + 1, sign=-1), orders(grid, seed)
    mixed = cells(mix_cells(own, partners, order, num_replaced), grid)
    from_partner = (mixed == cells(partners, grid)).all(dim=2)
    from_own = (mixed == cells(own, grid)).all(dim=2)
    assert (from_partner ^ from_own).all()
    assert (from_partner.sum(dim=1) == num_replaced).all()


@settings(max_examples=30)
@given(seeds, grids, st.data())
def test_a_dropped_cell_is_zero_and_a_kept_one_untouched(seed, grid, data):
    num_dropped = data.draw(st.integers(0, grid**2))
    own = pictures(seed)
    dropped = cells(drop_cells(own, orders(grid, seed), num_dropped), grid)
    is_zero = (dropped == 0).all(dim=2)
    assert (is_zero.sum(dim=1) == num_dropped).all()
    assert torch.equal(dropped[~is_zero], cells(own, grid)[~is_zero])


@settings(max_examples=30)
@given(seeds, grids)
def test_what_is_replaced_at_one_level_is_replaced_at_the_next(seed, grid):
    own, partners, order = pictures(seed), pictures(seed + 1, sign=-1), orders(grid, seed)
    levels = [mix_cells(own, partners, order, count) != own for count in range(grid**2 + 1)]
    assert not levels[0].any()
    assert levels[-1].all()
    for fewer, more in pairwise(levels):
        assert (more | ~fewer).all()
    assert torch.equal(mix_cells(own, partners, order, grid**2), partners)
    assert torch.equal(drop_cells(own, order, 0), own)


@settings(max_examples=30)
@given(seeds, grids)
def test_a_permutation_moves_whole_tiles_to_where_its_order_says(seed, grid):
    own, order = pictures(seed), orders(grid, seed)
    moved, tiles = cells(permute_tiles(own, order), grid), cells(own, grid)
    for image in range(NUM_IMAGES):
        assert torch.equal(moved[image], tiles[image, order[image]])


@settings(max_examples=30)
@given(seeds, grids)
def test_a_permutation_keeps_the_pixels_of_every_channel(seed, grid):
    own = pictures(seed)
    moved = permute_tiles(own, orders(grid, seed))
    assert torch.equal(moved.flatten(2).sort().values, own.flatten(2).sort().values)


def test_one_tile_is_the_image_itself():
    own = pictures(0)
    assert torch.equal(permute_tiles(own, orders(1, 0)), own)


@settings(max_examples=30)
@given(seeds, st.lists(st.integers(0, 10**7), min_size=1, max_size=20), st.integers(0, 20))
def test_an_order_depends_on_the_seed_the_name_and_the_image_alone(seed, ids, split):
    together = random_orders(np.array(ids), 16, seed=seed, name="drop")
    parts = [random_orders(np.array(part, dtype=np.int64), 16, seed=seed, name="drop") for part in (ids[:split], ids[split:])]
    assert torch.equal(together, torch.cat(parts))
    assert (together.sort(dim=1).values == torch.arange(16)).all()


def test_seeds_names_and_images_have_orders_of_their_own():
    first = orders(8, 0)
    assert not (first == orders(8, 1)).all(dim=1).any()
    assert not (first == orders(8, 0, name="drop")).all(dim=1).any()
    assert len({tuple(row.tolist()) for row in first}) == NUM_IMAGES


def test_every_cell_comes_first_equally_often():
    counts = random_orders(np.arange(4000), 16, seed=0, name="mix")[:, 0].bincount(minlength=16)
    # 4000 / 16 = 250 with a standard deviation of 15.3.
    assert ((counts - 250).abs() < 5 * 15.3).all()


@settings(max_examples=50)
@given(seeds, st.lists(st.integers(0, 3), min_size=2, max_size=30), st.data())
def test_a_partner_is_a_test_image_of_another_class_whatever_the_batch(seed, labels, data):
    labels = np.array(labels)
    pool = np.array(data.draw(st.lists(st.integers(0, len(labels) - 1), min_size=1, unique=True)))
    if len(set(labels[pool])) < 2:
        with pytest.raises(ValueError, match="all test images are of one class"):
            other_class_partners(pool, pool, labels, seed=seed)
        return
    partners = other_class_partners(pool, pool, labels, seed=seed)
    assert set(partners) <= set(pool)
    assert (labels[partners] != labels[pool]).all()
    assert [other_class_partners(pool[i : i + 1], pool, labels, seed=seed)[0] for i in range(len(pool))] == partners.tolist()


def test_every_image_of_another_class_is_an_equally_likely_partner():
    labels = np.array([0, 1, 2, 1, 0, 2, 2, 1])
    pool = np.arange(8)
    drawn = [other_class_partners(pool[1:2], pool, labels, seed=seed)[0] for seed in range(2000)]
    counts = np.bincount(drawn, minlength=8)
    assert counts[[1, 3, 7]].tolist() == [0, 0, 0]
    # 2000 / 5 = 400 with a standard deviation of 17.9.
    assert (abs(counts[[0, 2, 4, 5, 6]] - 400) < 5 * 17.9).all()


def test_cells_that_do_not_tile_the_image_are_refused():
    with pytest.raises(ValueError, match="9 cells do not tile an image of 16 x 16 pixels"):
        drop_cells(pictures(0), orders(3, 0), 1)

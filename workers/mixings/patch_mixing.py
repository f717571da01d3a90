"""Hardwiring ViT Patch Selectivity into CNNs using Patch Mixing, https://arxiv.org/abs/2306.17848.

k cells of a grid are replaced by the partner's. The code is not public; the law is ours: half of the batches on each grid of
`default_grids`, k the nearest to r n in 1..n-1, r ~ Beta(1, 1).
"""

from __future__ import annotations

from typing import Self

from space.recipe import Recipe
from workers.corruptions import default_grids
from workers.mixing import GridMixing, cell_sizes
from workers.mixings import mixing


@mixing("patch_mixing")
class PatchMixing(GridMixing):
    """Patch Mixing: cells of a grid are replaced by the partner's."""

    @classmethod
    def of(cls, recipe: Recipe, *, img_size: int, patch_size: int | None) -> Self:
        sizes = cell_sizes(recipe, img_size=img_size, patch_size=1, default=lambda possible: default_grids(img_size))
        return cls(cell_sizes=sizes, prob=recipe.mixing_prob, drawn="partner", rule="round", reference=False)

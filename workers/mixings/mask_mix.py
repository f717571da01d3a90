"""MaskMix of MixPro: Data Augmentation with MaskMix and Progressive Attention Labeling for Vision Transformer,
https://arxiv.org/abs/2304.12043: k cells of a grid are kept, cells being whole multiples of a patch.
"""

from __future__ import annotations

from typing import Self

from space.recipe import Recipe
from workers.mixing import GridMixing, cell_sizes
from workers.mixings import mixing

DEFAULT_GRID = 4
"""Cells per side: 56 px at 224, as in the released configurations."""


@mixing("mask_mix")
class MaskMix(GridMixing):
    """MaskMix: cells of whole patches are kept, the others are the partner's."""

    @classmethod
    def of(cls, recipe: Recipe, *, img_size: int, patch_size: int | None) -> Self:
        sizes = cell_sizes(
            recipe,
            img_size=img_size,
            patch_size=patch_size or 1,
            default=lambda possible: (min(possible, key=lambda grid: (abs(grid - DEFAULT_GRID), grid)),),
        )
        reference = recipe.mixing_reference
        return cls(cell_sizes=sizes, prob=recipe.mixing_prob, drawn="own", rule="ceil" if reference else "uniform", reference=reference)

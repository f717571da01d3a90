"""Patch-token mixing of ViT-ResNAS: Searching for Efficient Multi-Stage Vision Transformers, https://arxiv.org/abs/2109.00642.

Half of the batch gets a box of another image of that half, pasted on the grid of the last stage's tokens; the other half is mixed by
Mixup. Every token then has a label of its own: that of the image it shows, or the mixed one. A second classifier on the tokens learns
them beside the first (`workers.objectives.Classification`); it belongs to the training, not to the network.

The released code never covers the bottom row of the grid, since it draws positions below an exclusive bound:

    released code                                          default
    cells floor(lam g^2), lam ~ U(0, 1)                    uniform in 1..g^2 - 1
    height 1..L - 2, L = min(g, cells); width cells // h   any height that a box of so many cells can have; width to the nearest
    rows and columns 0..g - side - 1                       0..g - side
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from space.recipe import Recipe
from space.registry import SpecError
from workers.mixing import Mixed, Mixer, cell_count, send, unmixed
from workers.mixings import mixing
from workers.mixings.timm_mixup import MIXUP_ALPHA

Box = tuple[int, int, int, int]
"""Top, left, height and width in cells."""


@mixing("patch_tokens")
@dataclass(frozen=True, kw_only=True)
class PatchTokens(Mixer):
    """A box on the grid of the last tokens in one half of the batch, Mixup in the other, and a label for every token."""

    has_token_labels: ClassVar[bool] = True
    grid: int
    prob: float
    reference: bool

    @classmethod
    def of(cls, recipe: Recipe, *, img_size: int, patch_size: int | None) -> Self:
        where = f"mixing 'patch_tokens' at {img_size} px"
        if patch_size is None:
            raise SpecError(f"{where} labels the tokens of the last stage, and the network has no square grid of them")
        grid = img_size // patch_size
        if grid < 2:
            raise SpecError(f"{where}: a token of the last stage is {patch_size} px, which leaves no two cells to mix")
        if recipe.mixing_grids not in ((), (grid,)):
            raise SpecError(f"{where}: mixing_grids is {recipe.mixing_grids}; allowed: {grid}, the tokens per side of the last stage")
        return cls(grid=grid, prob=recipe.mixing_prob, reference=recipe.mixing_reference)

    def mix(self, images: Tensor, seed: int) -> Mixed:
        B, g = len(images), self.grid
        generator = np.random.default_rng(seed)
        if generator.random() >= self.prob:
            return unmixed(images)
        first = B // 2
        top, left, height, width = (released_box if self.reference else draw_box)(g, generator)
        lam = generator.beta(MIXUP_ALPHA, MIXUP_ALPHA)
        partner = torch.from_numpy(np.concatenate([generator.permutation(first), first + generator.permutation(B - first)]))
        token_lam = torch.ones(B, g, g)
        token_lam[:first, top : top + height, left : left + width] = 0
        token_lam[first:] = lam
        token_lam[partner == torch.arange(B)] = 1
        partner, token_lam = (send(drawn, images.device) for drawn in (partner, token_lam))
        size = images.shape[-1] // g
        rows, columns = slice(top * size, (top + height) * size), slice(left * size, (left + width) * size)
        mixed = images.clone()
        mixed[:first, :, rows, columns] = images[partner[:first], :, rows, columns]
        mixed[first:].lerp_(images[partner[first:]], 1 - lam)
        return Mixed(images=mixed, partner=partner, lam=token_lam.mean(dim=(1, 2)), token_lam=token_lam)


def draw_box(grid: int, generator: np.random.Generator) -> Box:
    """A box on a grid of `grid` cells per side; all its places are equally likely, and so are all numbers of cells before rounding."""
    cells = cell_count(generator.random(), grid**2, "uniform")
    height = int(generator.integers(math.ceil(cells / grid), min(grid, cells), endpoint=True))
    width = min(grid - (height == grid), max(1, round(cells / height)))
    top, left = (int(generator.integers(grid - side, endpoint=True)) for side in (height, width))
    return top, left, height, width


def released_box(grid: int, generator: np.random.Generator) -> Box:
    """As the released code draws it; a box of no cells has no width."""
    cells = int(generator.random() * grid**2)
    height = int(generator.integers(1, max(2, min(grid, cells) - 1)))
    width = cells // height
    if width > grid:
        height, width = cells // grid, grid
    top, left = (int(generator.integers(max(1, grid - side))) for side in (height, width))
    return top, left, height, width

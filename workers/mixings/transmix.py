"""TransMix: Attend to Mix for Vision Transformers, https://arxiv.org/abs/2111.09833: CutMix's image, lam = (lam_area + lam_attn) / 2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from space.recipe import Recipe
from workers.mixing import (
    CUTMIX_ALPHA,
    Mixed,
    Mixer,
    attended_share,
    mixed_loss,
    mixed_with_reverse,
    numpy_seeded,
    token_shares,
    unmixed,
)
from workers.mixings import mixing


@mixing("transmix")
@dataclass(frozen=True, kw_only=True)
class TransMix(Mixer):
    """A box of the batch's reverse, pasted as CutMix does; half of the label follows the class token's attention."""

    needs_class_row: ClassVar[bool] = True
    prob: float
    reference: bool

    @classmethod
    def of(cls, recipe: Recipe, *, img_size: int, patch_size: int | None) -> Self:
        return cls(prob=recipe.mixing_prob, reference=recipe.mixing_reference)

    def mix(self, images: Tensor, seed: int) -> Mixed:
        from timm.data.mixup import cutmix_bbox_and_lam

        with numpy_seeded(seed):
            if np.random.rand() >= self.prob:
                return unmixed(images)
            (top, bottom, left, right), lam = cutmix_bbox_and_lam(images.shape, np.random.beta(CUTMIX_ALPHA, CUTMIX_ALPHA))
        own = torch.ones(images.shape[-2:], dtype=torch.bool, device=images.device)
        own[top:bottom, left:right] = False
        mixed, even = images.clone(), len(images) // 2 * 2
        mixed[:even, :, top:bottom, left:right] = images[:even, :, top:bottom, left:right].flip(0)
        return mixed_with_reverse(mixed, float(lam), own.expand(len(images), -1, -1))

    def loss(self, logits: Tensor, labels: Tensor, mixed: Mixed, class_row: Tensor | None, label_smoothing: float) -> Tensor:
        lam = mixed.lam
        if mixed.mask is not None:
            assert class_row is not None, "TransMix reads the class row"
            box = mixed.mask[:1]  # the batch has one
            reduced = nearest_tokens(box, class_row.shape[1]) if self.reference else token_shares(box, 1, box.shape[-1], class_row.shape[1])
            lam = (lam + attended_share(class_row, reduced)) / 2
        return mixed_loss(logits, labels, mixed.partner, lam, label_smoothing)


def nearest_tokens(own: Tensor, num_tokens: int) -> Tensor:
    """`(B, H, H) -> (B, N)` float32: the value at each token's first pixel, as nearest-neighbour interpolation has it."""
    tokens = math.isqrt(num_tokens)
    first = torch.arange(tokens, device=own.device) * own.shape[-1] // tokens
    return own[:, first][:, :, first].flatten(1).float()

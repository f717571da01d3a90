"""Mixup, CutMix, and one or the other at even odds, by timm.

Mixup: https://arxiv.org/abs/1710.09412, alpha 0.8. CutMix: https://arxiv.org/abs/1905.04899, alpha 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from space.recipe import Recipe
from workers.mixing import CUTMIX_ALPHA, Mixed, Mixer, mixed_with_reverse, numpy_seeded, unmixed
from workers.mixings import mixing

MIXUP_ALPHA = 0.8


@dataclass(frozen=True, kw_only=True)
class TimmMixing(Mixer):
    """timm.data.Mixup: one lam for a batch, which is mixed with its reverse. With two alphas, one or the other method at even odds."""

    mixup_alpha: ClassVar[float] = 0.0
    cutmix_alpha: ClassVar[float] = 0.0
    prob: float

    @classmethod
    def of(cls, recipe: Recipe, *, img_size: int, patch_size: int | None) -> Self:
        return cls(prob=recipe.mixing_prob)

    def mix(self, images: Tensor, seed: int) -> Mixed:
        from timm.data.mixup import Mixup

        mixup = Mixup(self.mixup_alpha, self.cutmix_alpha, prob=self.prob, switch_prob=0.5, label_smoothing=0.0, num_classes=2)
        mixed = images.clone()
        with numpy_seeded(seed):
            # It writes to its argument, needs an even length, and tells lam only in the labels: two labels of two classes are enough.
            _, labels = mixup(mixed[: len(images) // 2 * 2], torch.arange(2))
        lam = labels[0, 0].item()
        return unmixed(images) if lam == 1 else mixed_with_reverse(mixed, lam)


@mixing("mixup")
class Mixup(TimmMixing):
    """Mixup: the weighted mean of two images."""

    mixup_alpha = MIXUP_ALPHA


@mixing("cutmix")
class CutMix(TimmMixing):
    """CutMix: a box of one image pasted into another."""

    cutmix_alpha = CUTMIX_ALPHA


@mixing("mixup_cutmix")
class MixupOrCutMix(TimmMixing):
    """Mixup or CutMix, drawn anew for each batch."""

    mixup_alpha = MIXUP_ALPHA
    cutmix_alpha = CUTMIX_ALPHA

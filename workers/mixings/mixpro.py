"""MixPro: Data Augmentation with MaskMix and Progressive Attention Labeling for Vision Transformer, https://arxiv.org/abs/2304.12043.

The images are MaskMix's. Progressive attention labelling moves the label's weight to what the class token attends to as the network
grows confident: lam = alpha lam_attn + (1 - alpha) lam_area. Labels are smoothed as for every other mixing, so that likelihoods
compare; the released code smooths them in alpha alone and trains on hard ones.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from workers.mixing import Mixed, attended_share, mixed_loss, token_shares
from workers.mixings import mixing
from workers.mixings.mask_mix import MaskMix


@mixing("mixpro")
class MixPro(MaskMix):
    """MaskMix with progressive attention labelling."""

    needs_class_row: ClassVar[bool] = True

    def loss(self, logits: Tensor, labels: Tensor, mixed: Mixed, class_row: Tensor | None, label_smoothing: float) -> Tensor:
        if mixed.mask is None:
            return mixed_loss(logits, labels, mixed.partner, mixed.lam, label_smoothing)
        assert class_row is not None, "progressive attention labelling reads the class row"
        shares = token_shares(mixed.mask, mixed.cell_size, mixed.images.shape[-1], class_row.shape[1])
        alpha = confidence(logits, labels, mixed.partner, mixed.lam, label_smoothing)
        lam = mixed.lam.lerp(attended_share(class_row, shares), alpha if self.reference else alpha.detach())
        return mixed_loss(logits, labels, mixed.partner, lam, 0.0 if self.reference else label_smoothing)


def confidence(logits: Tensor, labels: Tensor, partner: Tensor, lam: Tensor, label_smoothing: float) -> Tensor:
    """alpha `(B,)` in [0, 1] of progressive attention labelling: the cosine between the prediction and the smoothed mixed label."""
    K = logits.shape[1]
    own, other = F.one_hot(labels, K), F.one_hot(labels[partner], K)
    target = (1 - label_smoothing) * (lam[:, None] * own + (1 - lam[:, None]) * other) + label_smoothing / K
    return F.cosine_similarity(target, logits.float().softmax(dim=1)).clamp(0, 1)

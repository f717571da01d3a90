"""EViT, "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", https://arxiv.org/abs/2202.07800."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from space.component import AttentionTap, Choice, Cost, Tokens, TokenShape, component
from space.components.selection import keep as kept_tokens
from space.components.selection import take
from space.spec import Component


@component(
    "token_reduction",
    "evit",
    choices={
        "keep": Choice(offered=(0.5, 0.6, 0.7, 0.8, 0.9), allowed=(lambda value: 0 < value <= 1, "above 0 to 1")),
        "fuse": Choice(offered=(True, False), default=True),
    },
    needs_class_token=True,
    attention_tap=AttentionTap.CLASS_ROW,
    takes_sizes=True,
)
class EViT(nn.Module):
    """Keep the patches that the class token attends to most, and fuse the rest to one (section 3).

    Of N patches, `ceil(keep N)` stay, ordered by the class token's attention, mean over the heads. `fuse` appends the sum of the others,
    each times its attention; that sum is not divided by the attention's, and the token is a patch like any other from then on. The paper
    reduces in blocks 3, 6 and 9 of 12, counted from 0. Prefix tokens stay; the released code would drop a distillation token.
    """

    def __init__(self, shape: TokenShape, *, keep: float, fuse: bool):
        super().__init__()
        self.num_prefix, self.num_patches = shape.num_prefix, shape.num_patches
        self.num_kept = num_kept(shape, keep)
        self.fuse = fuse

    @staticmethod
    def places(depth: int) -> Sequence[int]:
        """3, 6 and 9 of 12."""
        return sorted({depth * quarters // 4 for quarters in (1, 2, 3)})

    @staticmethod
    def canonical(*, keep: float, fuse: bool) -> Component | None:
        return None if keep == 1 else Component("evit", keep=keep, fuse=fuse)

    @staticmethod
    def output_shape(shape: TokenShape, *, keep: float, fuse: bool) -> TokenShape:
        kept = num_kept(shape, keep)
        return shape if kept == shape.num_patches else shape._replace(num_patches=kept + fuse, grid=None)

    @staticmethod
    def cost(shape: TokenShape, *, keep: float, fuse: bool) -> Cost:
        return Cost()

    def forward(self, tokens: Tokens, class_row: Tensor) -> Tokens:
        """`class_row` `(B, H, N)`."""
        attention = class_row.mean(dim=1)[:, self.num_prefix :]
        order = attention.argsort(dim=1, descending=True, stable=True)
        first, rest = order.split([self.num_kept, self.num_patches - self.num_kept], dim=1)
        kept = kept_tokens(tokens, self.num_prefix, first)
        if not self.fuse:
            return kept
        others = take(tokens.x[:, self.num_prefix :], rest) * attention.gather(1, rest).unsqueeze(-1)
        x = torch.cat([kept.x, others.sum(dim=1, keepdim=True)], dim=1)
        if tokens.sizes is None or kept.sizes is None:
            return kept._replace(x=x)
        size = tokens.sizes[:, self.num_prefix :].gather(1, rest).sum(dim=1, keepdim=True)
        return kept._replace(x=x, sizes=torch.cat([kept.sizes, size], dim=1))


def num_kept(shape: TokenShape, keep: float) -> int:
    """`ceil(keep N)` of N patches; a product that is whole but for its rounding is whole."""
    return math.ceil(round(keep * shape.num_patches, 6))

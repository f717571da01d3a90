"""DiffRate, "Differentiable Compression Rate for Efficient Vision Transformers", https://arxiv.org/abs/2305.17997: a given schedule."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from space.component import POSITIVE, AttentionTap, Choice, Cost, Tokens, TokenShape, component
from space.components.selection import cosine, keep, sizes_of, sum_into
from space.registry import SpecError


@component(
    "token_reduction",
    "diffrate",
    choices={"prune_to": Choice(offered=(64, 56, 48), allowed=POSITIVE), "merge_to": Choice(offered=(48, 32, 16), allowed=POSITIVE)},
    needs_class_token=True,
    attention_tap=AttentionTap.CLASS_ROW,
    takes_sizes=True,
)
class DiffRate(nn.Module):
    """Prune to `prune_to` tokens, then merge to `merge_to`, the prefix counted (sections 3.1 and 3.2).

    Tokens are ordered by the class token's attention, mean over the heads. The last ones are pruned. The last of the others are merged,
    each into the most similar token that stays, by the cosine; a merged token is the mean of its parts, and its size gains the size of each
    part times that cosine, and is at least 1. Prefix tokens stay as they are. A count above the number of tokens changes nothing.
    The counts of a network are a schedule, which the paper learns by gradients; here it is given.
    """

    def __init__(self, shape: TokenShape, *, prune_to: int, merge_to: int):
        super().__init__()
        self.num_prefix = shape.num_prefix
        self.pruned, self.merged = _counts(shape, prune_to, merge_to)

    @staticmethod
    def output_shape(shape: TokenShape, *, prune_to: int, merge_to: int) -> TokenShape:
        pruned, merged = _counts(shape, prune_to, merge_to)
        if merge_to > prune_to:
            raise SpecError(f"merge_to is {merge_to}; at most prune_to, {prune_to}, is expected")
        if merged <= shape.num_prefix:
            raise SpecError(f"merge_to is {merge_to}; a patch must stay beside the {shape.num_prefix} prefix tokens")
        if merged == shape.num_tokens:
            return shape
        return shape._replace(num_patches=merged - shape.num_prefix, grid=None, has_sizes=shape.has_sizes or merged < pruned)

    @staticmethod
    def cost(shape: TokenShape, *, prune_to: int, merge_to: int) -> Cost:
        pruned, merged = _counts(shape, prune_to, merge_to)
        return Cost(fvcore_macs=(pruned - merged) * (merged - shape.num_prefix) * shape.dim)

    def forward(self, tokens: Tokens, class_row: Tensor) -> Tokens:
        """`class_row` `(B, H, N)`."""
        P, pruned, merged = self.num_prefix, self.pruned, self.merged
        order = class_row.mean(dim=1)[:, P:].argsort(dim=1, descending=True, stable=True)
        tokens = keep(tokens, P, order[:, : pruned - P])
        if merged == pruned:
            return tokens
        x, sizes = tokens.x, sizes_of(tokens)
        similarity, nearest = cosine(x[:, merged:], x[:, P:merged]).detach().max(dim=2)
        stay = torch.arange(merged, device=x.device).expand(len(x), -1)
        into = torch.cat([stay, P + nearest], dim=1)
        num_parts = sum_into(torch.ones_like(sizes).unsqueeze(2), into, merged)
        gained = torch.cat([sizes[:, :merged], sizes[:, merged:] * similarity], dim=1)
        sizes = sum_into(gained.unsqueeze(2), into, merged).squeeze(2).clamp(min=1)
        return tokens._replace(x=sum_into(x, into, merged) / num_parts, sizes=sizes)


def _counts(shape: TokenShape, prune_to: int, merge_to: int) -> tuple[int, int]:
    """Tokens after pruning and after merging."""
    pruned = min(prune_to, shape.num_tokens)
    return pruned, min(merge_to, pruned)

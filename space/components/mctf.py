"""MCTF, "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers", https://arxiv.org/abs/2403.10030."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from space.component import POSITIVE, AttentionTap, BlockForm, Choice, Cost, Tokens, TokenShape, component
from space.components.selection import cosine, sizes_of, sum_into, take
from space.registry import SpecError
from space.spec import Component

if TYPE_CHECKING:
    from space.layout import Part

LEAST_TOKENS = 10


def merge_first(block: Any, tokens: Tokens) -> Tokens:
    """One step ahead: tokens are merged by the map of this block, and the merged map takes its values from the merged tokens."""
    merged = tokens

    def between(weights: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal merged
        merged, weights = block.token_reduction(tokens, weights)
        return weights, block.norm1(merged.x)

    mixed = block.mixer(block.norm1(tokens.x), sizes=tokens.sizes, between=between)
    return merged._replace(x=block.add_fed_forward(block.add_mixed(merged.x, mixed)))


def counted(parts: Mapping[str, Part]) -> dict[str, Cost]:
    """The first norm acts before and after merging; the mixer attends to the tokens before by the map, and to those after by values."""
    norm, mixer = parts["norm1"], parts["mixer"]
    before, after = norm.shape, mixer.shape
    if not hasattr(mixer.module_class, "merged_cost"):
        raise SpecError(f"token_reduction: 'mctf' merges between a mixer's map and its values, which {mixer.component.name!r} cannot")
    again = norm.module_class.cost(after, **norm.arguments)._replace(params=0)
    return {
        "norm1": norm.module_class.cost(before, **norm.arguments) + again,
        "mixer": mixer.module_class.merged_cost(before, after, **mixer.arguments),
    }


@component(
    "token_reduction",
    "mctf",
    choices={
        "r": Choice(offered=(4, 8, 16), allowed=(lambda value: value >= 0, "0 or above")),
        "tau_sim": Choice(offered=(1.0,), default=1.0, allowed=POSITIVE),
        "tau_info": Choice(offered=(20.0,), default=20.0, allowed=POSITIVE),
        "tau_size": Choice(offered=(40.0,), default=40.0, allowed=POSITIVE),
        "bidirectional": Choice(offered=(True, False), default=True),
    },
    attention_tap=AttentionTap.FULL_MAP,
    takes_sizes=True,
    block_form=BlockForm(
        ("norm1", "token_reduction", "mixer", "layer_scale1", "norm2", "feed_forward", "layer_scale2"), merge_first, counted
    ),
)
class MCTF(nn.Module):
    """Merge `r` patches into others that are similar, uninformative and small, before the block attends (sections 3.1 to 3.3).

    Two patches of even and odd place attract each other by `((cos + 1) / 2)^(1/tau_sim) (a_i a_j)^(1/tau_info) (s_i s_j)^(1/tau_size)`,
    where a is 1 over the attention that a patch receives, mean over heads and queries, and s is 1 over its size, each divided by its
    maximum. The `r` patches of even place with the strongest partner are merged into it; `bidirectional` takes half of them, and then as
    many of odd place into what is left of the even ones. A merged token is the mean of its parts, each weighted by its received attention
    times its size, and so are the rows of the map; its columns are added up, and so are the sizes. Prefix tokens stay as they are. No more
    than half of the patches are merged, and never below 10 tokens. The paper reduces in every block but the first.
    """

    def __init__(self, shape: TokenShape, *, r: int, tau_sim: float, tau_info: float, tau_size: float, bidirectional: bool):
        super().__init__()
        self.num_prefix, self.num_tokens = shape.num_prefix, shape.num_tokens
        self.num_merged = _num_merged(shape, r)
        self.num_backward = self.num_merged - self.num_merged // 2 if bidirectional else 0
        self.tau_sim, self.tau_info, self.tau_size = tau_sim, tau_info, tau_size

    @staticmethod
    def places(depth: int) -> Sequence[int]:
        return range(1, depth)

    @staticmethod
    def canonical(*, r: int, tau_sim: float, tau_info: float, tau_size: float, bidirectional: bool) -> Component | None:
        chosen = {"tau_sim": tau_sim, "tau_info": tau_info, "tau_size": tau_size, "bidirectional": bidirectional}
        return Component("mctf", r=r, **chosen) if r else None

    @staticmethod
    def output_shape(shape: TokenShape, *, r: int, tau_sim: float, tau_info: float, tau_size: float, bidirectional: bool) -> TokenShape:
        num_merged = _num_merged(shape, r)
        return shape._replace(num_patches=shape.num_patches - num_merged, grid=None, has_sizes=True) if num_merged else shape

    @staticmethod
    def cost(shape: TokenShape, *, r: int, tau_sim: float, tau_info: float, tau_size: float, bidirectional: bool) -> Cost:
        even, odd = (len(range(shape.num_tokens)[side]) for side in _sides(shape.num_prefix))
        return Cost(fvcore_macs=even * odd * shape.dim)

    def forward(self, tokens: Tokens, weights: Tensor) -> tuple[Tokens, Tensor]:
        """The merged tokens, and the map `(B, H, N, N)` merged to `(B, H, M, M)`."""
        x, sizes, num_left = tokens.x, sizes_of(tokens), self.num_tokens - self.num_merged
        received = weights.mean(dim=(1, 2))
        into = self._into(x.detach(), received.detach(), sizes)
        share = (received * sizes).detach()
        # A part's share in the token that it becomes part of.
        share = share / sum_into(share.unsqueeze(2), into, num_left).squeeze(2).gather(1, into)
        merged = sum_into(x * share.unsqueeze(2), into, num_left)
        H = weights.shape[1]
        into_heads = into.repeat_interleave(H, dim=0)
        keys_merged = sum_into(weights.flatten(0, 1).transpose(1, 2), into_heads, num_left).transpose(1, 2)
        rows = keys_merged * share.repeat_interleave(H, dim=0).unsqueeze(2)
        weights = sum_into(rows, into_heads, num_left).unflatten(0, (-1, H))
        return tokens._replace(x=merged, sizes=sum_into(sizes.unsqueeze(2), into, num_left).squeeze(2)), weights

    def _into(self, x: Tensor, received: Tensor, sizes: Tensor) -> Tensor:
        """For each token the place, after merging, of the token that it becomes part of, `(B, N)`."""
        uninformative, small = 1 / received, 1 / sizes
        uninformative = uninformative / uninformative.amax(dim=1, keepdim=True)
        small = small / small.amax(dim=1, keepdim=True)
        places = torch.arange(self.num_tokens, device=x.device)
        (even, odd) = (places[side] for side in _sides(self.num_prefix))
        attraction = ((cosine(x[:, even], x[:, odd]) + 1) / 2).clamp(min=0) ** (1 / self.tau_sim)
        for value, tau in ((uninformative, self.tau_info), (small, self.tau_size)):
            attraction = attraction * (value[:, even].unsqueeze(2) * value[:, odd].unsqueeze(1)) ** (1 / tau)
        B = len(x)
        # `goes[b, n]` is the token that n is merged into, or n itself.
        goes = places.expand(B, -1)
        strongest, partner = attraction.max(dim=2)
        order = strongest.argsort(dim=1, descending=True, stable=True)
        num_forward = self.num_merged - self.num_backward
        away, left = order[:, :num_forward], order[:, num_forward:].sort(dim=1).values
        goes = goes.scatter(1, even[away], odd[partner.gather(1, away)])
        if self.num_backward:
            strongest, partner = take(attraction, left).max(dim=1)
            away = strongest.argsort(dim=1, descending=True, stable=True)[:, : self.num_backward]
            goes = goes.scatter(1, odd[away], even[left.gather(1, partner.gather(1, away))])
        # A token that was merged forward may sit in one that is merged backward.
        goes = goes.gather(1, goes)
        stays = goes == places
        return (stays.cumsum(dim=1) - 1).gather(1, goes)


def _num_merged(shape: TokenShape, r: int) -> int:
    return max(0, min(r, shape.num_tokens - LEAST_TOKENS, shape.num_patches // 2))


def _sides(num_prefix: int) -> tuple[slice, slice]:
    """Patches of even and of odd place among all tokens."""
    return slice(num_prefix + num_prefix % 2, None, 2), slice(num_prefix + 1 - num_prefix % 2, None, 2)

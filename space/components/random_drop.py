"""Patches dropped at random: what every way of choosing patches must beat."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from space.component import POSITIVE, Choice, Cost, Tokens, TokenShape, component
from space.components.selection import keep as kept_tokens
from space.registry import SpecError


@component(
    "token_reduction",
    "random_drop",
    choices={
        "num_kept": Choice(offered=(16, 32, 48), allowed=POSITIVE),
        "seed": Choice(offered=(0, 1, 2), default=0, allowed=(lambda value: value >= 0, "0 or above")),
    },
    takes_sizes=True,
)
class RandomDrop(nn.Module):
    """Keep `num_kept` patches, drawn at random by `seed`: the same places in every image, in their order.

    Networks of several seeds show what the draw does; within one network evaluation stays deterministic.
    """

    index: Tensor

    def __init__(self, shape: TokenShape, *, num_kept: int, seed: int):
        super().__init__()
        self.num_prefix = shape.num_prefix
        drawn = torch.randperm(shape.num_patches, generator=torch.Generator().manual_seed(seed))[:num_kept]
        # Not persistent: the seed determines it, and the weights of the plain network then load.
        self.register_buffer("index", drawn.sort().values, persistent=False)

    @staticmethod
    def output_shape(shape: TokenShape, *, num_kept: int, seed: int) -> TokenShape:
        if num_kept > shape.num_patches:
            raise SpecError(f"num_kept is {num_kept}; there are {shape.num_patches} patches")
        return shape if num_kept == shape.num_patches else shape._replace(num_patches=num_kept, grid=None)

    @staticmethod
    def cost(shape: TokenShape, *, num_kept: int, seed: int) -> Cost:
        return Cost()

    def forward(self, tokens: Tokens) -> Tokens:
        return kept_tokens(tokens, self.num_prefix, self.index.expand(len(tokens.x), -1))

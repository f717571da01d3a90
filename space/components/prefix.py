"""Prefix tokens: learned tokens put before the patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from space.component import Choice, Cost, TokenShape, component

TOKEN_STD = 1e-6
"""timm's standard deviation of fresh class and register tokens."""


@component(
    "prefix",
    "class_token",
    choices={"num_registers": Choice(offered=(0, 1, 2, 4, 8, 16), default=0, allowed=(lambda value: value >= 0, "0 or above"))},
)
class ClassToken(nn.Module):
    """A class token and registers before the patches: `(B, N, C) -> (B, 1 + num_registers + N, C)`.

    The class token comes first, then the registers (https://arxiv.org/abs/2309.16588), as in timm.
    """

    def __init__(self, shape: TokenShape, *, num_registers: int):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, shape.dim))
        self.registers = nn.Parameter(torch.zeros(1, num_registers, shape.dim)) if num_registers else None

    @staticmethod
    def output_shape(shape: TokenShape, *, num_registers: int) -> TokenShape:
        return shape._replace(num_prefix=1 + num_registers, has_class_token=True)

    @staticmethod
    def cost(shape: TokenShape, *, num_registers: int) -> Cost:
        return Cost(params=(1 + num_registers) * shape.dim)

    def init_weights(self, generator: torch.Generator | None) -> None:
        for token in self.parameters():
            nn.init.normal_(token, std=TOKEN_STD, generator=generator)

    def no_weight_decay(self) -> set[str]:
        return {"class_token", "registers"}

    def forward(self, x: Tensor) -> Tensor:
        B = x.shape[0]
        return torch.cat([*(token.expand(B, -1, -1) for token in self.parameters()), x], dim=1)

"""Pooling of the normalised tokens of the last stage to one vector: `(B, N, C) -> (B, C)`.

All but `class_token` pool the patches and leave prefix tokens out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from space.component import POSITIVE, Choice, Cost, TokenShape, component
from space.registry import SpecError
from space.spec import Component

GEM_EPS = 1e-6


def _pooled(shape: TokenShape) -> TokenShape:
    return TokenShape(shape.dim, 1)


class _Pooling(nn.Module):
    """A pooling without parameters."""

    def __init__(self, shape: TokenShape):
        super().__init__()
        self.num_prefix = shape.num_prefix

    @staticmethod
    def output_shape(shape: TokenShape) -> TokenShape:
        return _pooled(shape)

    @staticmethod
    def cost(shape: TokenShape) -> Cost:
        return Cost()


@component("pooling", "class_token", needs_class_token=True)
class ClassTokenPooling(_Pooling):
    """The class token."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


@component("pooling", "mean")
class MeanPooling(_Pooling):
    """The mean of the patches."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.num_prefix :].mean(dim=1)


@component("pooling", "max")
class MaxPooling(_Pooling):
    """The largest value of each channel over the patches."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.num_prefix :].amax(dim=1)


class _PowerMeanPooling(nn.Module):
    """`z_c = (mean_n max(x_nc, eps)^p)^(1/p)`, with one learned exponent `p` for each of `groups` slices of the channels."""

    def __init__(self, shape: TokenShape, *, p: float, groups: int):
        super().__init__()
        self.num_prefix = shape.num_prefix
        self.start = p
        self.p = nn.Parameter(torch.full((groups,), p))

    def init_weights(self, generator: torch.Generator | None) -> None:
        nn.init.constant_(self.p, self.start)

    def forward(self, x: Tensor) -> Tensor:
        C = x.shape[-1]
        return power_mean(x[:, self.num_prefix :], self.p.repeat_interleave(C // len(self.p)))


@component("pooling", "gem", choices={"p": Choice(offered=(1.0, 3.0), default=3.0, allowed=POSITIVE)})
class GeMPooling(_PowerMeanPooling):
    """Generalized mean of the patches with one learned exponent (https://arxiv.org/abs/1711.02512); `p` is its start.

    Values below 1e-6 are clamped, so p = 1 is the mean of the positive parts and not `mean`.
    """

    def __init__(self, shape: TokenShape, *, p: float):
        super().__init__(shape, p=p, groups=1)

    @staticmethod
    def output_shape(shape: TokenShape, *, p: float) -> TokenShape:
        return _pooled(shape)

    @staticmethod
    def cost(shape: TokenShape, *, p: float) -> Cost:
        return Cost(params=1)


@component(
    "pooling",
    "ggem",
    choices={
        "groups": Choice(offered=(1, 2, 3, 4, 6, 8, 12, 16), allowed=POSITIVE),
        "p": Choice(offered=(1.0, 3.0), default=3.0, allowed=POSITIVE),
    },
)
class GroupGeMPooling(_PowerMeanPooling):
    """Group Generalized Mean Pooling for Vision Transformer (https://arxiv.org/abs/2212.04114).

    Groups are slices of consecutive channels, each with its own learned exponent that starts at `p`.
    """

    @staticmethod
    def canonical(*, groups: int, p: float) -> Component:
        return Component("gem", p=p) if groups == 1 else Component("ggem", groups=groups, p=p)

    @staticmethod
    def output_shape(shape: TokenShape, *, groups: int, p: float) -> TokenShape:
        if shape.dim % groups:
            raise SpecError(f"{groups} groups do not divide the width {shape.dim}")
        return _pooled(shape)

    @staticmethod
    def cost(shape: TokenShape, *, groups: int, p: float) -> Cost:
        return Cost(params=groups)


def power_mean(x: Tensor, p: Tensor) -> Tensor:
    """`(mean_n max(x, eps)^p)^(1/p)` per channel, `(B, N, C), (C,) -> (B, C)`.

    As log-sum-exp in at least float32: eps^p underflows for p above 7.5, and in half precision far sooner.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        p = p.to(wide)
        logs = p * x.to(wide).clamp(min=GEM_EPS).log()
        return ((logs.logsumexp(dim=1) - math.log(x.shape[1])) / p).exp().to(x.dtype)

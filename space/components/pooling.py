"""Pooling of the normalised tokens of the last stage to one vector: `(B, N, C) -> (B, C)`.

All but `class_token` pool the patches and leave prefix tokens out. With `sizes` `(B, N)` a patch of size s counts as s equal patches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from space.component import POSITIVE, Choice, Cost, TokenShape, component
from space.registry import SpecError
from space.spec import Component

GEM_EPS = 1e-6
MIN_EXPONENT = 0.01
EXPONENT = {
    "p": Choice(offered=(1.0, 3.0), default=3.0, allowed=(lambda value: MIN_EXPONENT < value < math.inf, f"above {MIN_EXPONENT}")),
    "learned": Choice(offered=(True, False), default=True),
}


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

    def _patches(self, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The patches `(B, N, C)` and their sizes `(B, N)`, without prefix tokens."""
        return x[:, self.num_prefix :], None if sizes is None else sizes[:, self.num_prefix :]


@component("pooling", "class_token", needs_class_token=True, takes_sizes=True)
class ClassTokenPooling(_Pooling):
    """The class token."""

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        return x[:, 0]


@component("pooling", "mean", takes_sizes=True)
class MeanPooling(_Pooling):
    """The mean of the patches."""

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        return weighted_mean(*self._patches(x, sizes))


@component("pooling", "max", takes_sizes=True)
class MaxPooling(_Pooling):
    """The largest value of each channel over the patches."""

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        return x[:, self.num_prefix :].amax(dim=1)


@component("pooling", "relu_mean", takes_sizes=True)
class ReluMeanPooling(_Pooling):
    """The mean over the patches of the positive parts: GeM's clamp without its exponent."""

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        patches, sizes = self._patches(x, sizes)
        return weighted_mean(patches.clamp(min=0), sizes)


class _PowerMeanPooling(nn.Module):
    """`z_c = (mean_n max(x_nc, eps)^p)^(1/p)`, with one exponent `p` for each of `groups` slices of the channels.

    The exponent is a parameter if it is `learned`, and else a buffer that the state dict leaves out. An optimizer may step over zero,
    where there is no power mean: the forward pass takes no exponent below `MIN_EXPONENT`, and lets the gradient through as if it
    did, so that an exponent can come back.
    """

    p: Tensor

    def __init__(self, shape: TokenShape, *, p: float, groups: int, learned: bool):
        super().__init__()
        self.num_prefix = shape.num_prefix
        self.start = p
        exponents = torch.full((groups,), p)
        if learned:
            self.p = nn.Parameter(exponents)
        else:
            self.register_buffer("p", exponents, persistent=False)

    def init_weights(self, generator: torch.Generator | None) -> None:
        nn.init.constant_(self.p, self.start)

    def exponent_parameters(self) -> set[str]:
        return {"p"} if isinstance(self.p, nn.Parameter) else set()

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        C = x.shape[-1]
        p = self.p.detach().clamp(min=MIN_EXPONENT) + (self.p - self.p.detach())
        sizes = None if sizes is None else sizes[:, self.num_prefix :]
        return power_mean(x[:, self.num_prefix :], p.repeat_interleave(C // len(p)), sizes)


@component("pooling", "gem", choices=EXPONENT, takes_sizes=True)
class GeMPooling(_PowerMeanPooling):
    """Generalized mean of the patches with one exponent (https://arxiv.org/abs/1711.02512), which starts at `p`.

    Values below 1e-6 are clamped, so p = 1 is the mean of the positive parts and not `mean`.
    """

    def __init__(self, shape: TokenShape, *, p: float, learned: bool):
        super().__init__(shape, p=p, groups=1, learned=learned)

    @staticmethod
    def output_shape(shape: TokenShape, *, p: float, learned: bool) -> TokenShape:
        return _pooled(shape)

    @staticmethod
    def cost(shape: TokenShape, *, p: float, learned: bool) -> Cost:
        return Cost(params=int(learned))


@component("pooling", "ggem", choices={"groups": Choice(offered=(1, 2, 3, 4, 6, 8, 12, 16), allowed=POSITIVE)} | EXPONENT, takes_sizes=True)
class GroupGeMPooling(_PowerMeanPooling):
    """Group Generalized Mean Pooling for Vision Transformer (https://arxiv.org/abs/2212.04114).

    Groups are slices of consecutive channels, each with its own exponent that starts at `p`; where none is learned, they are all
    the same, and it is `gem`.
    """

    @staticmethod
    def canonical(*, groups: int, p: float, learned: bool) -> Component:
        if groups == 1 or not learned:
            return Component("gem", p=p, learned=learned)
        return Component("ggem", groups=groups, p=p, learned=learned)

    @staticmethod
    def output_shape(shape: TokenShape, *, groups: int, p: float, learned: bool) -> TokenShape:
        if shape.dim % groups:
            raise SpecError(f"{groups} groups do not divide the width {shape.dim}")
        return _pooled(shape)

    @staticmethod
    def cost(shape: TokenShape, *, groups: int, p: float, learned: bool) -> Cost:
        return Cost(params=groups * learned)


def weighted_mean(x: Tensor, sizes: Tensor | None) -> Tensor:
    """The mean of tokens of these sizes, `sum_n s_n x_n / sum_n s_n`: `(B, N, C), (B, N) -> (B, C)`; None is 1 for all."""
    if sizes is None:
        return x.mean(dim=1)
    shares = sizes / sizes.sum(dim=1, keepdim=True)
    return (x * shares.unsqueeze(2).to(x.dtype)).sum(dim=1)


def power_mean(x: Tensor, p: Tensor, sizes: Tensor | None = None) -> Tensor:
    """`(mean_n max(x_n, eps)^p)^(1/p)` per channel, `(B, N, C), (C,), (B, N) -> (B, C)`; every p is above 0, tokens count by their sizes.

    As `m (mean_n (max(x_n, eps) / m)^p)^(1/p)` with m the largest, in at least float32: eps^p alone underflows for p above 7.5, and
    in half precision far sooner.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        p = p.to(wide)
        clamped = x.to(wide).clamp(min=GEM_EPS)
        # It cancels out, so it needs no gradient.
        largest = clamped.detach().amax(dim=1, keepdim=True)
        mean = weighted_mean((clamped / largest).pow(p), sizes)
        return (largest.squeeze(1) * mean.pow(1 / p)).to(x.dtype)

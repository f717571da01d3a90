"""The contract of a component: what it declares, what it is built from, what it costs.

A component is an `nn.Module` class in `space/components/`, registered by kind and name:

    @component("mixer", "window_attention", choices={"num_heads": Choice(offered=(2, 4)), ...}, needs_grid=True)
    class WindowAttention(nn.Module):
        def __init__(self, shape: TokenShape, *, num_heads: int, ...): ...
        @staticmethod
        def cost(shape: TokenShape, *, num_heads: int, ...) -> Cost: ...
        def forward(self, x: Tensor) -> Tensor: ...

`shape` is what comes in (`ImageShape` for a patch embedding, `TokenShape` for everything else). The kinds that set a
width - patch_embed, downsampling, head - get it as the keyword `out_dim` beside their choices. Optional static
methods, with these signatures:

    output_shape(shape, **choices) -> TokenShape     what goes out, if not what came in; raises SpecError if illegal
    canonical(**choices) -> Component                an equal component in simpler terms (no effect: normalised away)
    tap_cost(shape, tap, **choices) -> Cost          of a mixer that offers a tap: what `tap` adds to `cost`
    linear_maps(shape, **choices) -> LinearMaps      of a mixer or a feed-forward: its weight matrices, for scores in closed form

and optional methods of the module, which name parameters of its own:

    no_weight_decay() -> set[str]                    no weight decay, as in timm (parameters of one dimension get none anyway)
    exponent_parameters() -> set[str]                exponents, which learn at a rate of their own

A pooling goes out as `TokenShape(dim, 1)`, which stands for `(B, dim)`, and a head as `TokenShape(num_classes, 1)`. A
component with parameters outside of Linear, Conv2d and norm modules draws them in `init_weights(generator)`.

Choices equal to their default are left out of a spec's JSON, so a default is part of a name's meaning: it never changes,
and a component can gain a choice without changing the digest of what was measured before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

from space.registry import Registry, SpecError

Scalar = bool | int | float | str
LinearMaps = tuple[tuple[int, int, int], ...]
"""Weight matrices as (inputs, outputs, how many of them); a projection to several heads counts head by head."""
REQUIRED: Any = object()

KINDS = ("patch_embed", "prefix", "position", "norm", "mixer", "feed_forward", "token_reduction", "downsampling", "pooling", "head")
"""In the order of the forward pass; `SETS_WIDTH` names those that are told their output width."""

SETS_WIDTH = frozenset({"patch_embed", "downsampling", "head"})


class ImageShape(NamedTuple):
    """A batch of images `(B, in_chans, height, width)` without its B; sizes in pixels."""

    in_chans: int
    height: int
    width: int


class TokenShape(NamedTuple):
    """A batch of tokens `(B, num_prefix + num_patches, dim)` without its B.

    Prefix tokens come first; the class token, where there is one, is token 0. `grid` is `(height, width)` when the
    patches still fill a grid in row-major order, None after a step that breaks it up.
    """

    dim: int
    num_patches: int
    grid: tuple[int, int] | None = None
    num_prefix: int = 0
    has_class_token: bool = False

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.num_patches


class Cost(NamedTuple):
    """Exact counts for one image: parameters, multiply-adds, and what fvcore counts on the built net.

    `macs` holds convolutions, linear layers and both attention products; `fvcore_macs` adds what fvcore counts of
    norms (LayerNorm: 5 per element) and omits what it is blind to.
    """

    params: int = 0
    macs: int = 0
    fvcore_macs: int = 0

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.params + other.params, self.macs + other.macs, self.fvcore_macs + other.fvcore_macs)

    @classmethod
    def linear(cls, num_rows: int, in_features: int, out_features: int, bias: bool = True) -> Cost:
        """A linear layer applied to `num_rows` vectors (a convolution: one row per output position)."""
        macs = num_rows * in_features * out_features
        return cls(in_features * out_features + bias * out_features, macs, macs)

    @classmethod
    def layer_norm(cls, num_rows: int, dim: int) -> Cost:
        return cls(params=2 * dim, fvcore_macs=5 * num_rows * dim)


class AttentionTap(IntEnum):
    """How much of the attention map a component must see; more forces slower kernels."""

    NONE = 0
    CLASS_ROW = 1
    COLUMN_SUMS = 2
    FULL_MAP = 3


@dataclass(frozen=True)
class Choice:
    """One value a component is built with: `offered` is what a search may pick, and sets the type.

    `allowed` is what a spec may hold beyond that: a predicate and the words that describe it in an error.
    """

    offered: tuple[Scalar, ...]
    default: Scalar = REQUIRED
    allowed: tuple[Callable[[Any], bool], str] | None = None

    def check(self, value: Scalar, where: str) -> Scalar:
        """The value in this choice's type; raises SpecError naming what is allowed."""
        kind = type(self.offered[0])
        if kind is float and type(value) is int:
            value = float(value)
        legal, meaning = self.allowed or (self.offered.__contains__, f"one of {', '.join(map(str, self.offered))}")
        if type(value) is not kind or not legal(value):
            raise SpecError(f"{where} is {value!r}; allowed: {kind.__name__}, {meaning}")
        return value


POSITIVE: tuple[Callable[[Any], bool], str] = (lambda value: 0 < value < math.inf, "above 0")


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What others must know of a component, as data."""

    kind: str
    name: str
    choices: Mapping[str, Choice] = field(default_factory=dict)
    needs_grid: bool = False
    needs_class_token: bool = False
    attention_tap: AttentionTap = AttentionTap.NONE
    """The level of tap this component reads from its block's mixer."""
    offers_tap: AttentionTap = AttentionTap.NONE
    """The highest level a mixer can give: `forward(x, tap=level)` then returns `(x, tapped)`."""


components: Registry[type] = Registry("component", package="space.components")
C = TypeVar("C", bound=type)


def component(kind: str, name: str, **declared: Any) -> Callable[[C], C]:
    """Register an `nn.Module` class as the component `name` of `kind`; keywords are the fields of `Declaration`."""
    if kind not in KINDS:
        raise RuntimeError(f"unknown kind {kind!r} for component {name!r}; kinds: {', '.join(KINDS)}")

    def register(cls: C) -> C:
        cls.declaration = Declaration(kind=kind, name=name, **declared)  # type: ignore[attr-defined]
        components.add((kind, name), cls)
        return cls

    return register


def declaration(kind: str, name: str, where: str = "") -> Declaration:
    """The declaration of a registered component; raises SpecError with the nearest names."""
    return components.get(kind, name, where=where).declaration  # type: ignore[attr-defined]

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
    canonical(**choices) -> Component | None         an equal component in simpler terms; None if it has no effect at all
    tap_cost(shape, tap, **choices) -> Cost          of a mixer that offers a tap: what `tap` adds to `cost`
    folds(shape, **choices) -> dict[str, Folds]      by name, its tensors with a dimension folded from several sizes
    places(depth) -> Sequence[int]                   of a token reduction: the blocks where its paper has it; without it, all
    merged_cost(shape, merged, **choices) -> Cost    of a mixer that takes `between`: its whole cost if it then attends in `merged`
    linear_maps(shape, **choices) -> LinearMaps      of a mixer or a feed-forward: its weight matrices, for scores in closed form

A token reduction may merge tokens, so that one stands for several. Those that declare `takes_sizes` are given and give back
`Tokens`, which hold the sizes; mixers and poolings that declare it take `sizes=(B, N)` and treat a token of size s as s equal
tokens. Where sizes are handed on, a mixer, reduction, downsampling or pooling without that declaration is refused. A reduction that
needs to remember something from block to block has the method `remember(x)`: it is given the tokens that enter its first block, what
it gives becomes `Tokens.memory`, and `output_shape` sets `memory` to the name of the reduction. A reduction that puts out the shape
that it is given has no effect there: it is not built.

Optional methods of the module name parameters of its own:

    no_weight_decay() -> set[str]                    no weight decay, as in timm (parameters of one dimension get none anyway)
    exponent_parameters() -> set[str]                exponents, which learn at a rate of their own

Where a width shrinks, a tensor keeps the first entries of every dimension (`space/slicing.py`). One whose dimension is folded from several
sizes keeps the first of each of them, and says so: the rows of fused queries, keys and values are `(3, num_heads, head_dim)`.

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
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from space.registry import Registry, SpecError

if TYPE_CHECKING:
    from torch import Tensor

Scalar = bool | int | float | str
LinearMaps = tuple[tuple[int, int, int], ...]
"""Weight matrices as (inputs, outputs, how many of them); a projection to several heads counts head by head."""
REQUIRED: Any = object()

KINDS = (
    "patch_embed",
    "prefix",
    "position",
    "norm",
    "mixer",
    "feed_forward",
    "layer_scale",
    "token_reduction",
    "downsampling",
    "pooling",
    "head",
)
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
    patches still fill a grid in row-major order, None after a step that breaks it up. `has_sizes` says that tokens have sizes, and
    `memory` is the name of the token reduction that remembers something of them.
    """

    dim: int
    num_patches: int
    grid: tuple[int, int] | None = None
    num_prefix: int = 0
    has_class_token: bool = False
    has_sizes: bool = False
    memory: str = ""

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.num_patches


class Tokens(NamedTuple):
    """What goes from block to block: tokens `(B, N, C)` and what token reductions hand on beside them.

    `sizes` `(B, N)` says how many tokens each one stands for, prefix tokens included; None is 1 for all. `memory` is what the reduction
    that `TokenShape.memory` names remembers.
    """

    x: Tensor
    sizes: Tensor | None = None
    memory: Tensor | None = None


class Cost(NamedTuple):
    """Exact counts for one image: parameters, multiply-adds, and what fvcore counts on the built net.

    `macs` holds convolutions, linear layers and both attention products, as papers count; `fvcore_macs` adds what fvcore counts of
    norms (LayerNorm: 5 per element) and of the work by which token reductions choose and merge (taps, similarities, propagation), and
    omits what it is blind to.
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


Folds = tuple[tuple[int, ...], ...]
"""For each dimension of a tensor, the sizes that it is folded from, the slowest first: `((3, num_heads, head_dim), (dim,))`."""


class AttentionTap(IntEnum):
    """How much of the attention map a component must see; more forces slower kernels."""

    NONE = 0
    CLASS_ROW = 1
    """The class token's attention to every token, `(B, H, N)`, without the map."""
    COLUMN_SUMS = 2
    """`AttentionColumns`; the map is made."""
    FULL_MAP = 3
    """The map itself, queries by keys, `(B, H, N, N)`."""


class AttentionColumns(NamedTuple):
    """What every token receives: the sum over all queries, and its attention to itself; both `(B, H, N)`."""

    sums: Tensor
    diagonal: Tensor


@dataclass(frozen=True)
class BlockForm:
    """How the parts of a block act on its tokens, where it is not by two residuals: of the mixer, then of the feed-forward.

    `parts` are the names of the block's parts, of norm1, mixer, layer_scale1, token_reduction, norm2, feed_forward and layer_scale2, in
    the order in which the shape of the tokens passes through them; a norm that it leaves out is not built, and a spec that has another
    part that it leaves out is refused. `forward(block, tokens)` gives the tokens after the block; `block` has a module under the name of
    each part (None where the spec has none, the identity for a layer scale), and both residuals as `add_mixed(x, mixed)` and
    `add_fed_forward(x)`. `counted` gives the cost of parts that act
    otherwise than once on the shape that reaches them, from the parts as `space.layout` placed them.
    """

    parts: tuple[str, ...]
    forward: Callable[[Any, Tokens], Tokens]
    counted: Callable[[Mapping[str, Any]], Mapping[str, Cost]] = lambda parts: {}


@dataclass(frozen=True)
class Choice:
    """One value a component is built with: `offered` is what a search may pick, and sets the type.

    `allowed` is what a spec may hold beyond that: a predicate and the words that describe it in an error. A choice that gives sizes of
    tensors whose entries mean something else in a smaller one says `is_sliced=False`: networks that share weights agree on it.
    """

    offered: tuple[Scalar, ...]
    default: Scalar = REQUIRED
    allowed: tuple[Callable[[Any], bool], str] | None = None
    is_sliced: bool = True

    @property
    def value_type(self) -> type:
        return type(self.offered[0])

    @property
    def words(self) -> str:
        """What is allowed, for a reader."""
        meaning = self.allowed[1] if self.allowed else f"one of {', '.join(map(str, self.offered))}"
        return f"{self.value_type.__name__}, {meaning}"

    def check(self, value: Scalar, where: str) -> Scalar:
        """The value in this choice's type; raises SpecError naming what is allowed."""
        if self.value_type is float and type(value) is int:
            value = float(value)
        is_legal = self.allowed[0] if self.allowed else self.offered.__contains__
        if type(value) is not self.value_type or not is_legal(value):
            raise SpecError(f"{where} is {value!r}; allowed: {self.words}")
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
    takes_sizes: bool = False
    """Whether it takes the sizes of tokens that stand for several."""
    slices_output: bool = False
    """Of a patch embedding: whether a supernet runs it once, at full width and over the whole batch, and takes the first channels of its
    output for a narrower network. It declares so where these channels are all that a narrower one gives, batch statistics included."""
    block_form: BlockForm | None = None
    """The form of a block with this component; None leaves it to the others, and to two residuals if none declares one."""


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

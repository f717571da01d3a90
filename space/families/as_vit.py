"""Auto-scaling Vision Transformers without Training (As-ViT), https://arxiv.org/abs/2202.11921: its search space and family.

Four stages at strides 4, 8, 16, 32 with windowed attention (section 3 of the paper), named by the strings of the released
code. A stage is `K,S,E` or `K,S,E,L`: kernel of the patch embedding or of the merging before it, window splits per side,
expansion of the feed-forward, depth; behind the last bar stand the heads H of the last stage and the width C of the first.

    8,2,3|4,1,2|4,1,4|4,1,6|32                topology: every depth 1, width 32
    8,2,3,5|4,1,2,2|4,1,4,5|4,1,6,2|32,180    scaled: with depths and width (As-ViT-Large)

Widths are min(1024, C), min(1024, 2C), ...; heads H/8, H/4, H/2, H of floor(width / heads) channels each. There is no
position embedding, as in the released code; the published parameter counts are larger by what looks like one of 56^2 C.
LayerNorm has PyTorch's eps 1e-5, which the released code leaves as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from space.family import Family, NamedModel, family
from space.registry import SpecError
from space.search_space import Axis, Candidate, SearchSpace
from space.spec import ArchSpec, BlockSpec, Component, StageSpec, full_choices, with_img_size

NUM_STAGES = 4
MAX_EMBED_DIM = 1024
INIT_STD = 0.02
PROXY_SCALE = 4
"""A grown network is this many times as wide as the proxy that is scored in its place."""

KERNELS = ((4, 5, 6, 7, 8), (2, 3, 4), (2, 3, 4), (2, 3, 4))
SPLITS = ((2, 4, 8), (1, 2, 4), (1, 2), (1,))
EXPANSIONS = (2, 3, 4, 5, 6)
NUM_HEADS = (16, 32, 64)

AXES = (
    *(Axis(name=f"K{stage}", choices=choices) for stage, choices in enumerate(KERNELS, 1)),
    *(Axis(name=f"S{stage}", choices=choices) for stage, choices in enumerate(SPLITS[:3], 1)),
    *(Axis(name=f"E{stage}", choices=EXPANSIONS) for stage in range(1, NUM_STAGES + 1)),
    Axis(name="HEAD", choices=NUM_HEADS),
)
TOPOLOGY_AXES = tuple(axis.name for axis in AXES)
GROWTH_AXES = (
    *(Axis(name=f"depth{stage}", choices=range(1, 33)) for stage in range(1, NUM_STAGES + 1)),
    # Growth starts at 8; below it, 64 heads of the last stage would leave the first stage less than one channel each.
    Axis(name="proxy_embed_dim", choices=range(8, 257)),
)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A point of the family: per stage the kernel K, splits S, expansion E and depth L; heads H and width C for all."""

    kernels: tuple[int, ...]
    splits: tuple[int, ...]
    expansions: tuple[int, ...]
    num_heads: int
    depths: tuple[int, ...] = (1,) * NUM_STAGES
    embed_dim: int = 32

    def __post_init__(self) -> None:
        columns = (("kernels", "K"), ("splits", "S"), ("expansions", "E"), ("depths", "L"))
        for name, _ in columns:
            if len(getattr(self, name)) != NUM_STAGES:
                raise SpecError(f"As-ViT: {name} is {getattr(self, name)!r}; {NUM_STAGES} are needed, one for each stage")
        for stage in range(NUM_STAGES):
            for (name, letter), allowed in zip(columns, (KERNELS[stage], SPLITS[stage], EXPANSIONS, None), strict=True):
                _check(f"{letter}{stage + 1}", getattr(self, name)[stage], allowed)
        _check("H", self.num_heads, NUM_HEADS)
        _check("C", self.embed_dim, None)
        for stage, (width, heads) in enumerate(zip(self.embed_dims, self.heads, strict=True), 1):
            if width < heads:
                raise SpecError(f"As-ViT: C = {self.embed_dim} gives stage {stage} {width} channels; {heads} heads need at least {heads}")

    @property
    def embed_dims(self) -> tuple[int, ...]:
        return tuple(min(MAX_EMBED_DIM, self.embed_dim << stage) for stage in range(NUM_STAGES))

    @property
    def heads(self) -> tuple[int, ...]:
        return tuple(self.num_heads >> (NUM_STAGES - 1 - stage) for stage in range(NUM_STAGES))

    @classmethod
    def parse(cls, text: str) -> Network:
        """The network of a topology or scaled string; raises SpecError naming the field and what is allowed there."""
        *stages, tail = fields = text.strip().split("|")
        if len(stages) != NUM_STAGES:
            raise SpecError(f"As-ViT string {text!r} has {len(fields)} fields between bars; allowed: 5, as in 8,2,3|4,1,2|4,1,4|4,1,6|32")
        rows = [_integers(field, f"stage {number}", ("K", "S", "E", "L"), 3) for number, field in enumerate(stages, 1)]
        heads, width = (*_integers(tail, "the last field", ("H", "C"), 1), cls.embed_dim)[:2]
        kernels, splits, expansions, depths = zip(*((*row, 1)[:4] for row in rows), strict=True)
        return cls(kernels=kernels, splits=splits, expansions=expansions, depths=depths, num_heads=heads, embed_dim=width)

    def __str__(self) -> str:
        """The topology string if all depths are 1 and the width is 32, else the scaled one; `parse` reads both."""
        rows = zip(self.kernels, self.splits, self.expansions, self.depths, strict=True)
        if self.depths == (1,) * NUM_STAGES and self.embed_dim == 32:
            return "|".join([*(f"{k},{s},{e}" for k, s, e, _ in rows), f"{self.num_heads}"])
        return "|".join([*(f"{k},{s},{e},{depth}" for k, s, e, depth in rows), f"{self.num_heads},{self.embed_dim}"])


def _check(field: str, value: Any, allowed: tuple[int, ...] | None) -> None:
    if type(value) is not int or (value not in allowed if allowed else value < 1):
        meaning = f"one of {', '.join(map(str, allowed))}" if allowed else "a whole number above 0"
        raise SpecError(f"As-ViT: {field} is {value!r}; allowed: {meaning}")


def _integers(field: str, where: str, names: tuple[str, ...], num_required: int) -> tuple[int, ...]:
    words = field.split(",")
    if not num_required <= len(words) <= len(names):
        forms = " or ".join(",".join(names[:count]) for count in range(num_required, len(names) + 1))
        raise SpecError(f"As-ViT string: {where} is {field!r}; allowed: {forms}")
    for name, word in zip(names, words, strict=False):
        if not re.fullmatch(r"[0-9]{1,9}", word):
            raise SpecError(f"As-ViT string: {name} of {where} is {word!r}; allowed: whole numbers")
    return tuple(map(int, words))


def explain(text: str) -> list[str]:
    """The numbers of a string in words, a line for each stage; raises SpecError as `Network.parse` does."""
    network = Network.parse(text)
    lines = [
        "K,S,E,L of each stage, then H,C (L is 1 and C is 32 where they are left out):",
        f"{'stage':<7}{'K kernel':<25}{'S windows':<11}{'E feed-forward':<16}{'L blocks':>8}{'width':>7}{'heads':>6}",
    ]
    columns = (network.kernels, network.splits, network.expansions, network.depths, network.embed_dims, network.heads)
    for stage, (kernel, splits, expansion, depth, width, heads) in enumerate(zip(*columns, strict=True), 1):
        entry = f"{kernel} x {kernel} {'pixels, stride 4' if stage == 1 else 'merging, stride 2'}"
        windows, wide = f"{splits} x {splits}", f"{expansion} x width"
        lines.append(f"{stage:<7}{entry:<25}{windows:<11}{wide:<16}{depth:>8}{width:>7}{heads:>6}")
    return [
        *lines,
        f"H = {network.num_heads} heads in the last stage, half as many in each one before;",
        f"C = {network.embed_dim} channels in the first stage, doubled in each one after, up to {MAX_EMBED_DIM}.",
    ]


SEED = Network.parse("8,2,3|4,1,2|4,1,4|4,1,6|32")
ASVIT_SMALL = Network.parse("8,2,3,3|4,1,2,1|4,1,4,4|4,1,6,2|32,88")
ASVIT_BASE = Network.parse("8,2,3,3|4,1,2,1|4,1,4,5|4,1,6,2|32,116")
ASVIT_LARGE = Network.parse("8,2,3,5|4,1,2,2|4,1,4,5|4,1,6,2|32,180")
"""The published family. Large is written out in the released code; Small and Base follow from their parameters and MACs."""


def spec(network: Network, *, img_size: int, num_classes: int = 1000) -> ArchSpec:
    """The architecture at an image size in pixels, a multiple of 32 whose grids every window split divides."""
    _check_img_size(img_size)
    for stage, splits in enumerate(network.splits):
        side = img_size >> (2 + stage)
        if side % splits:
            raise SpecError(f"As-ViT: S{stage + 1} = {splits} does not divide the grid of {side}x{side} patches at img_size {img_size}")
    mergings = (*(Component("patch_merging", kernel=kernel) for kernel in network.kernels[1:]), None)
    blocks = map(_block, network.embed_dims, network.heads, network.splits, network.expansions)
    stages = tuple(
        StageSpec(embed_dim=width, blocks=(block,) * depth, downsampling=merging)
        for width, block, depth, merging in zip(network.embed_dims, blocks, network.depths, mergings, strict=True)
    )
    return ArchSpec(
        stages=stages,
        img_size=img_size,
        num_classes=num_classes,
        patch_embed=Component("conv", kernel=network.kernels[0], stride=4, norm=True),
        norm=Component("layer_norm", eps=1e-5),
        pooling=Component("mean"),
        head=Component("tanh_mlp"),
    )


@lru_cache(maxsize=65536)
def _block(embed_dim: int, num_heads: int, splits: int, expansion: int) -> BlockSpec:
    return BlockSpec(
        mixer=Component("window_attention", num_heads=num_heads, head_dim=embed_dim // num_heads, splits=splits),
        feed_forward=Component("mlp", hidden_dim=expansion * embed_dim),
    )


def topology_space(*, img_size: int, num_classes: int, proxy_img_size: int | None = None) -> SearchSpace:
    """The 4,556,250 seed topologies at width 32 and depth 1, each scored at `proxy_img_size` pixels, `img_size` unless given."""
    proxy_img_size = img_size if proxy_img_size is None else proxy_img_size
    _check_img_size(img_size)
    _check_img_size(proxy_img_size)

    def decode(params: Mapping[str, Any]) -> Candidate:
        network = _network(params, depths=(1,) * NUM_STAGES, embed_dim=32)
        model = spec(network, img_size=img_size, num_classes=num_classes)
        proxy = None if proxy_img_size == img_size else with_img_size(model, proxy_img_size)
        return Candidate(model=model, proxy=proxy, label=str(network))

    return SearchSpace(name="as_vit/topology", axes=AXES, decode=decode)


def growth_space(*, img_size: int, num_classes: int, proxy_img_size: int | None = None) -> SearchSpace:
    """Topologies with depths and a width; the proxy that is scored has a quarter of the network's width and its depths.

    The proxy takes images of `proxy_img_size` pixels, `img_size` unless given.
    """
    proxy_img_size = img_size if proxy_img_size is None else proxy_img_size
    _check_img_size(img_size)
    _check_img_size(proxy_img_size)

    def decode(params: Mapping[str, Any]) -> Candidate:
        depths = tuple(params[f"depth{stage}"] for stage in range(1, NUM_STAGES + 1))
        width = params["proxy_embed_dim"]
        network = _network(params, depths=depths, embed_dim=PROXY_SCALE * width)
        narrow = _network(params, depths=depths, embed_dim=width)
        return Candidate(
            model=spec(network, img_size=img_size, num_classes=num_classes),
            proxy=spec(narrow, img_size=proxy_img_size, num_classes=num_classes),
            label=str(network),
        )

    return SearchSpace(name="as_vit/growth", axes=AXES + GROWTH_AXES, decode=decode)


def length_distortion_closed_form(
    model: ArchSpec | Network, num_angles: int = 10, *, img_size: int | None = None, padding: bool = False
) -> float:
    """The length distortion L^E of an untrained As-ViT in closed form: about C^2 K2 K3 K4.

    L^E is the reference's sum of speeds over `num_angles` points of a circle of radius 1. Without norms and with weights
    of std 0.02, residual branches add about a percent, and the speed passes through the trunk alone:

    - the tangent has norm 1 over the in_chans * img_size^2 pixels; the patch embedding, of variance 1 / (3 fan_in), gives
      each channel of each token the variance 1 / (3 * in_chans * img_size^2), whatever its kernel;
    - a merging multiplies the variance by its fan_in K^2 * dim times 0.02^2;
    - the mean over the last stage's grid divides it by its number of tokens, and the norm adds up its channels.

    This ignores the zeros that mergings pad with. Networks with kernels of 4 therefore lie below it, by 12 percent at 224
    pixels, a third at 64 and two thirds at 32; with kernels of 2 nothing is padded. With `padding`, a merging onto n x n
    tokens counts only the K n - (K - 2) of its K n taps per axis that fall on the grid: no longer a plain product, but
    within 7 percent at 32 to 224 pixels (width 8, depth 1, kernels all 2 or all 4, means of 6 networks on the CPU).
    `img_size` is read from an ArchSpec and 224 for a Network unless given. Raises SpecError for a spec
    that is not an As-ViT: a convolution, then stages joined by patch merging, without prefix tokens and position embedding.
    """
    if isinstance(model, Network):
        model = spec(model, img_size=img_size or 224)
    elif img_size is not None:
        model = with_img_size(model, img_size)
    *stages, last = model.stages
    mergings = [stage.downsampling for stage in stages]
    if (
        not mergings
        or any(merging is None or merging.name != "patch_merging" for merging in mergings)
        or model.patch_embed.name != "conv"
        or model.prefix is not None
        or model.position is not None
    ):
        raise SpecError(
            "the closed form holds for As-ViT alone: a 'conv' patch_embed, two or more stages joined by 'patch_merging', "
            "neither prefix nor position"
        )
    choices = full_choices("patch_embed", model.patch_embed)
    last_side = model.img_size // (int(choices["stride"]) * 2 ** len(stages))
    # Whole numbers are multiplied as such: equal products then are equal to the last bit, and tie in a ranking.
    gain = 1
    for index, stage in enumerate(stages):
        assert stage.downsampling is not None
        kernel = int(stage.downsampling.choices["kernel"])
        side = last_side * 2 ** (len(stages) - 1 - index)
        taps = kernel - (kernel - 2) / side if padding else kernel
        gain *= taps**2 * stage.embed_dim
    variance = gain * INIT_STD ** (2 * len(stages)) / (3 * model.in_chans * model.img_size**2)
    return num_angles * math.sqrt(last.embed_dim * variance / last_side**2)


def _network(params: Mapping[str, Any], *, depths: tuple[int, ...], embed_dim: int) -> Network:
    return Network(
        kernels=(params["K1"], params["K2"], params["K3"], params["K4"]),
        splits=(params["S1"], params["S2"], params["S3"], 1),
        expansions=(params["E1"], params["E2"], params["E3"], params["E4"]),
        num_heads=params["HEAD"],
        depths=depths,
        embed_dim=embed_dim,
    )


def _check_img_size(img_size: int) -> None:
    if type(img_size) is not int or img_size < 32 or img_size % 32:
        raise SpecError(f"As-ViT: img_size is {img_size!r}; allowed: multiples of 32, the stride of the last stage")


_SOURCE = "As-ViT (https://arxiv.org/abs/2202.11921), 224 px"


@family("as_vit")
def as_vit() -> Family:
    """As-ViT: four stages with windowed attention, searched and grown without training."""
    published = {
        "as_vit_seed": ("the published seed topology at width 32, depth 1", SEED),
        "as_vit_small": ("As-ViT-Small: 88 wide, 10 blocks", ASVIT_SMALL),
        "as_vit_base": ("As-ViT-Base: 116 wide, 11 blocks", ASVIT_BASE),
        "as_vit_large": ("As-ViT-Large: 180 wide, 14 blocks", ASVIT_LARGE),
    }
    return Family(
        models={
            name: NamedModel(summary=f"{summary}; {_SOURCE}", make=partial(spec, network, img_size=224))
            for name, (summary, network) in published.items()
        },
        read=lambda text: spec(Network.parse(text), img_size=224),
        explain=explain,
        spaces={"as_vit/topology": topology_space, "as_vit/growth": growth_space},
    )

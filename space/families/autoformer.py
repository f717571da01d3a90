"""AutoFormer's search spaces, in the form that Auto-Prox trained 100 of its networks and in AutoFormer's own.

AutoFormer: Searching Transformers for Visual Recognition, https://arxiv.org/abs/2107.00651; Auto-Prox: Training-Free Vision
Transformer Architecture Search via Automatic Proxy Discovery, https://arxiv.org/abs/2312.09059, code and accuracies at
https://github.com/lilujunai/Auto-Prox-AAAI24 (Apache-2.0).

Width and depth are chosen once, heads and feed-forward ratio for every block. There is a class token, positions are learned, and the
head reads the mean of the patches. The two forms differ in their attention:

- Auto-Prox: queries, keys and values are as wide as the tokens, whatever the number of heads, and there is no relative position. The
  `macs` of `cost` are its table's MACs: that count leaves norms out.
- AutoFormer (the code at https://github.com/microsoft/Cream, run with `--change_qk --relative_position --gp`): heads of 64 channels
  whatever the width, and relative positions up to 14 patches in keys and values. Its norms have eps 1e-5.

Both share weights in AutoFormer's supernet. Ours holds the second form, whose heads are whole slices of the widest attention; in the first
the width of a head changes with the number of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from space.family import Family, NamedSupernet, family
from space.registry import SpecError
from space.search_space import Axis, Candidate, SearchSpace
from space.spec import ArchSpec, BlockSpec, Component, StageSpec
from space.supernet_space import BlockChoices, StageChoices, SupernetSpace

FIELDS = ("hidden_dim", "depth", "mlp_ratio", "num_heads")
PATCH_SIZE = 16
CREAM_HEAD_DIM = 64

# Made once: a search makes tens of thousands of networks.
PATCH_EMBED = Component("conv", kernel=PATCH_SIZE, stride=PATCH_SIZE)
PREFIX = Component("class_token")
POSITION = Component("learned")
POOLING = Component("mean")
AUTO_PROX_NORM = Component("layer_norm")
CREAM_NORM = Component("layer_norm", eps=1e-5)


@dataclass(frozen=True)
class Ranges:
    """What a space chooses from: widths and depths of the network, feed-forward ratios and heads of each block."""

    hidden_dims: tuple[int, ...]
    depths: range
    mlp_ratios: tuple[float, ...]
    num_heads: tuple[int, ...]


AUTO_PROX = Ranges((192, 216, 240), range(12, 15), (3.5, 4.0), (3, 4))
CREAM = {
    "tiny": AUTO_PROX,
    "small": Ranges((320, 384, 448), range(12, 15), (3.0, 3.5, 4.0), (5, 6, 7)),
    "base": Ranges((528, 576, 624), range(14, 17), (3.0, 3.5, 4.0), (8, 9, 10)),
}
"""Table 1 of AutoFormer."""

Block = Callable[[int, int, float], BlockSpec]


def spec(arch: Mapping[str, Any], *, num_classes: int, img_size: int = 224) -> ArchSpec:
    """The network of Auto-Prox's notation: `hidden_dim`, `depth`, and lists `mlp_ratio` and `num_heads` of one entry for each block.

    Raises SpecError naming what is missing or cannot be.
    """
    return _spec(arch, _auto_prox_block, AUTO_PROX_NORM, num_classes=num_classes, img_size=img_size)


def cream_spec(arch: Mapping[str, Any], *, num_classes: int, img_size: int = 224) -> ArchSpec:
    """The network of the same notation with AutoFormer's own attention."""
    return _spec(arch, _cream_block, CREAM_NORM, num_classes=num_classes, img_size=img_size)


def _spec(arch: Mapping[str, Any], block: Block, norm: Component, *, num_classes: int, img_size: int) -> ArchSpec:
    width, ratios, heads = _checked(arch)
    blocks = tuple(block(width, number, ratio) for number, ratio in zip(heads, ratios, strict=True))
    return ArchSpec(
        stages=(StageSpec(embed_dim=width, blocks=blocks),),
        img_size=img_size,
        num_classes=num_classes,
        patch_embed=PATCH_EMBED,
        prefix=PREFIX,
        position=POSITION,
        norm=norm,
        pooling=POOLING,
    )


def _checked(arch: Mapping[str, Any]) -> tuple[int, Sequence[float], Sequence[int]]:
    """Width, and the feed-forward ratio and heads of every block."""
    if missing := [name for name in FIELDS if name not in arch]:
        raise SpecError(f"AutoFormer: {', '.join(missing)} is missing; needed: {', '.join(FIELDS)}")
    if unknown := [name for name in arch if name not in FIELDS]:
        raise SpecError(f"AutoFormer: unknown {', '.join(unknown)}; known: {', '.join(FIELDS)}")
    width, depth = arch["hidden_dim"], arch["depth"]
    for name in ("hidden_dim", "depth"):
        if type(arch[name]) is not int or arch[name] < 1:
            raise SpecError(f"AutoFormer: {name} is {arch[name]!r}; a whole number above 0 is expected")
    for name, kinds, meaning in (("mlp_ratio", (int, float), "numbers"), ("num_heads", (int,), "whole numbers")):
        values = arch[name]
        if not isinstance(values, Sequence) or any(type(value) not in kinds or not value > 0 for value in values):
            raise SpecError(f"AutoFormer: {name} is {values!r}; a list of {meaning} above 0 is expected")
        if len(values) != depth:
            raise SpecError(f"AutoFormer: {name} has {len(values)} entries; depth is {depth}")
    return width, arch["mlp_ratio"], arch["num_heads"]


@lru_cache(maxsize=4096)
def _auto_prox_block(width: int, num_heads: int, mlp_ratio: float) -> BlockSpec:
    if width % num_heads:
        raise SpecError(f"AutoFormer: num_heads is {num_heads}; it must divide hidden_dim {width}")
    return BlockSpec(
        mixer=Component("attention", num_heads=num_heads, head_dim=width // num_heads),
        feed_forward=Component("mlp", hidden_dim=int(width * mlp_ratio)),
    )


@lru_cache(maxsize=4096)
def _cream_block(width: int, num_heads: int, mlp_ratio: float) -> BlockSpec:
    return BlockSpec(
        mixer=Component("relative_attention", num_heads=num_heads, head_dim=CREAM_HEAD_DIM),
        feed_forward=Component("mlp", hidden_dim=int(width * mlp_ratio)),
    )


def autoformer_space(*, num_classes: int, img_size: int = 224) -> SearchSpace:
    """All networks of the space that Auto-Prox took its table from."""
    return _space("autoformer", AUTO_PROX, spec, num_classes=num_classes, img_size=img_size)


def _space(name: str, ranges: Ranges, read: Callable[..., ArchSpec], *, num_classes: int, img_size: int) -> SearchSpace:
    """All networks of the ranges; `mlp_ratio13` and the like exist where the depth reaches that block."""
    axes = [Axis(name="hidden_dim", choices=ranges.hidden_dims), Axis(name="depth", choices=ranges.depths)]
    for block in range(1, ranges.depths[-1] + 1):
        deep_enough = tuple(depth for depth in ranges.depths if depth >= block)
        when = None if len(deep_enough) == len(ranges.depths) else ("depth", deep_enough)
        axes.append(Axis(name=f"mlp_ratio{block}", choices=ranges.mlp_ratios, when=when))
        axes.append(Axis(name=f"num_heads{block}", choices=ranges.num_heads, when=when))

    def decode(params: Mapping[str, Any]) -> Candidate:
        blocks = range(1, params["depth"] + 1)
        arch = {
            "hidden_dim": params["hidden_dim"],
            "depth": params["depth"],
            "mlp_ratio": [params[f"mlp_ratio{block}"] for block in blocks],
            "num_heads": [params[f"num_heads{block}"] for block in blocks],
        }
        return Candidate(model=read(arch, num_classes=num_classes, img_size=img_size), label=label(arch))

    return SearchSpace(name=name, axes=tuple(axes), decode=decode)


def label(arch: Mapping[str, Any]) -> str:
    """`240x13 3h4 4h3.5 ...`: width by depth, then heads and ratio of every block."""
    blocks = " ".join(f"{heads}h{ratio:g}" for heads, ratio in zip(arch["num_heads"], arch["mlp_ratio"], strict=True))
    return f"{arch['hidden_dim']}x{arch['depth']} {blocks}"


def cream_supernet(size: str, *, img_size: int = 224, num_classes: int = 1000) -> SupernetSpace:
    """The networks of `autoformer_cream/SIZE` as subnets of the largest: the first blocks up to a depth, ratios of the width."""
    ranges = CREAM[size]
    block = BlockChoices(mixer={"num_heads": ranges.num_heads}, feed_forward={"hidden_dim": ranges.mlp_ratios})
    depth = ranges.depths[-1]
    largest = {
        "hidden_dim": max(ranges.hidden_dims),
        "depth": depth,
        "mlp_ratio": [max(ranges.mlp_ratios)] * depth,
        "num_heads": [max(ranges.num_heads)] * depth,
    }
    return SupernetSpace(
        name=f"autoformer_cream/{size}",
        largest=cream_spec(largest, num_classes=num_classes, img_size=img_size),
        stages=(StageChoices(widths=ranges.hidden_dims, blocks=(block,) * depth, depths=tuple(ranges.depths)),),
    )


@family("autoformer")
def autoformer() -> Family:
    """AutoFormer: plain Vision Transformers whose heads and feed-forward ratio are chosen for every block."""
    own = {f"autoformer_cream/{size}": ranges for size, ranges in CREAM.items()}
    return Family(
        spaces={"autoformer": autoformer_space, **{name: partial(_space, name, ranges, cream_spec) for name, ranges in own.items()}},
        tables={"autoformer": spec, "autoformer_cream": cream_spec},
        supernets={
            f"autoformer_cream/{size}": NamedSupernet(
                summary=f"AutoFormer-{size.capitalize()} (https://arxiv.org/abs/2107.00651), 224 px", make=partial(cream_supernet, size)
            )
            for size in CREAM
        },
    )

"""AutoFormer's search space in the form that Auto-Prox trained 100 of its networks.

AutoFormer: Searching Transformers for Visual Recognition, https://arxiv.org/abs/2107.00651; Auto-Prox: Training-Free Vision
Transformer Architecture Search via Automatic Proxy Discovery, https://arxiv.org/abs/2312.09059, code and accuracies at
https://github.com/lilujunai/Auto-Prox-AAAI24 (Apache-2.0).

Width and depth are chosen once, heads and feed-forward ratio for every block. Unlike AutoFormer's own layers, queries, keys and
values are as wide as the tokens, whatever the number of heads, and there is no relative position. There is a class token, and
the head reads the mean of the patches. The `macs` of `cost` are the table's MACs: its count leaves norms out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from space.family import Family, family
from space.registry import SpecError
from space.search_space import Axis, Candidate, SearchSpace
from space.spec import ArchSpec, BlockSpec, Component, StageSpec

HIDDEN_DIMS = (192, 216, 240)
DEPTHS = range(12, 15)
MLP_RATIOS = (3.5, 4.0)
NUM_HEADS = (3, 4)


def spec(arch: Mapping[str, Any], *, num_classes: int, img_size: int = 224) -> ArchSpec:
    """The network of Auto-Prox's notation: `hidden_dim`, `depth`, and lists `mlp_ratio` and `num_heads` of one entry for each block."""
    for name in ("hidden_dim", "depth", "mlp_ratio", "num_heads"):
        if name not in arch:
            raise SpecError(f"AutoFormer: {name} is missing; needed: hidden_dim, depth, mlp_ratio, num_heads")
    width, depth = arch["hidden_dim"], arch["depth"]
    for name in ("mlp_ratio", "num_heads"):
        if len(arch[name]) != depth:
            raise SpecError(f"AutoFormer: {name} has {len(arch[name])} entries; depth is {depth}")
    blocks = tuple(_block(width, heads, ratio) for heads, ratio in zip(arch["num_heads"], arch["mlp_ratio"], strict=True))
    return ArchSpec(
        stages=(StageSpec(embed_dim=width, blocks=blocks),),
        img_size=img_size,
        num_classes=num_classes,
        patch_embed=Component("conv", kernel=16, stride=16),
        prefix=Component("class_token"),
        position=Component("learned"),
        pooling=Component("mean"),
    )


@lru_cache(maxsize=4096)
def _block(width: int, num_heads: int, mlp_ratio: float) -> BlockSpec:
    if width % num_heads:
        raise SpecError(f"AutoFormer: num_heads is {num_heads}; it must divide hidden_dim {width}")
    return BlockSpec(
        mixer=Component("attention", num_heads=num_heads, head_dim=width // num_heads),
        feed_forward=Component("mlp", hidden_dim=int(width * mlp_ratio)),
    )


def autoformer_space(*, num_classes: int, img_size: int = 224) -> SearchSpace:
    """All networks of the space; `mlp_ratio13` and the like exist where the depth reaches that block."""
    axes = [Axis(name="hidden_dim", choices=HIDDEN_DIMS), Axis(name="depth", choices=DEPTHS)]
    for block in range(1, DEPTHS[-1] + 1):
        deep_enough = tuple(depth for depth in DEPTHS if depth >= block)
        when = None if len(deep_enough) == len(DEPTHS) else ("depth", deep_enough)
        axes.append(Axis(name=f"mlp_ratio{block}", choices=MLP_RATIOS, when=when))
        axes.append(Axis(name=f"num_heads{block}", choices=NUM_HEADS, when=when))

    def decode(params: Mapping[str, Any]) -> Candidate:
        blocks = range(1, params["depth"] + 1)
        arch = {
            "hidden_dim": params["hidden_dim"],
            "depth": params["depth"],
            "mlp_ratio": [params[f"mlp_ratio{block}"] for block in blocks],
            "num_heads": [params[f"num_heads{block}"] for block in blocks],
        }
        return Candidate(model=spec(arch, num_classes=num_classes, img_size=img_size), label=label(arch))

    return SearchSpace(name="autoformer", axes=tuple(axes), decode=decode)


def label(arch: Mapping[str, Any]) -> str:
    """`240x13 3h4 4h3.5 ...`: width by depth, then heads and ratio of every block."""
    blocks = " ".join(f"{heads}h{ratio:g}" for heads, ratio in zip(arch["num_heads"], arch["mlp_ratio"], strict=True))
    return f"{arch['hidden_dim']}x{arch['depth']} {blocks}"


@family("autoformer")
def autoformer() -> Family:
    """AutoFormer: plain Vision Transformers whose heads and feed-forward ratio are chosen for every block."""
    return Family(spaces={"autoformer": autoformer_space})

"""DeiT III: Revenge of the ViT, https://arxiv.org/abs/2204.07118: LayerScale, and positions of the patches alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from space.families.vit import plain_vit
from space.family import Family, NamedModel, family
from space.spec import ArchSpec, Component

_SOURCE = "DeiT III: Revenge of the ViT (https://arxiv.org/abs/2204.07118), 224 px"


def deit3_vit(embed_dim: int, depth: int, num_heads: int) -> ArchSpec:
    """The plain ViT of patch 16 with LayerScale and without a position of the class token."""
    plain = plain_vit(embed_dim, depth, num_heads)
    (stage,) = plain.stages
    block = replace(stage.blocks[0], layer_scale=Component("learned"))
    return replace(plain, stages=(replace(stage, blocks=(block,) * depth),), position=Component("learned", covers_prefix=False))


@family("deit3")
def deit3() -> Family:
    """DeiT III: the sizes S, B and L, also the anchors of SN-Net."""
    sizes = {"small": ("S", 384, 12, 6), "base": ("B", 768, 12, 12), "large": ("L", 1024, 24, 16)}
    return Family(
        models={
            f"deit3_{name}": NamedModel(
                summary=f"DeiT III-{letter}: {depth} blocks {embed_dim} wide, patch 16; {_SOURCE}",
                make=partial(deit3_vit, embed_dim, depth, num_heads),
            )
            for name, (letter, embed_dim, depth, num_heads) in sizes.items()
        }
    )

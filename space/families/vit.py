"""An image is worth 16x16 words: Transformers for image recognition at scale (ViT), https://arxiv.org/abs/2010.11929."""

from __future__ import annotations

from functools import partial

from space.family import Family, NamedModel, family
from space.spec import ArchSpec, BlockSpec, Component, StageSpec


def plain_vit(
    embed_dim: int, depth: int, num_heads: int, *, mlp_ratio: int = 4, patch_size: int = 16, img_size: int = 224, num_classes: int = 1000
) -> ArchSpec:
    """ViT with a class token, learned positions and heads that divide `embed_dim`; sizes in pixels."""
    block = BlockSpec(
        mixer=Component("attention", num_heads=num_heads, head_dim=embed_dim // num_heads),
        feed_forward=Component("mlp", hidden_dim=mlp_ratio * embed_dim),
    )
    return ArchSpec(
        stages=(StageSpec(embed_dim=embed_dim, blocks=(block,) * depth),),
        img_size=img_size,
        num_classes=num_classes,
        patch_embed=Component("conv", kernel=patch_size, stride=patch_size),
        prefix=Component("class_token"),
        position=Component("learned"),
        pooling=Component("class_token"),
    )


@family("vit")
def vit() -> Family:
    """ViT: plain Vision Transformers, two of them for small images."""
    return Family(
        models={
            "vit_digits": NamedModel(
                summary="4 blocks 48 wide, patch 4; for the 10 classes of digits, 16 px",
                make=partial(plain_vit, 48, 4, 3, mlp_ratio=2, patch_size=4, img_size=16, num_classes=10),
            ),
            "vit_cifar": NamedModel(
                summary="6 blocks 256 wide, patch 4; for 10 classes, 32 px",
                make=partial(plain_vit, 256, 6, 4, patch_size=4, img_size=32, num_classes=10),
            ),
            "vit_large_patch16": NamedModel(
                summary="ViT-L/16: 24 blocks 1024 wide; An image is worth 16x16 words (https://arxiv.org/abs/2010.11929), 224 px",
                make=partial(plain_vit, 1024, 24, 16),
            ),
        }
    )

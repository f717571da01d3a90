"""Spaces of tiny supernets in both published forms, and subnets drawn from them."""

from __future__ import annotations

from dataclasses import replace

import torch

from space.spec import ArchSpec, BlockSpec, Component, StageSpec
from space.subnet_spec import SubnetSpec
from space.supernet_space import BlockChoices, StageChoices, SupernetSpace
from workers.subnet_sampling import draw_iid, unlocked_tables


def _stage(width: int, num_blocks: int, *, mixer: str = "attention", downsampling: str | None = None) -> StageSpec:
    block = BlockSpec(mixer=Component(mixer, num_heads=3, head_dim=4), feed_forward=Component("mlp", hidden_dim=2 * width))
    return StageSpec(embed_dim=width, blocks=(block,) * num_blocks, downsampling=Component(downsampling) if downsampling else None)


def resnas(*, img_size: int = 8, num_classes: int = 10) -> SupernetSpace:
    """Two stages joined by a residual reduction, a stem of batch norms, blocks that may be left out: ViT-ResNAS's form."""
    largest = ArchSpec(
        stages=(_stage(12, 3, downsampling="residual_spatial_reduction"), _stage(20, 2)),
        img_size=img_size,
        num_classes=num_classes,
        patch_embed=Component("residual_conv_stem", kernel=img_size // 8, mid_dim=4),
        prefix=Component("class_token"),
        position=Component("learned"),
        pooling=Component("class_token"),
    )
    stays = [BlockChoices(mixer={"num_heads": (3, 2, 1)}, feed_forward={"hidden_dim": (2 * width, width, 5)}) for width in (12, 20)]
    skippable = [replace(block, is_skippable=True) for block in stays]
    stages = (
        StageChoices(widths=(12, 10, 8), blocks=(stays[0], skippable[0], stays[0])),
        StageChoices(widths=(20, 16, 12), blocks=(stays[1], skippable[1])),
    )
    return SupernetSpace(name="resnas", largest=largest, stages=stages)


def autoformer() -> SupernetSpace:
    """One stage with a depth, relative positions, fixed and no class token's: AutoFormer's form, nothing of ViT-ResNAS in it."""
    largest = ArchSpec(
        stages=(_stage(12, 3, mixer="relative_attention"),),
        img_size=8,
        num_classes=10,
        patch_embed=Component("conv", kernel=2, stride=2),
        prefix=Component("class_token"),
        position=Component("learned"),
        pooling=Component("mean"),
    )
    block = BlockChoices(mixer={"num_heads": (3, 2)}, feed_forward={"hidden_dim": (2.0, 1.5)})
    return SupernetSpace(name="autoformer", largest=largest, stages=(StageChoices(widths=(12, 8), blocks=(block,) * 3, depths=(3, 2, 1)),))


def drawn(space: SupernetSpace, seed: int) -> SubnetSpec:
    """An independent draw from the whole space."""
    return space.subnet(draw_iid(unlocked_tables(space, 0, 0), torch.Generator().manual_seed(seed)))

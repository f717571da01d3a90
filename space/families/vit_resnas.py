"""ViT-ResNAS: three stages joined by residual reductions, and the spaces of its supernets.

Searching for Efficient Multi-Stage Vision Transformers, https://arxiv.org/abs/2109.00642. The published networks and spaces are those of
the released code (https://github.com/yilunliao/vit-search). Heads are 32, 48 and 64 channels wide in the three stages, whatever the width
of the tokens.

    vit_resnas:176,3x704,3x576|352,10x1408|704,10x2560,8x2560

is a network in writing, a field for each stage with bars between them: its width, then heads x hidden units of every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from space.family import Family, NamedModel, NamedSupernet, family
from space.registry import SpecError
from space.spec import ArchSpec, BlockSpec, Component, StageSpec
from space.supernet_space import BlockChoices, StageChoices, SupernetSpace, read_stages

NUM_STAGES = 3
HEAD_DIMS = (32, 48, 64)
KERNEL = 7
"""Of the stem's last convolution: a stride of 14 pixels."""

Stage = tuple[int, Sequence[tuple[int, int]]]
"""Width, and (heads, hidden units) of every block."""

TINY: tuple[Stage, ...] = (
    (176, ((3, 704), (3, 576), (3, 640), (4, 576), (4, 704))),
    (352, ((10, 1408), (8, 1408), (8, 1280), (8, 1408), (10, 1280), (10, 1024))),
    (704, ((10, 2560), (10, 1792), (10, 2816), (8, 2816), (8, 2560))),
)
SMALL: tuple[Stage, ...] = (
    (220, ((5, 880), (5, 880), (7, 800), (5, 720), (5, 720), (5, 720))),
    (440, ((10, 1760), (10, 1440), (10, 1920), (10, 1600), (12, 1600), (12, 1440))),
    (880, ((16, 3200), (12, 3200), (16, 2880), (12, 2240), (14, 2560))),
)
MEDIUM: tuple[Stage, ...] = (
    (240, ((7, 960), (6, 960), (7, 800), (8, 960), (7, 880), (8, 880), (6, 800))),
    (640, ((10, 1120), (14, 1760), (14, 1920), (16, 1760), (14, 1440), (16, 1760), (16, 1920))),
    (880, ((16, 3200), (10, 3840), (16, 3840), (12, 3200), (16, 3520), (14, 3520))),
)
"""The networks that the paper's search found."""
HAND_MADE: tuple[Stage, ...] = ((192, ((3, 768),) * 4), (384, ((6, 1536),) * 4), (768, ((12, 3072),) * 4))
"""ViT-Res-Tiny, which the search starts from: heads of 64 channels in all stages."""


def spec(
    stages: Sequence[Stage],
    *,
    img_size: int = 224,
    num_classes: int = 1000,
    head_dims: Sequence[int] = HEAD_DIMS,
    kernel: int = KERNEL,
    mid_dim: int = 24,
) -> ArchSpec:
    """The network of these stages; images are a multiple of `2 * kernel` pixels and of 2 to the number of reductions."""
    made = []
    for index, ((width, blocks), head_dim) in enumerate(zip(stages, head_dims, strict=True)):
        downsampling = Component("residual_spatial_reduction") if index < len(stages) - 1 else None
        made.append(StageSpec(embed_dim=width, blocks=tuple(_block(*block, head_dim) for block in blocks), downsampling=downsampling))
    return ArchSpec(
        stages=tuple(made),
        img_size=img_size,
        num_classes=num_classes,
        patch_embed=Component("residual_conv_stem", kernel=kernel, mid_dim=mid_dim),
        prefix=Component("class_token"),
        position=Component("learned"),
        pooling=Component("class_token"),
    )


def _block(num_heads: int, hidden_dim: int, head_dim: int) -> BlockSpec:
    return BlockSpec(
        mixer=Component("attention", num_heads=num_heads, head_dim=head_dim), feed_forward=Component("mlp", hidden_dim=hidden_dim)
    )


def read(text: str) -> ArchSpec:
    """The network in the notation of this file, at 224 pixels; raises SpecError naming the field that is wrong."""
    where = "ViT-ResNAS string"
    stages = read_stages(text, where)
    if len(stages) != NUM_STAGES:
        raise SpecError(f"{where} {text!r} has {len(stages)} stages between bars; {NUM_STAGES} are needed")
    made: list[Stage] = []
    for number, (width, blocks) in enumerate(stages, 1):
        pairs = []
        for block, values in enumerate(blocks, 1):
            if values is None or len(values) != 2 or any(type(value) is not int or value < 1 for value in values):
                raise SpecError(f"{where}: block {block} of stage {number} is not HEADSxHIDDEN, as in 3x704")
            pairs.append((int(values[0]), int(values[1])))
        made.append((width, pairs))
    return spec(made)


def explain(text: str) -> list[str]:
    """The numbers of a string in words, a line for each stage; raises SpecError as `read` does."""
    lines = ["Each stage: its width, then heads x hidden units of every block:"]
    for number, (stage, head_dim) in enumerate(zip(read(text).stages, HEAD_DIMS, strict=True), 1):
        lines.append(f"stage {number}: {stage.embed_dim} wide, blocks: {len(stage.blocks)}, heads of {head_dim} channels")
    return lines


def published_space(name: str, *, img_size: int = 224, num_classes: int = 1000) -> SupernetSpace:
    """A space of the paper, "tiny" or "small"; the searched Small and Medium share the second."""
    depth, widths, first_heads, heads, hidden_dims = PUBLISHED[name]
    stages = [
        stage_choices(
            depth,
            widths=[width << stage for width in widths],
            num_heads=heads if stage else first_heads,
            hidden_dims=[hidden << stage for hidden in hidden_dims],
        )
        for stage in range(NUM_STAGES)
    ]
    return _space(f"vit_resnas/{name}", stages, HEAD_DIMS, kernel=KERNEL, mid_dim=24, img_size=img_size, num_classes=num_classes)


PUBLISHED = {
    "tiny": (6, (256, 224, 192, 176, 160), (6, 5, 4, 3), (12, 10, 8, 6), range(768, 383, -64)),
    "small": (7, (320, 280, 240, 220, 200), (8, 7, 6, 5), (16, 14, 12, 10), range(960, 479, -80)),
}
"""Blocks of a stage; widths of the first stage; its heads, and those of the others; hidden units of the first stage.

Widths and hidden units double from stage to stage.
"""


def small_image_space(
    name: str, *, widths: Sequence[int], depth: int, head_dims: Sequence[int], mid_dim: int, img_size: int = 32, num_classes: int = 10
) -> SupernetSpace:
    """A space of the same form for images of a multiple of 16 pixels: a stem of stride 4, fewer and narrower blocks.

    `widths` are those of the first stage, the largest first. One to four heads in every stage, 1.5 to 3 hidden units for each channel of
    the largest width.
    """
    stages = [
        stage_choices(
            depth,
            widths=[width << stage for width in widths],
            num_heads=(4, 3, 2, 1),
            hidden_dims=[(widths[0] << stage) * halves // 2 for halves in (6, 5, 4, 3)],
        )
        for stage in range(NUM_STAGES)
    ]
    return _space(name, stages, head_dims, kernel=2, mid_dim=mid_dim, img_size=img_size, num_classes=num_classes)


def stage_choices(depth: int, *, widths: Sequence[int], num_heads: Sequence[int], hidden_dims: Sequence[int]) -> StageChoices:
    """A stage in the paper's form: heads and hidden units for every block, and every second block may be left out."""
    stays = BlockChoices(mixer={"num_heads": tuple(num_heads)}, feed_forward={"hidden_dim": tuple(hidden_dims)})
    return StageChoices(widths=tuple(widths), blocks=tuple(replace(stays, is_skippable=bool(block % 2)) for block in range(depth)))


def _space(
    name: str, stages: Sequence[StageChoices], head_dims: Sequence[int], *, kernel: int, mid_dim: int, img_size: int, num_classes: int
) -> SupernetSpace:
    largest = [
        (stage.widths[0], [(int(block.mixer["num_heads"][0]), int(block.feed_forward["hidden_dim"][0])) for block in stage.blocks])
        for stage in stages
    ]
    network = spec(largest, img_size=img_size, num_classes=num_classes, head_dims=head_dims, kernel=kernel, mid_dim=mid_dim)
    return SupernetSpace(name=name, largest=network, stages=tuple(stages))


@family("vit_resnas")
def vit_resnas() -> Family:
    """ViT-ResNAS: three stages joined by residual reductions, searched in a supernet."""
    source = "ViT-ResNAS (https://arxiv.org/abs/2109.00642), 224 px"
    searched = {"vit_resnas_tiny": TINY, "vit_resnas_small": SMALL, "vit_resnas_medium": MEDIUM}
    digits = partial(small_image_space, "vit_resnas/digits", widths=(32, 24, 16), depth=3, head_dims=(8, 12, 16), mid_dim=8)
    cifar = partial(small_image_space, "vit_resnas/cifar", widths=(64, 56, 48, 40), depth=4, head_dims=(16, 24, 32), mid_dim=16)
    return Family(
        models={
            "vit_res_tiny": NamedModel(
                summary=f"ViT-Res-Tiny, made by hand; {source}", make=partial(spec, HAND_MADE, head_dims=(64,) * NUM_STAGES)
            ),
            **{name: NamedModel(summary=f"found by search; {source}", make=partial(spec, stages)) for name, stages in searched.items()},
        },
        read=read,
        explain=explain,
        supernets={
            "vit_resnas/digits": NamedSupernet(summary="the form of ViT-ResNAS for digits: up to 3 x 3 blocks, 32 px", make=digits),
            "vit_resnas/cifar": NamedSupernet(summary="the form of ViT-ResNAS for CIFAR: up to 3 x 4 blocks, 32 px", make=cifar),
            "vit_resnas/tiny": NamedSupernet(summary=f"0.75 to 3.50 GMACs; {source}", make=partial(published_space, "tiny")),
            "vit_resnas/small": NamedSupernet(summary=f"1.47 to 6.26 GMACs; {source}", make=partial(published_space, "small")),
        },
    )

"""PiT in the search space that Auto-Prox trained networks of.

Rethinking Spatial Dimensions of Vision Transformers (PiT), https://arxiv.org/abs/2103.16302; Auto-Prox: Training-Free Vision
Transformer Architecture Search via Automatic Proxy Discovery, https://arxiv.org/abs/2312.09059.

Three stages, the width of each `base_dim` times its number of heads. Patches of 16 pixels overlap at stride 8, without padding; positions
are learned for the patches of the first grid and added before the class token comes. A depth-wise convolution of stride 2 leads from
stage to stage, and a linear layer takes the class token along; the head reads the class token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from typing import Any

from space.family import Family, family
from space.registry import SpecError
from space.search_space import Axis, Candidate, SearchSpace
from space.spec import ArchSpec, BlockSpec, Component, StageSpec

FIELDS = ("base_dim", "mlp_ratio", "depth", "num_heads")
BASE_DIMS = (16, 24, 32, 40)
MLP_RATIOS = (2, 4, 6, 8)
DEPTHS = ((1, 2, 3), (4, 6, 8), (2, 4, 6))
NUM_HEADS = (2, 4, 8)
NUM_STAGES = len(DEPTHS)
PATCH_SIZE, STRIDE = 16, 8


def spec(arch: Mapping[str, Any], *, num_classes: int, img_size: int = 224) -> ArchSpec:
    """The network of Auto-Prox's notation: numbers `base_dim` and `mlp_ratio`, lists `depth` and `num_heads` with an entry for each stage.

    Raises SpecError naming what is missing or cannot be.
    """
    base_dim, mlp_ratio, depths, heads = _checked(arch)
    stages = []
    for index, (depth, num_heads) in enumerate(zip(depths, heads, strict=True)):
        width = base_dim * num_heads
        block = BlockSpec(
            mixer=Component("attention", num_heads=num_heads, head_dim=base_dim),
            feed_forward=Component("mlp", hidden_dim=int(width * mlp_ratio)),
        )
        downsampling = Component("depthwise_conv") if index < NUM_STAGES - 1 else None
        stages.append(StageSpec(embed_dim=width, blocks=(block,) * depth, downsampling=downsampling))
    return ArchSpec(
        stages=tuple(stages),
        img_size=img_size,
        num_classes=num_classes,
        patch_embed=Component("conv", kernel=PATCH_SIZE, stride=STRIDE, padding=False),
        prefix=Component("class_token"),
        position=Component("learned", covers_prefix=False),
        pooling=Component("class_token"),
    )


def _checked(arch: Mapping[str, Any]) -> tuple[int, float, Sequence[int], Sequence[int]]:
    if missing := [name for name in FIELDS if name not in arch]:
        raise SpecError(f"PiT: {', '.join(missing)} is missing; needed: {', '.join(FIELDS)}")
    if unknown := [name for name in arch if name not in FIELDS]:
        raise SpecError(f"PiT: unknown {', '.join(unknown)}; known: {', '.join(FIELDS)}")
    for name in ("depth", "num_heads"):
        values = arch[name]
        if not isinstance(values, Sequence) or len(values) != NUM_STAGES or any(type(value) is not int or value < 1 for value in values):
            raise SpecError(f"PiT: {name} is {values!r}; a list of {NUM_STAGES} whole numbers above 0 is expected")
    if type(arch["base_dim"]) is not int or arch["base_dim"] < 1:
        raise SpecError(f"PiT: base_dim is {arch['base_dim']!r}; a whole number above 0 is expected")
    if type(arch["mlp_ratio"]) not in (int, float) or not arch["mlp_ratio"] > 0:
        raise SpecError(f"PiT: mlp_ratio is {arch['mlp_ratio']!r}; a number above 0 is expected")
    return arch["base_dim"], arch["mlp_ratio"], arch["depth"], arch["num_heads"]


def pit_space(*, num_classes: int, img_size: int = 224) -> SearchSpace:
    """The networks that can be built: the width of a stage, and so its number of heads, is a multiple of the one before."""
    heads = ["-".join(map(str, chosen)) for chosen in product(NUM_HEADS, repeat=NUM_STAGES) if _is_chain_of_multiples(chosen)]
    axes = [Axis(name="base_dim", choices=BASE_DIMS), Axis(name="mlp_ratio", choices=MLP_RATIOS)]
    axes += [Axis(name=f"depth{stage}", choices=choices) for stage, choices in enumerate(DEPTHS, start=1)]
    axes.append(Axis(name="num_heads", choices=tuple(heads)))

    def decode(params: Mapping[str, Any]) -> Candidate:
        arch = {
            "base_dim": params["base_dim"],
            "mlp_ratio": params["mlp_ratio"],
            "depth": [params[f"depth{stage}"] for stage in range(1, NUM_STAGES + 1)],
            "num_heads": [int(number) for number in params["num_heads"].split("-")],
        }
        return Candidate(model=spec(arch, num_classes=num_classes, img_size=img_size), label=label(arch))

    return SearchSpace(name="pit", axes=tuple(axes), decode=decode)


def _is_chain_of_multiples(numbers: Sequence[int]) -> bool:
    return all(later % earlier == 0 for earlier, later in pairwise(numbers))


def label(arch: Mapping[str, Any]) -> str:
    """`16 r6 2x2h 8x4h 4x4h`: base width and feed-forward ratio, then depth and heads of every stage."""
    stages = " ".join(f"{depth}x{heads}h" for depth, heads in zip(arch["depth"], arch["num_heads"], strict=True))
    return f"{arch['base_dim']} r{arch['mlp_ratio']:g} {stages}"


@family("pit")
def pit() -> Family:
    """PiT: three stages joined by depth-wise convolutions."""
    return Family(spaces={"pit": pit_space}, tables={"pit": spec})

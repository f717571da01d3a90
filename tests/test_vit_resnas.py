"""ViT-ResNAS: the counts of the published networks and spaces, the two components by their definition, sizes of images."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from space import catalog
from space.component import ImageShape, TokenShape
from space.components.vit_resnas import ResidualConvStem, ResidualSpatialReduction
from space.cost import cost
from space.families import vit_resnas
from space.fvcore_count import fvcore_macs
from space.model import build_model, decay_exempt, fit_tensors, resized
from space.registry import SpecError
from space.spec import ArchSpec, Component
from space.vit import VisionTransformer, initialize

PUBLISHED = {
    "vit_resnas_tiny": (40_793_552, 1_782_630_272),
    "vit_resnas_small": (63_724_108, 2_845_501_856),
    "vit_resnas_medium": (96_442_672, 4_513_135_936),
    "vit_res_tiny": (42_012_736, 1_794_378_240),
}
"""Parameters without the patch head and MACs at 224 px, of the released code."""

SMALL = vit_resnas.spec(
    [(16, [(2, 24)]), (24, [(1, 32), (2, 16)]), (40, [(2, 48)])], img_size=32, num_classes=7, head_dims=(4, 6, 8), kernel=2, mid_dim=6
)


def without_values(spec: ArchSpec) -> nn.Module:
    """The network with whatever lies in memory as its weights: to count it takes no values."""
    with torch.device("meta"):
        network = VisionTransformer(spec)
    return network.to_empty(device="cpu")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_have_their_published_counts(name: str):
    spec = catalog.resolve(name)
    counted = cost(spec)
    assert (counted.params, counted.macs) == PUBLISHED[name]
    network = without_values(spec)
    assert sum(parameter.numel() for parameter in network.parameters()) == counted.params
    assert fvcore_macs(network, img_size=224) == counted.fvcore_macs


@pytest.mark.parametrize(
    ("name", "num_networks", "params", "macs", "smallest"),
    [
        ("vit_resnas/tiny", 125 * (28 * 29) ** 9, 84_814_464, 3_497_553_920, 752_489_984),
        ("vit_resnas/small", 125 * (28 * 29) ** 9 * 28**3, 155_318_528, 6_260_342_784, 1_470_482_304),
    ],
)
def test_the_published_spaces_have_their_size_and_range(name: str, num_networks: int, params: int, macs: int, smallest: int):
    """Counts of the released code. Of each stage 5 widths; of each block 4 x 7 choices, and one more where it may be left out."""
    space = catalog.supernet_space(name)
    assert space.num_networks == space.search_space().size == num_networks
    assert f"{space.num_networks:.2e}" == {"vit_resnas/tiny": "1.92e+28", "vit_resnas/small": "4.21e+32"}[name]
    assert (cost(space.largest).params, cost(space.largest).macs) == (params, macs)
    assert space.macs_range == (smallest, macs)


@pytest.mark.parametrize(("space", "name"), [("tiny", "vit_resnas_tiny"), ("small", "vit_resnas_small"), ("small", "vit_resnas_medium")])
def test_the_searched_networks_lie_in_the_space_that_was_searched(space: str, name: str):
    searched = catalog.resolve(name)
    supernet = catalog.supernet_space(f"vit_resnas/{space}")
    words = [
        ",".join([str(width), *(f"{heads}x{hidden}" for heads, hidden in blocks)])
        for width, blocks in {
            "vit_resnas_tiny": vit_resnas.TINY,
            "vit_resnas_small": vit_resnas.SMALL,
            "vit_resnas_medium": vit_resnas.MEDIUM,
        }[name]
    ]
    assert catalog.resolve(f"vit_resnas:{'|'.join(words)}") == searched
    # A searched network of d blocks keeps all blocks that cannot be left out and the first of those that can.
    padded = []
    for word, stage in zip(words, supernet.stages, strict=True):
        width, *blocks = word.split(",")
        num_left_out = len(stage.blocks) - len(blocks)
        places = [number for number, block in enumerate(stage.blocks) if block.is_skippable][-num_left_out:] if num_left_out else []
        rest = iter(blocks)
        padded.append(",".join([width, *("-" if number in places else next(rest) for number in range(len(stage.blocks)))]))
    subnet = supernet.subnet(supernet.read("|".join(padded)))
    assert subnet.arch == searched


@pytest.mark.parametrize(("img_size", "kernel", "grids"), [(32, 2, (8, 4, 2)), (56, 7, (4, 2, 1)), (64, 4, (8, 4, 2)), (112, 7, (8, 4, 2))])
def test_every_stem_stride_and_image_size_that_fits_is_built_as_it_is_counted(img_size: int, kernel: int, grids: tuple[int, ...]):
    spec = replace(resized(SMALL, img_size=img_size), patch_embed=Component("residual_conv_stem", kernel=kernel, mid_dim=6))
    network = build_model(spec, seed=0).eval()
    assert network(torch.zeros(2, 3, img_size, img_size)).shape == (2, 7)
    assert sum(parameter.numel() for parameter in network.parameters()) == cost(spec).params
    assert fvcore_macs(network, img_size) == cost(spec).fvcore_macs
    sides = [network.get_submodule(f"stages.{stage}.downsampling").grid for stage in range(2)]
    assert sides == [(grids[0], grids[0]), (grids[1], grids[1])]


@pytest.mark.parametrize(
    ("model", "img_size", "message"),
    [
        ("vit_resnas_tiny", 225, r"225x225 pixels is not a multiple of the stride 14; nearest img_size: 224 or 280$"),
        ("vit_resnas_tiny", 70, r"the grid 5x5 has an odd side and cannot be halved; nearest img_size: 56 or 112$"),
        ("vit_resnas_tiny", 32, r"32x32 pixels is not a multiple of the stride 14; nearest img_size: 56$"),
    ],
)
def test_an_image_size_that_does_not_fit_is_refused_with_the_nearest(model: str, img_size: int, message: str):
    with pytest.raises(SpecError, match=message):
        cost(resized(catalog.resolve(model), img_size=img_size))
    with pytest.raises(SpecError, match=message):
        catalog.supernet_space("vit_resnas/tiny", img_size=img_size)


def test_another_reason_is_told_without_a_size():
    narrowing = [replace(SMALL.stages[0], embed_dim=32), *SMALL.stages[1:]]
    with pytest.raises(SpecError, match=r"the next width 24 is below the width 32, which the residual keeps$"):
        cost(replace(SMALL, stages=tuple(narrowing)))
    with pytest.raises(SpecError, match=r"5 prefix tokens; the class token alone has a way past the convolution$"):
        cost(replace(SMALL, prefix=Component("class_token", num_registers=4)))


def drawn(module: nn.Module) -> nn.Module:
    initialize(module, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor += torch.rand(tensor.shape, generator=generator)
    return module.eval()


def test_the_stem_is_three_convolutions_with_a_residual_then_patches():
    stem = drawn(ResidualConvStem(ImageShape(3, 8, 8), kernel=2, mid_dim=5, out_dim=4))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))

    def activated(x: torch.Tensor, number: int) -> torch.Tensor:
        conv, norm = stem.get_submodule(f"conv{number}"), stem.get_submodule(f"norm{number}")
        per_channel = [tensor.reshape(1, -1, 1, 1) for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
        mean, variance, weight, bias = per_channel
        return ((conv(x) - mean) / (variance + 1e-5).sqrt() * weight + bias).clamp(min=0)

    first = activated(x, 1)
    summed = activated(activated(first, 2), 3) + first
    assert summed.shape == (2, 5, 4, 4)
    rows = [
        torch.einsum("bcij,ocij->bo", summed[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2], stem.proj.weight) + stem.proj.bias
        for row in range(2)
        for column in range(2)
    ]
    torch.testing.assert_close(stem(x), torch.stack(rows, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_class_token", [True, False])
def test_the_reduction_is_a_strided_convolution_and_a_pooled_residual(has_class_token: bool):
    prefix, width, wider = int(has_class_token), 3, 5
    shape = TokenShape(width, 8, (2, 4), num_prefix=prefix, has_class_token=has_class_token)
    reduction = drawn(ResidualSpatialReduction(shape, out_dim=wider))
    x = torch.randn(1, prefix + 8, width, generator=torch.Generator().manual_seed(2))
    variance = x.var(dim=-1, unbiased=False, keepdim=True)
    normed = (x - x.mean(dim=-1, keepdim=True)) / (variance + 1e-6).sqrt() * reduction.norm.weight + reduction.norm.bias

    expected = []
    for column in range(2):
        conv = reduction.conv.bias + reduction.pos_embed[0, column]
        for i in range(3):
            for j in range(3):
                row_there, column_there = i - 1, 2 * column + j - 1
                if 0 <= row_there < 2 and 0 <= column_there < 4:
                    conv = conv + reduction.conv.weight[:, :, i, j] @ normed[0, prefix + 4 * row_there + column_there]
        square = [prefix + 4 * i + 2 * column + j for i in range(2) for j in range(2)]
        expected.append(conv + torch.cat([x[0, square].mean(dim=0), torch.zeros(wider - width)]))
    if has_class_token:
        token = reduction.class_proj.weight @ normed[0, 0] + reduction.class_proj.bias + torch.cat([x[0, 0], torch.zeros(wider - width)])
        expected.insert(0, token)
    torch.testing.assert_close(reduction(x)[0], torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_positions_of_every_reduction_follow_the_size_of_the_images():
    stored, larger = SMALL, resized(SMALL, img_size=64)
    tensors = build_model(stored, seed=0).state_dict()
    fitted = fit_tensors(larger, tensors, stored)
    assert list(fitted.changes) == [
        "positions resampled (65 tokens to 257)",
        "positions resampled (16 tokens to 64)",
        "positions resampled (4 tokens to 16)",
    ]
    network = build_model(larger, seed=1)
    network.load_state_dict(fitted.tensors)
    for stage, side in ((0, 4), (1, 2)):
        name = f"stages.{stage}.downsampling.pos_embed"
        small, large = (each[name][0].unflatten(0, (-1, factor * side)) for each, factor in ((tensors, 1), (fitted.tensors, 2)))
        assert large.shape[:2] == (2 * side, 2 * side)
        torch.testing.assert_close(large.mean(dim=(0, 1)), small.mean(dim=(0, 1)), rtol=0, atol=0.02)
        assert not torch.equal(large, small.repeat(2, 2, 1))


def test_positions_take_no_weight_decay():
    exempt = decay_exempt(build_model(SMALL, seed=0))
    assert {"position.pos_embed", "stages.0.downsampling.pos_embed", "stages.1.downsampling.pos_embed"} <= exempt
    assert "patch_embed.conv1.weight" not in exempt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("176,3x704|352,10x1408", "has 2 stages between bars; 3 are needed"),
        ("176,3x704|352|704,10x2560", "stage 2 is '352'; its blocks are expected behind the width"),
        ("176,3x704|352,-|704,10x2560", "block 1 of stage 2 is not HEADSxHIDDEN"),
        ("176,3x70.5|352,3x8|704,10x2560", "block 1 of stage 1 is not HEADSxHIDDEN"),
        ("176,3x704|0,3x8|704,10x2560", "width of stage 2 is '0'; a whole number above 0"),
        ("176,3y704|352,3x8|704,10x2560", "block 1 of stage 1 is '3y704'; allowed: numbers with x between them"),
    ],
)
def test_a_string_with_a_wrong_field_is_refused(text: str, message: str):
    with pytest.raises(SpecError, match=message):
        catalog.resolve(f"vit_resnas:{text}")


def test_a_string_is_explained_stage_by_stage():
    lines = catalog.explanation("vit_resnas:176,3x704,4x576|352,10x1408|704,10x2560")
    assert lines[1] == "stage 1: 176 wide, blocks: 2, heads of 32 channels"
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("name", ["vit_resnas/digits", "vit_resnas/cifar"])
def test_the_spaces_for_small_images_have_the_published_form(name: str):
    space = catalog.supernet_space(name)
    assert [stage.widths[0] / space.stages[0].widths[0] for stage in space.stages] == [1, 2, 4]
    assert all([block.is_skippable for block in stage.blocks][:3] == [False, True, False] for stage in space.stages)
    low, high = space.macs_range
    assert high / low > math.sqrt(10)
    assert cost(space.subnet(space.smallest_point)).macs == low

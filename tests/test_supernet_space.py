"""Spaces of supernets as values: points and subnets, notation, JSON, counts; what cannot be a space is refused."""

from __future__ import annotations

import json
import pickle
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space import catalog
from space.cost import cost
from space.families import autoformer, vit_resnas
from space.layout import layout
from space.registry import SpecError
from space.search_space import SearchSpace
from space.spec import ArchSpec, BlockSpec, Component, StageSpec
from space.supernet_space import BlockChoices, StageChoices, SupernetSpace

BLOCK = BlockChoices(mixer={"num_heads": (2, 1)}, feed_forward={"hidden_dim": (24, 16)})
SKIPPABLE = replace(BLOCK, is_skippable=True)


def plain(width: int, num_blocks: int, *, num_heads: int = 2, hidden_dim: int = 24, position: str = "learned") -> ArchSpec:
    block = BlockSpec(mixer=Component("attention", num_heads=num_heads, head_dim=4), feed_forward=Component("mlp", hidden_dim=hidden_dim))
    return ArchSpec(
        stages=(StageSpec(embed_dim=width, blocks=(block,) * num_blocks),),
        img_size=16,
        num_classes=5,
        patch_embed=Component("conv", kernel=8, stride=8),
        position=Component(position),
        pooling=Component("mean"),
    )


TINY = SupernetSpace(name="tiny", largest=plain(12, 2), stages=(StageChoices(widths=(12, 8), blocks=(BLOCK, SKIPPABLE)),))
DEEP = SupernetSpace(
    name="deep",
    largest=plain(12, 3, hidden_dim=36),
    stages=(
        StageChoices(
            widths=(12, 10), blocks=(BlockChoices(mixer={"num_heads": (2, 1)}, feed_forward={"hidden_dim": (3.0, 1.5)}),) * 3, depths=(3, 1)
        ),
    ),
)
SPACES = {"tiny": TINY, "deep": DEEP, **{name: catalog.supernet_space(name) for name in ("vit_resnas/digits", "autoformer_cream/tiny")}}
EVERY_SPACE = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


def drawn(space: SupernetSpace, seed: int) -> dict[str, Any]:
    chosen = random.Random(seed)
    return {axis.name: chosen.choice(list(axis.choices)) for axis in space.axes}  # type: ignore[arg-type]


@EVERY_SPACE
@given(seed=st.integers(0, 2**32))
def test_a_point_a_subnet_and_its_notation_are_one_thing(space: SupernetSpace, seed: int):
    genes = drawn(space, seed)
    subnet, point = space.subnet(genes), space.canonical(genes)
    assert space.point(subnet) == point
    assert space.subnet(point) == subnet
    assert space.read(space.label(genes)) == point
    space.search_space().check(point)
    candidate = space.search_space().decode(point)
    assert (candidate.model, candidate.label) == (subnet, space.label(point))
    low, high = space.macs_range
    assert low <= cost(subnet).macs <= high


@EVERY_SPACE
@given(seed=st.integers(0, 2**32))
def test_genes_of_a_block_that_is_left_out_change_nothing(space: SupernetSpace, seed: int):
    genes = drawn(space, seed)
    point = space.canonical(genes)
    other = drawn(space, seed + 1) | point
    assert space.canonical(other) == point
    assert space.subnet(other).digest == space.subnet(genes).digest


@pytest.mark.parametrize("space", [TINY, DEEP], ids=["tiny", "deep"])
def test_the_number_of_networks_is_that_of_all_points(space: SupernetSpace):
    subnets = {space.subnet(point) for point in space.search_space().points()}
    assert len(subnets) == len({subnet.digest for subnet in subnets}) == space.num_networks == space.search_space().size


def test_the_points_of_a_small_space_are_those_on_paper():
    assert TINY.num_networks == 2 * 4 * (4 + 1)
    assert DEEP.num_networks == 2 * (4 + 4**3)
    assert [axis.name for axis in TINY.axes] == [
        *("embed_dim1", "num_heads1_1", "hidden_dim1_1", "keep1_2", "num_heads1_2", "hidden_dim1_2")
    ]
    assert TINY.label({"embed_dim1": 8, "num_heads1_1": 2, "hidden_dim1_1": 16, "keep1_2": False}) == "8,2x16,-"
    short = DEEP.subnet(DEEP.read("10,1x1.5"))
    assert short.arch == plain(10, 1, num_heads=1, hidden_dim=15)
    assert short.kept == ((0,),)
    dropped = SPACES["vit_resnas/digits"].read("24,1x96,-,2x48|32,1x96,-,1x96|128,1x384,4x192,1x192")
    assert SPACES["vit_resnas/digits"].subnet(dropped).kept == ((0, 2), (0, 2), (0, 1, 2))


@EVERY_SPACE
def test_the_first_and_the_last_choices_are_the_largest_and_the_smallest_network(space: SupernetSpace):
    assert space.largest_point == space.search_space().first_point()
    largest = space.subnet(space.largest_point)
    assert (largest.arch, largest.kept) == (space.largest, tuple(tuple(range(len(stage.blocks))) for stage in space.largest.stages))
    assert space.macs_range == (cost(space.subnet(space.smallest_point)).macs, cost(space.largest).macs)
    for axis in space.axes:
        assert all(later < earlier for earlier, later in pairwise(list(axis.choices)))  # type: ignore[arg-type]


@EVERY_SPACE
def test_a_space_survives_json_and_pickling(space: SupernetSpace):
    written = json.loads(json.dumps(space.to_json()))
    for again in (SupernetSpace.from_json(written), pickle.loads(pickle.dumps(space))):
        assert again == space
        assert again.digest == space.digest
        assert hash(again) == hash(space)
        assert again.axes == space.axes


def test_the_order_of_values_makes_no_other_space():
    block = BlockChoices(mixer={"num_heads": (1, 2)}, feed_forward={"hidden_dim": (16, 24)})
    again = SupernetSpace(
        name="tiny",
        largest=plain(12, 2),
        stages=(StageChoices(widths=(8, 12), blocks=(block, replace(block, is_skippable=True))),),
    )
    assert again == TINY
    assert again.digest == TINY.digest


def test_the_digest_never_changes():
    assert (TINY.digest, DEEP.digest) == GOLDEN_DIGESTS


GOLDEN_DIGESTS = ("8f3ab2da366d55be", "d52caae5688c8227")
"""As first released: checkpoints of supernets name their space by it."""


def test_a_dimension_with_one_choice_is_no_axis():
    block = BlockChoices(feed_forward={"hidden_dim": (24,)})
    space = SupernetSpace(name="fixed", largest=plain(12, 1), stages=(StageChoices(widths=(12,), blocks=(block,)),))
    assert space.axes == ()
    assert space.num_networks == 1
    assert space.subnet({}).arch == space.largest
    assert space.read(space.label({})) == {}


def test_a_block_without_choices_has_a_sign():
    space = replace(TINY, stages=(StageChoices(widths=(12, 8), blocks=(BLOCK, BlockChoices(is_skippable=True))),))
    point = {"embed_dim1": 8, "num_heads1_1": 2, "hidden_dim1_1": 16, "keep1_2": True}
    assert space.label(point) == "8,2x16,+"
    assert space.read("8,2x16,+") == point


@given(seed=st.integers(0, 2**32))
def test_the_subnets_of_autoformer_are_the_networks_of_its_space(seed: int):
    supernet = SPACES["autoformer_cream/tiny"]
    own: SearchSpace = catalog.spaces()["autoformer_cream/tiny"](img_size=224, num_classes=1000)
    assert supernet.num_networks == own.size
    chosen = random.Random(seed)
    point = {axis.name: chosen.choice(list(axis.choices)) for axis in own.axes}  # type: ignore[arg-type]
    genes = {"embed_dim1": point["hidden_dim"], "depth1": point["depth"]}
    for block in range(1, 15):
        genes |= {f"num_heads1_{block}": point[f"num_heads{block}"], f"hidden_dim1_{block}": point[f"mlp_ratio{block}"]}
    assert supernet.subnet(genes).arch == own.decode(point).model


def test_every_size_of_autoformer_has_a_supernet():
    for size in autoformer.CREAM:
        space = catalog.supernet_space(f"autoformer_cream/{size}")
        assert space.num_networks == catalog.spaces()[space.name](img_size=224, num_classes=1000).size


@pytest.mark.parametrize("name", catalog.supernets())
def test_a_named_supernet_has_a_line_and_the_classes_it_is_asked_for(name: str):
    assert catalog.supernets()[name].summary
    space = catalog.supernet_space(name, num_classes=7)
    assert space.name == name
    assert space.largest.num_classes == space.subnet(space.smallest_point).num_classes == 7
    assert replace(space.largest, num_classes=catalog.supernet_space(name).largest.num_classes) == catalog.supernet_space(name).largest


def test_a_space_of_a_users_own_is_a_file(tmp_path: Path):
    (tmp_path / "mine.json").write_text(json.dumps(TINY.to_json()))
    path = str(tmp_path / "mine.json")
    assert catalog.supernet_space(path) == TINY
    larger = catalog.supernet_space(path, img_size=32, num_classes=3)
    assert (larger.largest.img_size, larger.largest.num_classes, larger.stages) == (32, 3, TINY.stages)
    with pytest.raises(SpecError, match=r"20x20 pixels is not a multiple of the stride 8; nearest img_size: 16 or 24"):
        catalog.supernet_space(path, img_size=20)
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(SpecError, match=r"mine.json: space lacks name, largest, stages"):
        catalog.supernet_space(path)
    with pytest.raises(SpecError, match="unknown supernet space 'vit_resnas/digit'; did you mean 'vit_resnas/digits'"):
        catalog.supernet_space("vit_resnas/digit")


def test_a_subnet_is_named_by_its_space_and_string():
    name = "vit_resnas/digits:24,1x96,-,2x48|32,1x96,-,1x96|128,1x384,4x192,1x192"
    space = SPACES["vit_resnas/digits"]
    assert catalog.resolve(name) == space.subnet(space.read(name.partition(":")[2]))
    explained = catalog.explanation(name)
    assert explained[1] == "1: 24 wide, 2 of 3 blocks; chosen in each: num_heads x hidden_dim"
    assert all(len(line) <= 80 for line in explained)


def changed(space: SupernetSpace, **changes: Any) -> dict[str, Any]:
    """The JSON of the space with changes to its first stage, or under `block` to that stage's first block."""
    data = space.to_json()
    first = data["stages"][0]
    first["blocks"][0] |= changes.pop("block", {})
    first |= changes
    return data


WRONG = {
    "no values": (changed(TINY, widths=[]), r"space.stages\[0\]: widths is \[\]; a list of at least one value"),
    "twice": (changed(TINY, widths=[12, 8, 8]), r"widths is \[12, 8, 8\]; a value stands there twice"),
    "not whole": (changed(TINY, widths=[12, 8.5]), r"widths is \[12, 8.5\]; allowed: whole numbers above 0"),
    "not above 0": (changed(TINY, block={"mixer": {"num_heads": [2, 0]}}), r"blocks\[0\]: mixer num_heads is \[2, 0\]; allowed: "),
    "no list": (changed(TINY, block={"mixer": {"num_heads": 2}}), r"mixer num_heads is 2; a list of at least one value"),
    "no table": (changed(TINY, block={"mixer": [2]}), r"mixer is \[2\]; the values of each choice by its name"),
    "no truth": (changed(TINY, block={"is_skippable": 1}), r"is_skippable is 1; allowed: true, false"),
    "unknown field": (changed(TINY, block={"mixr": {}}), r"unknown field 'mixr' in space.stages\[0\].blocks\[0\]; did you mean 'mixer'"),
    "unknown choice": (
        changed(TINY, block={"mixer": {"heads": [2]}}),
        r"mixer 'attention' has no whole-number choice 'heads'; it has: num_heads, head_dim",
    ),
    "above the largest": (
        changed(TINY, widths=[16, 12]),
        r"stages\[0\]: the largest of widths is 16; it must be the largest network's, 12",
    ),
    "below the largest": (
        changed(TINY, block={"feed_forward": {"hidden_dim": [20, 16]}}),
        r"stages\[0\].blocks\[0\]: feed_forward 'mlp': the largest hidden_dim is 20; it must be the largest network's, 24",
    ),
    "equal after rounding": (
        changed(DEEP, block={"feed_forward": {"hidden_dim": [3.0, 1.55, 1.5]}}),
        r"hidden_dim \[3.0, 1.55, 1.5\] is \[36, 18, 18\] at width 12; distinct sizes are needed",
    ),
    "number of blocks": (changed(TINY, blocks=[{}]), r"stages\[0\]: 1 blocks of choices; the largest network has 2 there"),
    "every block skippable": (changed(TINY, block={"is_skippable": True}), r"every block is skippable; a stage needs a block that stays"),
    "two ways": (changed(TINY, depths=[2, 1]), r"depths beside skippable blocks; a stage has one way to lose blocks"),
    "depth above": (changed(DEEP, depths=[4, 3]), r"depths has 4 as the largest; it must be the number of blocks, 3"),
    "no stages": (TINY.to_json() | {"stages": []}, r"0 stages of choices; the largest network has 1"),
    "stages no list": (TINY.to_json() | {"stages": 3}, r"space.stages is 3; a list is expected"),
    "no network": (TINY.to_json() | {"largest": 3}, r"space.largest: not the JSON of an architecture"),
    "no name": (TINY.to_json() | {"name": ""}, r"space.name is ''; a name is expected"),
}


@pytest.mark.parametrize(("data", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_space_is_refused(data: dict[str, Any], message: str):
    with pytest.raises(SpecError, match=message):
        SupernetSpace.from_json(data)


def test_a_width_that_a_component_cannot_slice_names_the_component():
    largest = plain(12, 1, position="sincos")
    choices = StageChoices(widths=(12, 10), blocks=(BLOCK,))
    with pytest.raises(SpecError, match=r"stages\[0\]: width 10: position: position 'sincos': the width 10 is not a multiple of 4"):
        SupernetSpace(name="sincos", largest=largest, stages=(choices,))
    first, *rest = vit_resnas.published_space("tiny").stages
    narrowing = replace(rest[0], widths=(512, 240))
    with pytest.raises(
        SpecError, match=r"stages\[0\]: width 256: .*'residual_spatial_reduction': the next width 240 is below the width 256"
    ):
        SupernetSpace(name="narrowing", largest=vit_resnas.published_space("tiny").largest, stages=(first, narrowing, rest[1]))


def test_a_choice_whose_tensors_have_other_entries_cannot_be_searched():
    block = BlockSpec(mixer=Component("relative_attention", num_heads=2, head_dim=4), feed_forward=Component("mlp", hidden_dim=24))
    largest = replace(plain(12, 1), stages=(StageSpec(embed_dim=12, blocks=(block,)),))
    choices = StageChoices(widths=(12,), blocks=(BlockChoices(mixer={"max_distance": (14, 7)}),))
    with pytest.raises(SpecError, match=r"stages\[0\].blocks\[0\]: mixer 'relative_attention': max_distance cannot be chosen"):
        SupernetSpace(name="distances", largest=largest, stages=(choices,))


def test_a_choice_that_a_component_cannot_take_names_it():
    windows = replace(plain(12, 1), img_size=32, pooling=Component("mean"))
    block = BlockSpec(mixer=Component("window_attention", num_heads=2, head_dim=4, splits=4), feed_forward=Component("mlp", hidden_dim=24))
    largest = replace(windows, stages=(StageSpec(embed_dim=12, blocks=(block,)),))
    choices = StageChoices(widths=(12,), blocks=(BlockChoices(mixer={"splits": (4, 3)}),))
    with pytest.raises(SpecError, match=r"stages\[0\]: width 12: splits 3: .*window_attention"):
        SupernetSpace(name="windows", largest=largest, stages=(choices,))


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        ({"embed_dim1": 9}, "embed_dim1 is 9; allowed: 12, 8"),
        ({"keep1_2": None}, "keep1_2 is None; allowed: True, False"),
        ({"embed_dim2": 8}, "unknown axis 'embed_dim2' in space 'tiny'; did you mean 'embed_dim1'"),
    ],
)
def test_what_is_no_point_is_refused(genes: dict[str, Any], message: str):
    with pytest.raises(SpecError, match=message):
        TINY.subnet(TINY.largest_point | genes)
    with pytest.raises(SpecError, match="num_heads1_1 is None"):
        TINY.subnet({"embed_dim1": 8})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8,2x16", "stage 1 has 1 blocks; allowed: 2"),
        ("8,2x16,-|8,2x16,-", "has 2 stages between bars; 1 are needed"),
        ("9,2x16,-", "width of stage 1 is 9; allowed: 12, 8"),
        ("8,-,2x16", "block 1 of stage 1 is '-'; it cannot be left out"),
        ("8,2x17,-", "block 1 of stage 1: hidden_dim is 17; allowed: 24, 16"),
        ("8,2,-", "block 1 of stage 1 is '2'; num_headsxhidden_dim is expected"),
        ("8,2x16,?", r"block 2 of stage 1 is '\?'; allowed: numbers with x between them"),
    ],
)
def test_a_string_of_no_subnet_is_refused(text: str, message: str):
    with pytest.raises(SpecError, match=message):
        TINY.read(text)


def test_a_subnet_of_another_space_has_no_point():
    other = replace(TINY, stages=(replace(TINY.stages[0], widths=(12, 9)),))
    subnet = other.subnet(other.largest_point | {"embed_dim1": 9})
    with pytest.raises(SpecError, match="embed_dim1 is 9; allowed: 12, 8"):
        TINY.point(subnet)
    with pytest.raises(SpecError, match="cut out of another network than the largest of space 'tiny'"):
        TINY.point(DEEP.subnet(DEEP.largest_point))
    arch = plain(8, 2)
    block = replace(arch.stages[0].blocks[0], mixer=Component("attention", num_heads=2, head_dim=2))
    narrow_heads = replace(subnet, arch=replace(arch, stages=(replace(arch.stages[0], blocks=(block,) * 2),)))
    with pytest.raises(SpecError, match="differs from every network of space 'tiny'"):
        TINY.point(narrow_heads)


def test_a_space_that_is_valid_is_valid_at_every_point():
    """What is checked at the declaration, pairs of widths and single values, is enough for every combination drawn here."""
    space = SPACES["vit_resnas/digits"]
    for seed in range(30):
        assert layout(space.subnet(drawn(space, seed)).arch)

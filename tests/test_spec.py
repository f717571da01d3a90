"""Specs: canonical, named by a digest, alive through JSON, and refused with the reason."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space.cost import cost, cost_by_part
from space.registry import SpecError
from space.spec import ArchSpec, BlockSpec, Component, StageSpec, canonical, read_spec, with_img_size


def block(**heads) -> BlockSpec:
    return BlockSpec(mixer=Component("attention", **{"num_heads": 2, "head_dim": 8} | heads), feed_forward=Component("mlp", hidden_dim=32))


def tiny(**changes) -> ArchSpec:
    given_parts = {
        "stages": (StageSpec(embed_dim=16, blocks=(block(), block())),),
        "img_size": 32,
        "num_classes": 10,
        "patch_embed": Component("conv", kernel=8, stride=8),
        "prefix": Component("class_token"),
        "position": Component("learned"),
        "pooling": Component("class_token"),
    }
    return ArchSpec(**given_parts | changes)


WITH_GRID = tiny(
    stages=(
        StageSpec(
            embed_dim=16,
            blocks=(
                BlockSpec(
                    mixer=Component("window_attention", num_heads=2, head_dim=8, splits=2), feed_forward=Component("mlp", hidden_dim=32)
                ),
            ),
            downsampling=Component("patch_merging", kernel=3),
        ),
        StageSpec(embed_dim=32, blocks=(block(head_dim=3),)),
    ),
    prefix=None,
    position=Component("sincos"),
    pooling=Component("gem"),
    head=Component("tanh_mlp"),
)

mixers = st.builds(
    lambda heads, dim, bias: Component("attention", num_heads=heads, head_dim=dim, qkv_bias=bias),
    st.integers(1, 64),
    st.integers(1, 256),
    st.booleans(),
)
blocks = st.builds(
    lambda mixer, hidden: BlockSpec(mixer=mixer, feed_forward=Component("mlp", hidden_dim=hidden)), mixers, st.integers(1, 5000)
)
specs = st.builds(
    lambda width, blocks, registers, position, pooling, head, norm, classes: tiny(
        stages=(StageSpec(embed_dim=4 * width, blocks=tuple(blocks)),),
        num_classes=classes,
        prefix=Component("class_token", num_registers=registers),
        position=position,
        pooling=pooling,
        head=Component(head),
        norm=Component("layer_norm", eps=norm),
    ),
    st.integers(1, 64),
    st.lists(blocks, min_size=1, max_size=4),
    st.integers(0, 8),
    st.sampled_from([None, Component("learned"), Component("sincos")]),
    st.one_of(
        st.sampled_from([Component("class_token"), Component("mean"), Component("max")]),
        st.builds(lambda p, learned: Component("gem", p=p, learned=learned), st.floats(0.5, 10), st.booleans()),
        st.builds(lambda groups, learned: Component("ggem", groups=groups, learned=learned), st.sampled_from([1, 2, 4]), st.booleans()),
    ),
    st.sampled_from(["linear", "tanh_mlp"]),
    st.floats(1e-8, 1e-3),
    st.integers(1, 1000),
)


@given(specs)
def test_json_gives_the_same_spec(spec: ArchSpec):
    again = ArchSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.digest == spec.digest


@given(specs, specs)
def test_digests_are_equal_exactly_where_specs_are(one: ArchSpec, other: ArchSpec):
    assert (one == other) == (one.digest == other.digest)


@given(specs)
def test_parts_add_up_to_the_whole(spec: ArchSpec):
    parts = cost_by_part(spec).values()
    assert tuple(map(sum, zip(*parts, strict=True))) == tuple(cost(spec))


@given(specs)
def test_canonical_parts_stay_as_they_are(spec: ArchSpec):
    assert canonical("pooling", spec.pooling) == spec.pooling
    assert all(canonical("mixer", block.mixer) == block.mixer for stage in spec.stages for block in stage.blocks)


def test_a_default_is_part_of_the_name():
    assert tiny(norm=Component("layer_norm", eps=1e-6)) == tiny()
    assert tiny(prefix=Component("class_token", num_registers=0)).digest == tiny().digest
    assert tiny(norm=Component("layer_norm", eps=1e-5)).digest != tiny().digest
    assert "norm" not in tiny().to_json()


def test_parts_without_effect_are_normalised_away():
    split_once = Component("window_attention", num_heads=2, head_dim=8, splits=1)
    assert canonical("mixer", split_once) == Component("attention", num_heads=2, head_dim=8)
    assert canonical("pooling", Component("ggem", groups=1, p=3.0)) == Component("gem")
    assert canonical("pooling", Component("ggem", groups=4, learned=False)) == Component("gem", learned=False)


def test_a_whole_number_given_for_a_fraction_is_that_fraction():
    assert canonical("pooling", Component("gem", p=2)) == Component("gem", p=2.0)
    assert type(canonical("pooling", Component("gem", p=2)).choices["p"]) is float


def test_the_digest_never_changes():
    assert [tiny().digest, WITH_GRID.digest] == GOLDEN_DIGESTS


GOLDEN_DIGESTS = ["2033d5db196ea5b6", "9831e7412659ef39"]
"""As first released: Optuna, MLflow and CSV files name networks by them."""


def test_pickles_and_copies_are_equal_also_in_another_process(tmp_path: Path):
    assert pickle.loads(pickle.dumps(WITH_GRID)) == copy.deepcopy(WITH_GRID) == WITH_GRID
    file = tmp_path / "spec.pickle"
    file.write_bytes(pickle.dumps(WITH_GRID))
    code = (
        "import pickle, sys, pathlib; spec = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes());"
        "print({spec: spec.digest}[type(spec).from_json(spec.to_json())])"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == WITH_GRID.digest


def test_the_image_size_alone_can_change():
    assert with_img_size(tiny(), 64) == tiny(img_size=64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: block(num_head=3), r"unknown choice 'num_head' in mixer 'attention'; did you mean 'num_heads'.*head_dim"),
        (lambda: block(num_heads=0), r"mixer 'attention': num_heads is 0; allowed: int, above 0"),
        (lambda: block(num_heads=True), r"num_heads is True; allowed: int"),
        (lambda: block(num_heads=2.0), r"num_heads is 2.0; allowed: int"),
        (lambda: canonical("mixer", Component("attention", num_heads=2)), "mixer 'attention' needs a value for 'head_dim'"),
        (lambda: tiny(pooling=Component("meen")), r"unknown pooling 'meen'; did you mean 'mean'"),
        (lambda: tiny(pooling=None), "pooling is missing; registered: .*mean"),
        (lambda: tiny(pooling=Component("gem", p=float("inf"))), "p is inf; allowed: float, above 0"),
        (lambda: tiny(pooling=Component("gem", p=float("nan"))), "p is nan"),
        (lambda: tiny(pooling=Component("gem", p=0.005)), "p is 0.005; allowed: float, above 0.01"),
        (lambda: tiny(img_size=0), "img_size is 0; a whole number above 0"),
        (lambda: tiny(img_size=32.0), "img_size is 32.0"),
        (lambda: tiny(stages=()), "at least one stage"),
        (lambda: StageSpec(embed_dim=16, blocks=()), "at least one block"),
        (lambda: tiny(stages=WITH_GRID.stages[:1]), r"stages\[0\]: every stage but the last needs a downsampling"),
        (lambda: tiny(stages=tiny().stages * 2), r"stages\[0\]: every stage but the last needs a downsampling"),
        (lambda: cost(tiny(img_size=36)), "patch_embed: patch_embed 'conv': an image of 36x36 pixels is not a multiple of the stride 8"),
        (lambda: cost(tiny(prefix=None)), "pooling: pooling 'class_token' needs a class token; add the prefix"),
        (lambda: cost(tiny(stages=WITH_GRID.stages)), r"stages.0.blocks.0.mixer: .* 1 prefix tokens belong to no window"),
        (lambda: cost(with_img_size(WITH_GRID, 40)), r"mixer 'window_attention': splits is 2, which does not divide the grid 5x5"),
        (lambda: cost(tiny(pooling=Component("ggem", groups=3))), "pooling 'ggem': 3 groups do not divide the width 16"),
    ],
)  # fmt: skip
def test_an_error_names_the_field_and_what_is_allowed(make, message: str):
    with pytest.raises(SpecError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(stages=3), "spec.stages is 3; a list is expected"),
        (lambda data: data.update(stages=[None]), r"spec.stages\[0\] is None; an object is expected"),
        (lambda data: data.update(pool=["mean"]), "unknown field 'pool' in spec; did you mean 'pooling'"),
        (lambda data: data.pop("num_classes"), "spec lacks num_classes"),
        (lambda data: data.update(patch_embed=None), "spec: patch_embed is missing"),
        (lambda data: data.update(pooling="mean"), "spec.pooling is 'mean'; a component is written"),
        (lambda data: data.update(pooling=["gem", {"p": [3]}]), "spec.pooling is .*; a component is written"),
        (lambda data: data.update(num_classes="10"), "spec: num_classes is '10'"),
        (lambda data: data["stages"][0]["blocks"][1].update(mixer=["attention", {"num_heads": -1}]), r"stages\[0\].blocks\[1\]: mixer"),
        (lambda data: data.update(model="timm"), 'an object with "model": "arch" is expected'),
    ],
)  # fmt: skip
def test_an_error_in_json_names_its_place(change, message: str):
    data = tiny().to_json()
    change(data)
    with pytest.raises(SpecError, match=message):
        ArchSpec.from_json(data)


def test_a_spec_file_is_read_and_its_faults_name_the_file(tmp_path: Path):
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(WITH_GRID.to_json()))
    assert read_spec(file) == WITH_GRID
    file.write_text("{")
    with pytest.raises(SpecError, match=r"spec.json: "):
        read_spec(file)
    with pytest.raises(SpecError, match=r"absent.json: "):
        read_spec(tmp_path / "absent.json")


def test_a_component_of_another_process_is_found_among_those_of_this_one():
    """Hashes of strings differ from process to process, and a component keeps its own."""
    code = "import pickle; from space.spec import Component; print(pickle.dumps(Component('mlp', hidden_dim=8)).hex())"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert pickle.loads(bytes.fromhex(done.stdout)) in {Component("mlp", hidden_dim=8)}

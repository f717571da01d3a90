"""A timm model as a value: its JSON, its weights, its counts, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from space.cost import cost, cost_by_part
from space.fvcore_count import fvcore_macs
from space.model import build_model, depth_of
from space.registry import SpecError
from space.timm_spec import TimmSpec

CONVNEXT = TimmSpec(name="convnext_atto", img_size=32, num_classes=10, options=(("patch_size", 2),))
TINY_VIT = TimmSpec(
    name="vit_tiny_patch16_224", img_size=32, num_classes=5, in_chans=1, options=(("embed_dim", 24), ("depth", 2), ("num_heads", 2))
)

scalars = st.one_of(st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=4))
specs = st.builds(
    lambda name, size, chans, classes, options: TimmSpec(
        name=name, img_size=size, in_chans=chans, num_classes=classes, options=tuple(options.items())
    ),
    st.text(min_size=1, max_size=9),
    st.integers(1, 999),
    st.integers(1, 5),
    st.integers(1, 999),
    st.dictionaries(st.text(min_size=1, max_size=4), scalars, max_size=3),
)


@given(specs)
def test_json_and_pickle_give_the_same_spec(spec: TimmSpec):
    again = TimmSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec == pickle.loads(pickle.dumps(spec))
    assert again.digest == spec.digest


def test_the_order_of_options_names_no_other_network():
    turned = TimmSpec(name="x", img_size=8, num_classes=2, options=(("b", 1), ("a", 2)))
    assert turned == TimmSpec(name="x", img_size=8, num_classes=2, options=(("a", 2), ("b", 1)))
    assert turned.options == (("a", 2), ("b", 1))


def test_the_digest_never_changes():
    assert [CONVNEXT.digest, TINY_VIT.digest] == GOLDEN_DIGESTS


GOLDEN_DIGESTS = ["3a58e2b88290f56f", "4ece59d807722b5b"]
"""As first released: Optuna, MLflow and CSV files name networks by them."""


def test_a_spec_is_written_and_read_without_torch_or_timm():
    code = (
        "import sys; from space.model import model_from_json;"
        f"print(model_from_json({CONVNEXT.to_json()!r}).digest, 'torch' in sys.modules, 'timm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [CONVNEXT.digest, "False", "False"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name is ''; the name of a timm model"),
        ({"img_size": 0}, "img_size is 0; a whole number above 0"),
        ({"num_classes": True}, "num_classes is True"),
        ({"options": (("pretrained", True),)}, "options: 'pretrained' cannot be an option"),
        ({"options": (("img_size", 8),)}, "options: 'img_size' cannot be an option"),
        ({"options": (("dims", (1, 2)),)}, r"options: \('dims', \(1, 2\)\) is not a pair"),
        ({"options": ("ab",)}, "options: 'ab' is not a pair"),
        ({"options": (("a", 1), ("a", 2))}, "options: a is given twice"),
    ],
)
def test_an_error_names_the_field_and_what_is_allowed(changes: dict, message: str):
    with pytest.raises(SpecError, match=message):
        TimmSpec(**{"name": "convnext_atto", "img_size": 32, "num_classes": 10} | changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("name"), "spec lacks name"),
        (lambda data: data.update(img_sise=3), "unknown field 'img_sise' in spec; did you mean 'img_size'"),
        (lambda data: data.update(options=[1]), r"spec.options is \[1\]; an object is expected"),
        (lambda data: data.update(options={"a": None}), r"spec: options: \('a', None\)"),
        (lambda data: data.update(model="arch"), 'an object with "model": "timm" is expected'),
    ],
)
def test_an_error_in_json_names_its_place(change, message: str):
    data = CONVNEXT.to_json()
    change(data)
    with pytest.raises(SpecError, match=message):
        TimmSpec.from_json(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "convnext_ato"}, "unknown timm model 'convnext_ato'; did you mean 'convnext_atto'"),
        ({"name": "convnext_atto.d2_in1k"}, "unknown timm model 'convnext_atto.d2_in1k'; did you mean 'convnext_atto'"),
        ({"name": "hf-hub:nobody/nothing"}, "unknown timm model"),
        ({"options": (("patchsize", 2),)}, "timm model 'convnext_atto' cannot be built: it has no option 'patchsize'"),
        ({"options": (("kernel_sizes", "big"),)}, r"cannot be built: .*options: \{'kernel_sizes': 'big'\}"),
        ({"name": "inception_v3", "options": (), "img_size": 32}, "takes no image of 32 pixels: .*size"),
        ({"name": "test_vit", "options": (("global_pool", ""),), "img_size": 160}, "puts out no logits for 10 classes"),
    ],
)
def test_what_timm_cannot_build_is_refused_with_the_reason(changes: dict, message: str):
    fields = {"name": "convnext_atto", "img_size": 32, "num_classes": 10, "options": (("patch_size", 2),)}
    with pytest.raises(SpecError, match=message):
        cost(TimmSpec(**fields | changes))


def test_a_model_without_drop_path_is_built_only_without():
    plain = TimmSpec(name="repvit_m1", img_size=32, num_classes=4)
    build_model(plain, seed=0)
    with pytest.raises(SpecError, match="'repvit_m1' cannot be built: it has no drop path; allowed: drop_path 0"):
        build_model(plain, seed=0, drop_path=0.1)


@pytest.mark.parametrize("spec", [CONVNEXT, TINY_VIT], ids=lambda spec: spec.name)
def test_the_network_is_that_of_timm_at_the_asked_size(spec: TimmSpec):
    import timm

    size = {} if spec.name.startswith("convnext") else {"img_size": spec.img_size}
    options = {**dict(spec.options), **size}
    theirs = timm.create_model(spec.name, num_classes=spec.num_classes, in_chans=spec.in_chans, **options).eval()
    ours = build_model(spec, seed=0)
    assert ours.training
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, spec.in_chans, spec.img_size, spec.img_size)
    with torch.no_grad():
        logits = ours.eval()(x)
        assert logits.shape == (2, spec.num_classes)
        assert torch.equal(logits, theirs(x))


@pytest.mark.parametrize(("patch_size", "grids"), [(1, [32, 32, 16, 8, 4]), (2, [16, 8, 4, 2, 1]), (4, [8, 8, 4, 2, 1])])
def test_timm_halves_the_grid_once_more_after_a_stem_of_stride_2(patch_size: int, grids: list[int]):
    model = build_model(dataclasses.replace(CONVNEXT, options=(("patch_size", patch_size),)), seed=0)
    sides = []
    for module in (model.get_submodule("stem"), *model.get_submodule("stages").children()):
        module.register_forward_hook(lambda _, __, output: sides.append(output.shape[-1]))
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert sides == grids


def test_the_seed_alone_decides_the_weights_and_the_global_stream_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    one, same, dropping, other = (
        build_model(TINY_VIT, seed=seed, drop_path=rate).state_dict() for seed, rate in ((1, 0.0), (1, 0.0), (1, 0.2), (2, 0.0))
    )
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], same[name]) and torch.equal(one[name], dropping[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])


def test_drop_path_reaches_the_last_block():
    from timm.layers.drop import DropPath

    rates = [m.drop_prob for m in build_model(TINY_VIT, seed=0, drop_path=0.2).modules() if isinstance(m, DropPath)]
    assert max(rates) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "depth"), [("deit_tiny_patch16_224", 12), ("swin_tiny_patch4_window7_224", 12), ("convnext_atto", 12), ("resnet18", 0)]
)
def test_depth_counts_the_blocks_that_timm_names(name: str, depth: int):
    assert depth_of(TimmSpec(name=name, img_size=224, num_classes=10)) == depth


@pytest.mark.parametrize(
    "spec",
    [
        TimmSpec(name="convnext_atto", img_size=224, num_classes=1000),
        TimmSpec(name="deit_tiny_patch16_224", img_size=224, num_classes=1000),
        TimmSpec(name="resnet18", img_size=224, num_classes=1000),
        TimmSpec(name="cait_xxs24_224", img_size=224, num_classes=10),
        CONVNEXT,
        TINY_VIT,
    ],
    ids=lambda spec: f"{spec.name}-{spec.img_size}",
)
def test_counts_are_those_of_fvcore_and_of_the_built_network(spec: TimmSpec):
    counted, model = cost(spec), build_model(spec, seed=0)
    assert counted.fvcore_macs == fvcore_macs(model, spec.img_size, spec.in_chans)
    assert counted.params == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < counted.macs < counted.fvcore_macs


def test_products_are_counted_without_norms_and_pooling():
    vit = cost(TINY_VIT)
    N, C = 5, 24  # class token and 2x2 patches
    block = N * (3 * C * C + C * C + 8 * C * C) + 2 * N * N * C
    assert vit.macs == 4 * 16 * 16 * C + 2 * block + C * 5
    assert vit.fvcore_macs - vit.macs == 5 * N * C * 5


def test_parts_are_the_first_level_of_the_model():
    parts = cost_by_part(TINY_VIT)
    assert list(parts) == ["cls_token", "pos_embed", "patch_embed", "blocks", "norm", "head"]
    assert tuple(parts["pos_embed"]) == (5 * 24, 0, 0)
    model = build_model(TINY_VIT, seed=0)
    assert parts["blocks"].params == sum(p.numel() for p in model.get_submodule("blocks").parameters())
    assert tuple(parts["head"]) == (24 * 5 + 5, 24 * 5, 24 * 5)


def test_layers_that_run_without_their_container_belong_to_it():
    # CaiT iterates over its list of blocks.
    parts = cost_by_part(TimmSpec(name="cait_xxs24_224", img_size=224, num_classes=10))
    assert "between" not in parts
    assert parts["blocks"].macs > 0.9 * sum(part.macs for part in parts.values())


def test_counting_leaves_the_global_stream_and_the_default_device_alone():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    cost(TimmSpec(name="resnet10t", img_size=64, num_classes=3))
    assert torch.equal(torch.rand(2), expected)
    assert nn.Linear(1, 1).weight.device.type == "cpu"


def test_no_drop_path_means_none_also_where_timm_has_some_by_default():
    from timm.layers import DropPath

    model = TimmSpec(name="swin_tiny_patch4_window7_224", img_size=224, num_classes=10)
    without, with_some = (build_model(model, seed=0, drop_path=rate) for rate in (0.0, 0.2))
    assert not any(module.drop_prob for module in without.modules() if isinstance(module, DropPath))
    assert max(module.drop_prob for module in with_some.modules() if isinstance(module, DropPath)) == pytest.approx(0.2)

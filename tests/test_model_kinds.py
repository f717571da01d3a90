"""The contract of every kind of model, and a kind that is one file."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from space import catalog
from space.cost import cost, cost_by_part
from space.fvcore_count import fvcore_macs
from space.model import (
    Model,
    ModelKind,
    as_arch,
    build_model,
    depth_of,
    fit_tensors,
    kinds,
    model_from_json,
    require_arch,
    resized,
    supports_class_row,
    token_size,
)
from space.registry import SpecError

EVERY = pytest.mark.parametrize(
    "model",
    [pytest.param(model, id=f"{kind}-{number}") for kind in kinds.names() for number, model in enumerate(kinds.get(kind).examples())],
)


def test_a_kind_is_registered_under_the_name_that_its_models_bear():
    for name in kinds.names():
        assert {model.kind for model in kinds.get(name).examples()} == {name}


@EVERY
def test_json_and_pickle_give_the_same_model(model: Model):
    data = json.loads(json.dumps(model.to_json()))
    assert data["model"] == model.kind
    again = model_from_json(data)
    assert again == model == pickle.loads(pickle.dumps(model))
    assert hash(again) == hash(model)
    assert again.digest == model.digest
    assert re.fullmatch("[0-9a-f]{16}", model.digest)


@EVERY
def test_a_spec_file_names_the_model(model: Model, tmp_path: Path):
    (tmp_path / "spec.json").write_text(json.dumps(model.to_json()))
    assert catalog.resolve(str(tmp_path / "spec.json")) == model


@EVERY
def test_a_field_that_is_not_there_is_named(model: Model):
    with pytest.raises(SpecError, match="unknown field 'depht'"):
        model_from_json(model.to_json() | {"depht": 3})


@EVERY
def test_counts_are_those_of_the_built_network(model: Model):
    network, counted = build_model(model, seed=0), cost(model)
    assert counted.params == sum(parameter.numel() for parameter in network.parameters())
    assert counted.fvcore_macs == fvcore_macs(network, model.img_size, model.in_chans)
    assert tuple(map(sum, zip(*cost_by_part(model).values(), strict=True))) == tuple(counted)


@EVERY
def test_its_own_tensors_fit_unchanged_and_others_do_not(model: Model):
    own = build_model(model, seed=0).state_dict()
    tensors, changes, has_classifier = fit_tensors(model, own, model)
    assert (changes, has_classifier) == ((), True)
    assert tensors.keys() == own.keys()
    assert all(torch.equal(tensors[name], own[name]) for name in own)
    with pytest.raises(SpecError, match="extra is left over"):
        fit_tensors(model, own | {"extra": torch.zeros(2)}, model)


@EVERY
def test_a_new_number_of_classes_gets_a_new_classifier(model: Model):
    own = build_model(resized(model, num_classes=9), seed=0).state_dict()
    _, changes, has_classifier = fit_tensors(model, own)
    assert changes == (f"classifier replaced (9 classes to {model.num_classes})",)
    assert not has_classifier


@EVERY
def test_another_normalisation_of_the_images_folds_into_one_convolution(model: Model):
    name = kinds.get(model.kind).foldable_convolution(model)
    if name is not None:
        convolution = build_model(model, seed=0).get_submodule(name)
        assert isinstance(convolution, torch.nn.Conv2d)
        assert convolution.bias is not None
        assert convolution.padding == (0, 0)


@EVERY
def test_a_network_is_a_function_of_model_seed_and_drop_path(model: Model):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, same, dropping, other = (build_model(model, seed=seed, drop_path=rate) for seed, rate in ((1, 0.0), (1, 0.0), (1, 0.2), (2, 0.0)))
    assert torch.equal(torch.rand(3), expected)
    assert one.training
    weights = one.state_dict()
    for network in (same, dropping):
        assert all(torch.equal(weight, weights[name]) for name, weight in network.state_dict().items())
    drawn = [name for name, weight in weights.items() if weight.unique().numel() > 1]
    assert drawn
    assert not [name for name in drawn if torch.equal(weights[name], other.state_dict()[name])]


@EVERY
@pytest.mark.parametrize("drop_path", [1.0, -0.1])
def test_a_drop_path_outside_its_range_is_refused(model: Model, drop_path: float):
    with pytest.raises(ValueError, match=f"drop_path is {drop_path}; allowed: from 0 to below 1"):
        build_model(model, seed=0, drop_path=drop_path)


@EVERY
def test_another_image_size_and_class_count_make_the_network_of_that_size(model: Model):
    other = resized(model, img_size=2 * model.img_size, num_classes=model.num_classes + 2)
    assert (other.img_size, other.num_classes, other.in_chans) == (2 * model.img_size, model.num_classes + 2, model.in_chans)
    assert resized(model) == model == resized(other, img_size=model.img_size, num_classes=model.num_classes)
    assert other.digest != model.digest
    for spec in (model, other):
        images = torch.zeros(2, spec.in_chans, spec.img_size, spec.img_size)
        assert build_model(spec, seed=0).eval()(images).shape == (2, spec.num_classes)
    assert cost(other).macs > cost(model).macs


@EVERY
def test_a_size_that_no_image_has_is_refused(model: Model):
    with pytest.raises(SpecError, match="img_size is 0"):
        resized(model, img_size=0)


@EVERY
def test_what_is_known_of_a_network_without_building_it(model: Model):
    assert depth_of(model) >= 1
    size = token_size(model)
    assert size is None or model.img_size % size == 0
    reason = supports_class_row(model)
    if reason is None:
        images = torch.zeros(2, model.in_chans, model.img_size, model.img_size)
        assert size is not None
        logits, row = build_model(model, seed=0)(images, with_class_row=True)
        assert logits.shape == (2, model.num_classes)
        assert row.shape == (2, (model.img_size // size) ** 2)
    else:
        assert reason


@EVERY
def test_a_network_of_our_components_has_the_shape_of_its_architecture(model: Model):
    arch = as_arch(model)
    if arch is None:
        with pytest.raises(SpecError, match=f"a test takes networks of our components; a model of kind '{model.kind}' is none"):
            require_arch(model, "a test")
        return
    assert require_arch(model, "a test") == arch
    assert cost(arch) == cost(model)
    ours, theirs = (build_model(spec, seed=0).state_dict() for spec in (model, arch))
    assert {name: weight.shape for name, weight in ours.items()} == {name: weight.shape for name, weight in theirs.items()}


def test_a_kind_with_a_notation_reads_it():
    for name in kinds.names():
        kind = kinds.get(name)
        assert (kind.notation is None) == (type(kind).read is ModelKind.read), name


def test_specs_kinds_and_families_import_no_torch():
    code = """
import importlib, pkgutil, sys
import space.families, space.kinds
modules = ["space.catalog", "space.cost", "space.spec", "space.timm_spec", "space.subnet_spec"]
modules += [found.name for room in (space.kinds, space.families) for found in pkgutil.iter_modules(room.__path__, room.__name__ + ".")]
for name in modules:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


KIND = '''
from dataclasses import dataclass, replace
from typing import ClassVar

from space.component import Cost
from space.model import ModelKind, model_kind
from space.registry import SpecError
from space.spec import digest_of


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    kind: ClassVar[str] = "linear"
    img_size: int
    num_classes: int
    in_chans: int = 3

    @property
    def digest(self):
        return digest_of(self.to_json())

    def to_json(self):
        return {"model": self.kind, "img_size": self.img_size, "num_classes": self.num_classes}


@model_kind("linear")
class LinearKind(ModelKind[LinearSpec]):
    """One linear layer on the pixels."""

    notation = "PIXELS"

    def examples(self):
        return (LinearSpec(img_size=8, num_classes=3),)

    def from_json(self, data):
        return LinearSpec(img_size=data["img_size"], num_classes=data["num_classes"])

    def read(self, text):
        return LinearSpec(img_size=int(text), num_classes=1000)

    def resized(self, model, *, img_size, num_classes):
        return replace(model, img_size=img_size, num_classes=num_classes)

    def cost_by_part(self, model):
        return {"1": Cost.linear(1, 3 * model.img_size**2, model.num_classes)}

    def build(self, model, *, seed, drop_path):
        import torch
        from torch import nn

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return nn.Sequential(nn.Flatten(), nn.Linear(3 * model.img_size**2, model.num_classes))

    def depth(self, model):
        return 1

    def token_size(self, model):
        return None

    def why_no_class_row(self, model):
        return "a linear layer has no attention"
'''

USE_OF_A_KIND = """
import json, sys, torch
from pathlib import Path
from space import catalog
from space.cost import cost
from space.model import build_model, depth_of, model_from_json, resized, supports_class_row, token_size
from space.registry import SpecError
from workers.checkpoints import load_model, save_model

model = resized(catalog.resolve("linear:8"), num_classes=4)
assert model_from_json(json.loads(json.dumps(model.to_json()))) == model
assert (depth_of(model), token_size(model), supports_class_row(model)) == (1, None, "a linear layer has no attention")
network = build_model(model, seed=0)
assert cost(model).params == sum(parameter.numel() for parameter in network.parameters()) == 8 * 8 * 3 * 4 + 4
try:
    catalog.resolve("linaer:8")
except SpecError as error:
    assert "linear:PIXELS" in str(error), error
workdir = Path(sys.argv[1])
save_model(workdir / "weights.pt", network, model)
loaded, stored = load_model(workdir / "weights.pt", "cpu")
assert stored == model and torch.equal(loaded[1].weight, network[1].weight)
"""


def test_a_kind_is_one_file(tmp_path: Path):
    for package in ("space", "results", "workers", "search"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "space" / "kinds" / "linear.py").write_text(KIND)
    for command in (["-c", USE_OF_A_KIND, str(tmp_path)], ["search/run.py", "describe", "linear:8", "--json"]):
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["spec"] == {"model": "linear", "img_size": 8, "num_classes": 1000}

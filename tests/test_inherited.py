"""A process that measures inherited accuracy again and again holds one supernet and one part of the images, and never another's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from supernets import resnas

from space.model import build_model
from space.supernet_space import SupernetSpace
from workers.checkpoints import save_model
from workers.data import load_dataset
from workers.evaluator import Context, EarlierTrial
from workers.evaluators.inherited import InheritedSettings, inherited
from workers.evaluators.supernet import load_supernet
from workers.evaluators.train import WEIGHTS
from workers.inference import predict, top1_pct

pytestmark = pytest.mark.usefixtures("one_thread")


def leave_supernet(workdir: Path, space: SupernetSpace, seed: int) -> None:
    save_model(workdir / WEIGHTS, build_model(space.largest, seed=seed), space.largest, space=json.dumps(space.to_json()))


def measured(workdir: Path, space: SupernetSpace) -> float:
    dataset = load_dataset("digits", img_size=space.largest.img_size)
    context = Context(seed=0, dataset=dataset, earlier={"supernet": (EarlierTrial(number=0, workdir=workdir, key=""),)})
    return inherited(space.subnet(space.smallest_point), context, InheritedSettings())["inherited_top1_pct"]


def expected(workdir: Path, space: SupernetSpace) -> float:
    dataset = load_dataset("digits", img_size=space.largest.img_size)
    network = load_supernet(workdir).at(space.subnet(space.smallest_point))
    return top1_pct(predict(network, dataset, dataset.val, device="cpu"), dataset.labels[dataset.val])


def test_images_of_one_size_are_not_taken_for_those_of_another(tmp_path: Path):
    for img_size in (8, 16, 8):
        space, workdir = resnas(img_size=img_size), tmp_path / str(img_size)
        workdir.mkdir(exist_ok=True)
        leave_supernet(workdir, space, seed=0)
        assert measured(workdir, space) == expected(workdir, space)


def test_a_supernet_that_was_trained_anew_in_the_same_place_is_read_again(tmp_path: Path):
    space, accuracies = resnas(), set()
    for seed in range(4):
        leave_supernet(tmp_path, space, seed)
        accuracies.add(measured(tmp_path, space))
        assert measured(tmp_path, space) == expected(tmp_path, space)
    assert len(accuracies) > 1

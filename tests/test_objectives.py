"""Objectives: what the training loop lets them do, and that a resumed training stays bit-identical whatever they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import REPOSITORY
from objectives import AuxiliaryHead, Growing, Permuting, Subnets

from space.model import build_model
from space.recipe import Recipe
from space.registry import SpecError
from workers import training as training_module
from workers.checkpoints import latest_checkpoint, save_model
from workers.data import load_dataset
from workers.evaluator import Context, EarlierTrial, EvaluationError
from workers.evaluators.short_train import ShortTrainSettings, short_train
from workers.learner import Learner, Origin
from workers.objectives import Classification, Distillation, soft_target_loss
from workers.training import train, training_identity

QUICK = Recipe(epochs=3, batch_size=256, lr=2e-3, warmup_epochs=1, flip=False)

pytestmark = pytest.mark.usefixtures("one_thread")

SAVE = training_module.save_checkpoint


@pytest.fixture(scope="module")
def digits(tiny_vit):
    return load_dataset("digits", img_size=tiny_vit.img_size)


def bits(network) -> bytes:
    return b"".join(tensor.detach().numpy().tobytes() for tensor in network.state_dict().values())


def save_and_stop(*args):
    SAVE(*args)
    raise KeyboardInterrupt


def stopped_after_every_step(monkeypatch, make_objective, model, recipe, dataset, workdir):
    """The training of an objective that is ended by each checkpoint, one per step, and resumed by a new objective."""
    with monkeypatch.context() as patch:
        patch.setattr(training_module, "save_checkpoint", save_and_stop)
        while True:
            try:
                return train(model, recipe, dataset, workdir=workdir, objective=make_objective(), checkpoint_every_s=0)
            except KeyboardInterrupt:
                continue


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lion", "sgd"])
@pytest.mark.parametrize("objective", [Permuting, Growing, AuxiliaryHead, Subnets])
def test_a_resumed_training_is_bit_identical_to_an_uninterrupted_one(tiny_vit, digits, tmp_path, monkeypatch, objective, optimizer):
    recipe = replace(QUICK, ema_decay=0.9, optimizer=optimizer)
    whole = train(tiny_vit, recipe, digits, workdir=tmp_path / "whole", objective=objective())
    resumed = stopped_after_every_step(monkeypatch, objective, tiny_vit, recipe, digits, tmp_path / "resumed")
    assert bits(resumed.network) == bits(whole.network)


def test_trainings_of_different_objectives_keep_their_checkpoints_apart(tiny_vit, digits):
    plain, named = (training_identity(tiny_vit, QUICK, digits, objective) for objective in (None, Classification()))
    assert plain == named
    others = [training_identity(tiny_vit, QUICK, digits, objective()) for objective in (Permuting, Growing, AuxiliaryHead, Subnets)]
    assert len({plain, *others}) == 5


def learner_with_moments(recipe):
    torch.manual_seed(0)
    module = Permuting.mlp(8)
    learner = Learner(module, recipe, steps_per_epoch=10)
    for step in range(3):
        learner.set_rate(step)
        module(torch.randn(4, 3, 8, 8)).square().mean().backward()
        learner.update(step + 1)
    return learner


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "lion", "sgd"])
def test_a_permutation_of_hidden_units_changes_nothing_that_is_computed(optimizer):
    """Neither the network nor its average, now or after further steps: the moments went along."""
    plain, permuted = (learner_with_moments(Recipe(epochs=2, optimizer=optimizer, ema_decay=0.9)) for _ in range(2))
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    before = permuted.module[1].weight.detach().clone()
    permuted.transform(Permuting.changes(order))
    assert torch.equal(permuted.module[1].weight, before[order])
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for step in range(3, 7):
        for ours, theirs in ((permuted.module, plain.module), (permuted.averaged, plain.averaged)):
            # atol: float32 sums in another order
            assert torch.allclose(ours(images), theirs(images), atol=1e-5)
        for learner in (plain, permuted):
            learner.set_rate(step)
            learner.module(images).square().mean().backward()
            learner.update(step + 1)


def test_a_permutation_without_its_moments_would_be_noticed():
    plain, permuted = (learner_with_moments(Recipe(epochs=2, lr=0.1)) for _ in range(2))
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    moments = {parameter: dict(state) for parameter, state in permuted.optimizer.state.items()}
    permuted.transform(Permuting.changes(order))
    permuted.optimizer.state.update(moments)
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for learner in (plain, permuted):
        learner.set_rate(3)
        learner.module(images).square().mean().backward()
        learner.update(4)
    assert not torch.allclose(plain.module(images), permuted.module(images), atol=1e-3)


def test_what_an_exchanged_module_takes_over_has_its_moments_and_its_average_and_the_rest_is_new():
    learner = learner_with_moments(Recipe(epochs=2, ema_decay=0.9))
    old, average = learner.module[1], learner.averaged[1]
    moment = learner.optimizer.state[old.weight]["exp_avg"].clone()
    larger = Permuting.mlp(12)
    fresh = larger[1].weight.detach().clone()

    def grown(old, new):
        return torch.cat([old, new[8:]])

    exchanged = learner.exchanged(larger, {"1.weight": Origin("1.weight", grown), "3.bias": Origin("3.bias")})
    assert torch.equal(exchanged.module[1].weight[:8], old.weight)
    assert torch.equal(exchanged.averaged[1].weight[:8], average.weight)
    grown_moment = exchanged.optimizer.state[exchanged.module[1].weight]["exp_avg"]
    assert torch.equal(grown_moment[:8], moment)
    assert not grown_moment[8:].any()
    assert torch.equal(exchanged.module[1].weight[8:], fresh[8:])
    assert exchanged.module[3].weight not in exchanged.optimizer.state
    assert torch.equal(exchanged.averaged[3].weight, larger[3].weight)
    steps = [exchanged.optimizer.state[parameter]["step"] for parameter in (exchanged.module[1].weight, exchanged.module[3].bias)]
    assert [step.item() for step in steps] == [3, 3]
    assert steps[0] is not steps[1], "the optimizer counts in place"


def test_a_change_to_another_shape_is_refused_and_changes_nothing():
    learner = learner_with_moments(Recipe(epochs=2))
    before = bits(learner.module)
    with pytest.raises(ValueError, match=r"1.bias has shape \(8,\), but its origin 1.bias gives \(4,\)"):
        learner.transform({"1.weight": lambda tensor: tensor.flip(0), "1.bias": lambda tensor: tensor[:4]})
    assert bits(learner.module) == before


def test_a_growing_network_is_trained_validated_and_returned_at_its_size(tiny_vit, digits, tmp_path):
    reported = []
    objective = Growing()
    trained = train(
        tiny_vit,
        QUICK,
        digits,
        workdir=tmp_path,
        objective=objective,
        report=lambda name, value, step: reported.append((name, value, step)),
    )
    assert [value for name, value, _ in reported if name == "num_hidden"] == [8, 12, 16]
    assert trained.network[1].out_features == 16
    assert not [name for name, _, _ in reported if name == "val_nll"], "the objective says what is validated"


def test_an_auxiliary_head_is_trained_and_in_the_checkpoint_and_not_in_the_network(tiny_vit, digits, tmp_path):
    trained = train(tiny_vit, QUICK, digits, workdir=tmp_path, objective=AuxiliaryHead(), stop_after=1)
    found = latest_checkpoint(trained.checkpoints, pytest.fail)
    assert found is not None
    state = found[1]
    initial = AuxiliaryHead.head(tiny_vit)
    assert not torch.equal(state["network"]["head.weight"], initial.weight)
    assert state["objective"]["num_losses"] == len(digits.train) // 256
    assert trained.network.state_dict().keys() == build_model(tiny_vit, seed=0).state_dict().keys()


def test_what_a_step_does_not_touch_neither_decays_nor_moves(tiny_vit, digits, tmp_path):
    """AdamW with momentum and decay: weights that were trained before stay to the bit while others train."""
    recipe = replace(QUICK, epochs=2, weight_decay=0.5)
    first, both = (
        train(tiny_vit, recipe, digits, workdir=tmp_path / str(stop), objective=Subnets(by_epoch=True), stop_after=stop).network
        for stop in (1, 2)
    )
    assert torch.equal(first.branches[0].weight, both.branches[0].weight)
    assert not torch.equal(first.branches[1].weight, both.branches[1].weight)
    assert torch.equal(first.branches[1].weight, Subnets.branch(1).weight)
    assert torch.equal(both.branches[2].weight, Subnets.branch(2).weight), "never touched"


TOGETHER = Recipe(epochs=3, batch_size=256, num_accumulation=2, lr=2e-3, weight_decay=0.5, warmup_epochs=1, flip=False, ema_decay=0.9)
TRAIN_TOGETHER = """
import json, sys, torch
from datetime import timedelta
from pathlib import Path
sys.path.insert(0, "tests")
from objectives import Subnets
from space.model import model_from_json
from space.recipe import Recipe
from workers.data import load_dataset
from workers.distributed import Process
from workers.training import train
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
model, recipe = model_from_json(json.loads(sys.argv[3])), Recipe.from_json(json.loads(sys.argv[4]))
torch.set_num_threads(1)
meet = f"file://{folder}/meet"
torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=300))
dataset, process = load_dataset("digits", img_size=model.img_size), Process(rank=rank, world_size=2)
for name, stops in {"whole": (None,), "parts": (1, None)}.items():
    for stop in stops:
        trained = train(model, recipe, dataset, workdir=folder / name, objective=Subnets(), stop_after=stop, process=process)
    torch.save(trained.network.state_dict(), folder / f"{name}-{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def together(tiny_vit, tmp_path_factory):
    """A function from (name, rank) to the weights that two processes trained: `whole`, or in `parts` with a stop after an epoch."""
    folder = tmp_path_factory.mktemp("together")
    arguments = [str(folder), json.dumps(tiny_vit.to_json()), json.dumps(TOGETHER.to_json())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen([sys.executable, "-c", TRAIN_TOGETHER, str(rank), *arguments], cwd=REPOSITORY, env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=400) for process in processes] == [0, 0]
    return lambda name, rank: torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


def test_two_processes_that_touch_different_parameters_train_what_one_process_trains(tiny_vit, digits, tmp_path, together):
    """A step takes two of three branches, one in each process; what neither touched has no gradient in both."""
    alone = train(tiny_vit, TOGETHER, digits, workdir=tmp_path, objective=Subnets()).network.state_dict()
    first, second = (together("whole", rank) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in alone)
    # atol: float32 sums in another order, which AdamW's first steps amplify
    assert all(torch.allclose(first[name], alone[name], atol=1e-4) for name in alone)


def test_two_processes_stopped_and_continued_end_with_the_same_bits(together):
    whole, parts = together("whole", 0), together("parts", 0)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_soft_targets_are_the_published_formula():
    """Hinton et al. 2015, section 2: in the limit of a high temperature the gradient is (z - v) / N for centred logits, times T^2."""
    logits = torch.tensor([[1.0, -2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    taught = torch.tensor([[0.5, 0.5, -1.0]], dtype=torch.float64)
    soft_target_loss(logits, taught, 1e4).backward()
    assert torch.allclose(logits.grad, (logits - taught).detach() / 3, rtol=1e-3)
    expected = 4.0 * torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=taught / 2), torch.distributions.Categorical(logits=logits / 2)
    )
    assert torch.allclose(soft_target_loss(logits, taught, 2.0), expected.mean())


@pytest.fixture(scope="module")
def teacher(tiny_vit, digits, tmp_path_factory):
    """The work directory of a teacher that knows the digits better than a student learns them in an epoch."""
    folder = tmp_path_factory.mktemp("teacher")
    recipe = Recipe(epochs=12, batch_size=64, lr=1e-2, warmup_epochs=1, flip=False, crop="none")
    short_train(tiny_vit, Context(seed=0, dataset=digits, recipe=recipe, workdir=folder), ShortTrainSettings())
    return folder


def values_of(student, digits, workdir, recipe=QUICK, earlier=None, **settings):
    trials = {phase: (EarlierTrial(number=0, workdir=folder, key=""),) for phase, folder in (earlier or {}).items()}
    context = Context(seed=0, dataset=digits, recipe=recipe, workdir=workdir, earlier=trials)
    return short_train(student, context, ShortTrainSettings(**settings))


def test_a_student_comes_closer_to_its_teacher_than_one_without(tiny_vit, digits, tmp_path, teacher):
    from workers.checkpoints import load_model
    from workers.inference import predict

    recipe = Recipe(epochs=6, batch_size=64, lr=5e-3, warmup_epochs=1, flip=False)
    before = (teacher / "model.pt").read_bytes()
    values_of(tiny_vit, digits, tmp_path / "alone", recipe)
    how = {"teacher": "teachers", "distillation_weight": 0.9, "temperature": 2.0}
    values_of(tiny_vit, digits, tmp_path / "taught", recipe, {"teachers": teacher}, **how)
    logits = {
        folder.name: torch.from_numpy(predict(load_model(folder / "model.pt")[0], digits, digits.test, device="cpu"))
        for folder in (teacher, tmp_path / "alone", tmp_path / "taught")
    }
    distance = {name: soft_target_loss(logits[name], logits[teacher.name], 1.0).item() for name in ("alone", "taught")}
    assert distance["taught"] < 0.9 * distance["alone"]
    assert (teacher / "model.pt").read_bytes() == before


def test_a_weight_of_zero_gives_the_bits_of_plain_classification(tiny_vit, digits, tmp_path, teacher):
    recipe = replace(QUICK, mixing="mixup_cutmix", drop_path=0.1)
    plain = train(tiny_vit, recipe, digits, workdir=tmp_path / "plain")
    objective = Distillation(teacher / "model.pt", weight=0.0, temperature=1.0)
    taught = train(tiny_vit, recipe, digits, workdir=tmp_path / "taught", objective=objective)
    assert bits(plain.network) == bits(taught.network)
    assert plain.checkpoints.name != taught.checkpoints.name, "they are different trainings"


def test_a_distillation_resumed_is_bit_identical(tiny_vit, digits, tmp_path, monkeypatch, teacher):
    recipe = replace(QUICK, mixing="mixpro", precision="bf16")

    def make_objective():
        return Distillation(teacher / "model.pt", weight=0.5, temperature=4.0)

    whole = train(tiny_vit, recipe, digits, workdir=tmp_path / "whole", objective=make_objective())
    resumed = stopped_after_every_step(monkeypatch, make_objective, tiny_vit, recipe, digits, tmp_path / "resumed")
    assert bits(resumed.network) == bits(whole.network)


def test_a_teacher_that_does_not_fit_is_refused(tiny_vit, digits, tmp_path):
    seven = replace(tiny_vit, num_classes=7)
    save_model(tmp_path / "model.pt", build_model(seven, seed=0), seven)
    with pytest.raises(SpecError, match="has num_classes 7, the network 10"):
        train(tiny_vit, QUICK, digits, workdir=tmp_path, objective=Distillation(tmp_path / "model.pt", weight=0.5, temperature=1.0))
    with pytest.raises(EvaluationError, match="phase 'teachers', the teacher of short_train, left no trained network"):
        values_of(tiny_vit, digits, tmp_path / "student", teacher="teachers", earlier={"teachers": tmp_path / "nothing"})
    with pytest.raises(SpecError, match="unknown earlier phase 'teachers'"):
        values_of(tiny_vit, digits, tmp_path / "student", teacher="teachers")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher": "t", "distillation_weight": 1.5}, "distillation_weight is 1.5; allowed: from 0 to 1"),
        ({"teacher": "t", "temperature": 0.0}, "temperature is 0.0; allowed: numbers above 0"),
        ({"temperature": 2.0}, "have no effect without a teacher"),
    ],
)
def test_settings_of_a_distillation_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ShortTrainSettings(**settings)

"""The training of a supernet: what a step draws, that it is the one training loop, and what the evaluator leaves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from supernets import autoformer, drawn, resnas
from test_components import CASES, host
from test_objectives import bits, stopped_after_every_step
from test_supernet import supernet_of

from space.cost import cost
from space.layout import layout
from space.model import build_model, token_size
from space.recipe import Recipe
from space.registry import SpecError
from space.spec import canonical
from space.supernet import Supernet
from workers.batches import Batch
from workers.checkpoints import load_model, save_model
from workers.data import load_dataset
from workers.distributed import ALONE
from workers.evaluator import Context, EvaluationError, evaluators
from workers.evaluators.supernet import SupernetSettings, load_supernet, train_supernet
from workers.inference import predict, top1_pct
from workers.mixing import make_mixer
from workers.objectives import Position, Setup
from workers.subnet_sampling import SubnetSampler, orders_by_importance, unit_places, unlocked_tables
from workers.supernet_objective import SupernetObjective, SupernetTraining, interleaved, random_subnets
from workers.training import train
from workers.weights import weights_from

pytestmark = pytest.mark.usefixtures("one_thread")

SPACE = resnas()
QUICK = Recipe(epochs=2, batch_size=256, lr=2e-3, warmup_epochs=1, flip=False)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", img_size=SPACE.largest.img_size)


def settings(space=SPACE, **changes) -> SupernetSettings:
    return SupernetSettings(space=json.dumps(space.to_json()), **changes)


# What a step draws


def sampler(mode="stratified", num_subnets=2, num_unlocking_epochs=0.0, space=SPACE) -> SubnetSampler:
    return SubnetSampler(space=space, num_subnets=num_subnets, mode=mode, num_unlocking_epochs=num_unlocking_epochs)


def points(mode, num_subnets=2, steps=300, epoch=0, **how):
    draws = sampler(mode, num_subnets, **how)
    return [[SPACE.point(subnet) for subnet in draws.sample(epoch, seed)] for seed in range(steps)]


def test_stratified_subnets_of_a_step_share_no_value_and_all_values_are_as_likely():
    drawn = points("stratified", 2)
    assert all(one["embed_dim1"] != other["embed_dim1"] for one, other in drawn)
    assert all(one["num_heads2_1"] != other["num_heads2_1"] for one, other in drawn)
    counts = Counter(point["embed_dim1"] for step in drawn for point in step)
    assert all(count == pytest.approx(200, abs=60) for count in counts.values())  # abs: five standard deviations
    # The table of a block that may be left out holds both answers twice: both subnets keep it in a sixth of the steps.
    both = sum(one["keep1_2"] and other["keep1_2"] for one, other in drawn)
    assert both == pytest.approx(50, abs=30)
    three = [point["embed_dim1"] for point in points("stratified", 3, steps=1)[0]]
    assert sorted(three) == [8, 10, 12]
    assert sorted(point["embed_dim1"] for point in points("stratified", 6, steps=1)[0]) == [8, 8, 10, 10, 12, 12]


def test_independent_subnets_do_share_values():
    same = sum(one["embed_dim1"] == other["embed_dim1"] for one, other in points("iid"))
    assert same == pytest.approx(100, abs=41)


def test_a_sandwich_holds_the_largest_and_the_smallest():
    for step in points("sandwich", 3, steps=5):
        assert step[:2] == [SPACE.largest_point, SPACE.smallest_point]
    assert len({json.dumps(step[2]) for step in points("sandwich", 3, steps=20)}) > 10


def test_mac_aware_subnets_are_spread_over_the_whole_range():
    least, most = SPACE.macs_range

    def shares(mode):
        return [(cost(subnet).macs - least) / (most - least) for seed in range(60) for subnet in sampler(mode, 4).sample(0, seed)]

    aware, independent = shares("macs"), shares("iid")
    quarters = Counter(min(3, int(4 * share)) for share in aware)
    assert all(quarters[quarter] == pytest.approx(60, abs=20) for quarter in range(4))
    assert min(aware) < 0.05 < 0.95 < max(aware)
    assert sum(share > 0.75 for share in independent) < 20


def test_values_unlock_as_published():
    """Of five widths at epochs 8, 15, 23 and 30 of 30; blocks are dropped from epoch 20, in a third of the draws, from 30 in half."""
    block = replace(SPACE.stages[0].blocks[0], mixer={"num_heads": (3, 2, 1)})
    widths = replace(SPACE.stages[0], widths=(12, 11, 10, 9, 8), blocks=(block, *SPACE.stages[0].blocks[1:]))
    space = replace(SPACE, stages=(widths, SPACE.stages[1]))
    lengths = [len(unlocked_tables(space, epoch, 30)["embed_dim1"]) for epoch in range(40)]
    assert [epoch for epoch in range(1, 40) if lengths[epoch] > lengths[epoch - 1]] == [8, 15, 23, 30]
    assert lengths[0] == 1
    keeps = {epoch: unlocked_tables(space, epoch, 30)["keep1_2"] for epoch in (0, 9, 10, 19, 20, 29, 30)}
    assert {epoch: table.count(False) / len(table) for epoch, table in keeps.items()} == {
        0: 0, 9: 0, 10: 0, 19: 0, 20: 1 / 3, 29: 1 / 3, 30: 1 / 2,
    }  # fmt: skip
    largest = points("iid", 2, steps=20, epoch=0, num_unlocking_epochs=30.0)
    assert all(point == SPACE.largest_point for step in largest for point in step)


def test_a_step_draws_from_a_stream_of_its_own():
    """The released code could draw the same subnets in every step."""
    position = Position(seed=0, epoch=0, step=0, part=0, num_parts=1, rank=0, world_size=2)
    draw = sampler()
    others = [replace(position, **change) for change in ({"step": 1}, {"rank": 1}, {"seed": 1}, {"part": 1})]
    first = draw.sample(0, position.stream("subnets"))
    assert first == draw.sample(0, position.stream("subnets"))
    assert all(draw.sample(0, other.stream("subnets")) != first for other in others)


# The order of what subnets share


def with_units():
    """The first of the offered forms of each component that has heads or hidden units to sort."""
    found = {}
    for kind, part in CASES:
        own = next(each for each in layout(host(kind, canonical(kind, part))) if each.kind == kind)
        if unit_places(own):
            found.setdefault((kind, part.name), part)
    return [(kind, part) for (kind, _), part in found.items()]


@pytest.mark.parametrize(("kind", "part"), with_units(), ids=repr)
def test_sorting_heads_and_hidden_units_changes_nothing_that_is_computed(kind, part):
    spec = host(kind, canonical(kind, part))
    network = build_model(spec, seed=0).eval()
    images = torch.randn(2, 3, spec.img_size, spec.img_size, generator=torch.Generator().manual_seed(0))
    before, weights = network(images), network.state_dict()
    changes = orders_by_importance(spec, weights)
    assert changes
    with torch.no_grad():
        for name, change in changes.items():
            weights[name].copy_(change(weights[name]))
    # atol: float32 sums in another order
    torch.testing.assert_close(network(images), before, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(change(weights[name]), weights[name]) for name, change in orders_by_importance(spec, weights).items())


def test_the_first_heads_and_hidden_units_are_the_important_ones():
    """Importance is the sum of the absolute values of a unit's weights and biases, as published."""
    network = build_model(SPACE.largest, seed=0)
    weights = network.state_dict()
    mixer, feed_forward = network.stages[0].blocks[0].mixer, network.stages[0].blocks[0].feed_forward.mlp
    with torch.no_grad():
        mixer.qkv.weight.view(3, 3, 4, 12)[1, 2] += 1
        mixer.proj.bias[0] += 100
        feed_forward.fc2.weight[:, 5] += 1
        feed_forward.fc1.bias[7] += 3
        rows = mixer.qkv.weight.view(3, 3, 4, 12)[:, 2].clone()
        columns = feed_forward.fc2.weight[:, [5, 7]].clone()
        for name, change in orders_by_importance(SPACE.largest, weights).items():
            weights[name].copy_(change(weights[name]))
    assert torch.equal(mixer.qkv.weight.view(3, 3, 4, 12)[:, 0], rows)
    assert torch.equal(feed_forward.fc2.weight[:, :2], columns)


def test_moments_and_moving_average_are_sorted_along(digits, tmp_path):
    """A training that sorts ends where the same one ends that does not, if the largest network alone is trained."""
    recipe = replace(QUICK, ema_decay=0.9)
    single = replace(
        SPACE, stages=tuple(replace(stage, widths=stage.widths[:1], blocks=tuple(map(fixed, stage.blocks))) for stage in SPACE.stages)
    )
    ends = []
    for sorts in (False, True):
        how = SupernetTraining(num_subnets=1, unlock_share=1.0, sorts_units=sorts)
        ends.append(train(SPACE.largest, recipe, digits, workdir=tmp_path / str(sorts), objective=SupernetObjective(single, how)).network)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(ends[0].network.stages[0].blocks[0].mixer.qkv.weight, ends[1].network.stages[0].blocks[0].mixer.qkv.weight)
    # atol: float32 sums in another order, which AdamW's first steps amplify
    torch.testing.assert_close(ends[0].network(images), ends[1].network(images), rtol=1e-3, atol=1e-3)


def fixed(block):
    return replace(block, mixer={}, feed_forward={}, is_skippable=False)


# The one training loop


def test_rows_of_subnets_come_back_in_the_order_of_the_images():
    images = torch.arange(7)
    assert torch.equal(interleaved([images[place::3] for place in range(3)]), images)


@pytest.mark.parametrize(
    ("how", "precision"),
    [
        (SupernetTraining(unlock_share=0.5, num_subnets=3), "fp32"),
        (SupernetTraining(sampling="sandwich", distillation_weight=0.5), "bf16"),
        (SupernetTraining(sampling="macs", sorts_units=False), "fp32"),
    ],
)
def test_a_resumed_training_of_a_supernet_is_bit_identical(digits, tmp_path, monkeypatch, how, precision):
    recipe = replace(QUICK, batch_size=512, ema_decay=0.9, mixing="patch_tokens", drop_path=0.2, num_accumulation=2, precision=precision)

    def objective():
        return SupernetObjective(SPACE, how)

    whole = train(SPACE.largest, recipe, digits, workdir=tmp_path / "whole", objective=objective())
    resumed = stopped_after_every_step(monkeypatch, objective, SPACE.largest, recipe, digits, tmp_path / "resumed")
    assert bits(resumed.network) == bits(whole.network)


def test_the_loss_of_a_step_is_the_mean_over_all_images(digits):
    """The sum of B_k / B times the loss of subnet k on its images, with a last part that is smaller."""
    objective, module, position = started(digits, SupernetTraining(num_subnets=2, unlock_share=0.0))
    batch = Batch(torch.randn(5, 3, 8, 8), torch.arange(5))
    subnets = objective.sampler.sample(0, position.stream("subnets"))
    module.eval()  # Batch statistics that stand still: one run after another has the same.
    parts = [
        torch.nn.functional.cross_entropy(module.supernet(batch.images[place::2], subnet), batch.labels[place::2], label_smoothing=0.1)
        for place, subnet in enumerate(subnets)
    ]
    torch.testing.assert_close(objective.loss(module, batch, position), 3 / 5 * parts[0] + 2 / 5 * parts[1])


def started(digits, how, recipe=QUICK):
    objective = SupernetObjective(SPACE, how)
    mixer = make_mixer(recipe, img_size=8, patch_size=token_size(SPACE.largest))
    setup = Setup(model=SPACE.largest, recipe=recipe, dataset=digits, process=ALONE, mixer=mixer, autocast=nullcontext)
    return objective, objective.start(setup), Position(seed=0, epoch=0, step=0, part=0, num_parts=1, rank=0, world_size=1)


def test_distillation_pulls_subnets_to_the_largest_network(digits):
    how = SupernetTraining(num_subnets=2, unlock_share=0.0, distillation_weight=0.75)
    objective, module, position = started(digits, how)
    plain = SupernetObjective(SPACE, replace(how, distillation_weight=0.0))
    plain.setup, plain.sampler, plain.supernet = objective.setup, objective.sampler, objective.supernet
    batch = Batch(torch.randn(8, 3, 8, 8), torch.arange(8))
    logits = module(objective.sampler.sample(0, position.stream("subnets")), batch.images).detach()
    hard = plain.loss(module, batch, position).detach()
    loss = objective.loss(module, batch, position).detach()
    assert module.supernet.training
    with torch.no_grad():
        taught = module.supernet.eval().network(batch.images).log_softmax(dim=1)
    divergence = (taught.exp() * (taught - logits.log_softmax(dim=1))).sum(dim=1).mean()
    assert divergence > 0
    # rtol: the running batch statistics moved between the two runs in training mode.
    torch.testing.assert_close(loss, 0.25 * hard + 0.75 * divergence, rtol=1e-2, atol=1e-4)


def test_a_learning_supernet_learns_and_reports_its_curves(digits, tmp_path):
    """All in one: the evaluator's metrics, its curves, and the supernet that a later phase loads."""
    curves: dict[str, list[float]] = {}
    context = Context(
        seed=0,
        dataset=digits,
        recipe=replace(QUICK, epochs=6, batch_size=64, lr=1e-2),
        workdir=tmp_path,
        report=lambda name, value, step: curves.setdefault(name, []).append(value),
    )
    values = train_supernet(SPACE.largest, context, settings())
    names = {metric.name for metric in evaluators.get("supernet").metrics}
    assert values.keys() == names
    assert values["random_val_top1_pct"] > 18, "chance is 10"
    for name in names:
        assert len(curves[name]) == 6
        assert curves[name][-1] == values[name]
    found = load_supernet(tmp_path, space=SPACE)
    images, labels = digits.val, digits.labels[digits.val]
    smallest = SPACE.subnet(SPACE.smallest_point)
    assert top1_pct(predict(found.at(smallest), digits, images, device="cpu"), labels) == values["smallest_val_top1_pct"]
    largest, model = load_model(tmp_path / "model.pt")
    assert model == SPACE.largest
    assert top1_pct(predict(largest, digits, images, device="cpu"), labels) == values["largest_val_top1_pct"]
    # What a retraining from inherited weights starts from.
    weights = weights_from(tmp_path / "model.pt", smallest)
    assert "slices of the supernet's" in weights.changes
    # A worker lost in a later evaluator does not train again.
    assert train_supernet(SPACE.largest, replace(context, report=pytest.fail), settings()) == values


def test_a_loaded_supernet_is_the_mapped_file(digits, tmp_path):
    context = Context(seed=0, dataset=digits, recipe=replace(QUICK, epochs=1), workdir=tmp_path)
    train_supernet(SPACE.largest, context, settings())
    found = load_supernet(tmp_path)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(tmp_path / "model.pt"))]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    assert all(any(low <= tensor.data_ptr() < high for low, high in ranges) for tensor in found.parameters())


def test_random_subnets_are_the_same_in_every_training():
    assert random_subnets(SPACE) == random_subnets(resnas())
    assert len(set(random_subnets(SPACE))) == 4


# What is refused

OTHER = replace(SPACE, stages=(replace(SPACE.stages[0], widths=(12, 8)), SPACE.stages[1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"space": ""}, "supernet.space is empty"),
        ({"space": "{"}, "supernet.space is no JSON"),
        ({"space": "vit_resnas/tine"}, "did you mean 'vit_resnas/tiny'"),
        (
            {"space": json.dumps(autoformer().to_json())},
            "the network is not the largest of space 'autoformer': stages has 2 entries, not 1",
        ),
        ({"sampling": "sandwich", "num_subnets": 1}, "sampling 'sandwich' with 1 subnets a step; allowed: from 2"),
        ({"num_subnets": 300}, "300 subnets a step need an image each; batch_size 256 gives 256"),
        ({"recipe": replace(QUICK, compile=True)}, "recipe: compile is True; a supernet"),
        ({"recipe": replace(QUICK, freeze=1)}, "recipe: freeze is 1; a supernet"),
        ({"recipe": replace(QUICK, layer_decay=0.5)}, "recipe: layer_decay is 0.5; a supernet"),
        ({"recipe": None}, "supernet needs a recipe"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, dict) else "",
)
def test_what_can_never_be_trained_is_refused_before_the_training(digits, tmp_path, change, words):
    change = dict(change)
    context = Context(seed=0, dataset=digits, recipe=change.pop("recipe", QUICK), workdir=tmp_path)
    with pytest.raises(SpecError) as refused:
        train_supernet(SPACE.largest, context, replace(settings(), **change))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_subnets": 0}, "num_subnets is 0; allowed: whole numbers from 1"),
        ({"unlock_share": 1.5}, "unlock_share is 1.5; allowed: from 0 to 1"),
        ({"distillation_weight": 1.0}, "distillation_weight is 1.0; allowed: from 0 to below 1"),
        ({"checkpoint_every_s": math.nan}, "checkpoint_every_s is nan"),
    ],
)
def test_settings_out_of_range_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        settings(**change)


def test_the_checkpoint_of_another_supernet_is_refused_with_the_difference(tmp_path):
    with pytest.raises(EvaluationError, match=r"holds no trained supernet: model\.pt is missing"):
        load_supernet(tmp_path)
    supernet = supernet_of(SPACE)
    save_model(tmp_path / "model.pt", supernet.network, SPACE.largest)
    with pytest.raises(EvaluationError, match="holds a network and no supernet"):
        load_supernet(tmp_path)
    save_model(tmp_path / "model.pt", supernet.network, SPACE.largest, space=json.dumps(SPACE.to_json()))
    with pytest.raises(SpecError, match=r"the supernet of another space: stages\[0\].widths is \[12, 10, 8\], not \[12, 8\]"):
        load_supernet(tmp_path, space=OTHER)
    images, subnet = torch.randn(2, 3, 8, 8), drawn(SPACE, 0)
    torch.testing.assert_close(load_supernet(tmp_path, space=SPACE)(images, subnet), supernet(images, subnet))


# Two processes

TRAIN_TOGETHER = """
import json, sys
from pathlib import Path
import psutil
sys.path.insert(0, "tests")
from supernets import resnas
from space.recipe import Recipe
from space.search_space import Candidate
from workers.evaluate import Job
from workers.evaluator import Call
from workers.evaluators.supernet import SupernetSettings
from workers.pool import Finished, RayPool
from workers.resources import Resources

folder, space = Path(sys.argv[1]), resnas()
recipe = Recipe(epochs=4, batch_size=128, lr=2e-3, warmup_epochs=1, flip=False, ema_decay=0.9, mixing="patch_tokens")
settings = SupernetSettings(space=json.dumps(space.to_json()), checkpoint_every_s=0.0)

def job(trial):
    return Job(
        trial=trial,
        candidate=Candidate(model=space.largest, recipe=recipe),
        calls=(Call("supernet", settings),),
        seed=0,
        data="digits",
        data_fingerprint="digits",
        workdir=folder / str(trial),
        resources=Resources(processes=2),
    )

def outcome_of(trial, is_killed):
    pool.submit(job(trial))
    while True:
        if is_killed and list(folder.glob(f"{trial}/checkpoints-*/step-*")):
            names = {each: " ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])}
            mine = [each for each, name in names.items() if name.startswith("ray::RayTrainWorker") and me in each.parents()]
            mine[0].kill()
            is_killed = False
        for event in pool.poll(0.1):
            if isinstance(event, Finished):
                assert not is_killed
                return dict(event.outcome.values)

me = psutil.Process()
pool = RayPool(address="local")
pool.check(Resources(processes=2))
values = [outcome_of(trial, is_killed) for trial, is_killed in ((0, False), (1, True))]
pool.close()
print(json.dumps(values))
"""


@pytest.mark.slow
def test_two_processes_under_ray_train_one_of_them_killed_end_with_the_bits_of_an_uninterrupted_training(tmp_path):
    """Each process draws subnets of its own, so that one touches weights that the other does not."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", TRAIN_TOGETHER, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, interrupted = json.loads(done.stdout.splitlines()[-1])
    assert whole == interrupted
    assert set(whole) == {metric.name for metric in evaluators.get("supernet").metrics}
    first, second = (load_supernet(tmp_path / trial) for trial in ("0", "1"))
    assert bits(first) == bits(second)
    assert bits(first) != bits(Supernet(SPACE.largest))

"""The linear probe: pooling and head on the cached tokens of a frozen backbone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from space.model import build_model
from space.recipe import Recipe
from space.reductions import with_reductions
from space.registry import SpecError
from space.spec import ArchSpec, BlockSpec, Component, StageSpec
from space.timm_spec import TimmSpec
from workers.checkpoints import load_model, save_model
from workers.data import load_dataset
from workers.evaluator import Context, EarlierTrial, EvaluationError, evaluators
from workers.evaluators.linear_probe import LinearProbeSettings, cached_tokens, check_same_but_pooling, linear_probe
from workers.evaluators.train import TrainSettings, train_network
from workers.inference import mean_nll, predict, top1_pct
from workers.weights import weights_from

POOLINGS = {
    "class_token": Component("class_token"),
    "mean": Component("mean"),
    "relu_mean": Component("relu_mean"),
    "max": Component("max"),
    "gem": Component("gem"),
    "gem_frozen": Component("gem", learned=False),
    "ggem": Component("ggem", groups=4),
}
QUICK = LinearProbeSettings(epochs=10)


def vit(pooling="mean", embed_dim=32):
    block = BlockSpec(mixer=Component("attention", num_heads=2, head_dim=16), feed_forward=Component("mlp", hidden_dim=64))
    return ArchSpec(
        stages=(StageSpec(embed_dim=embed_dim, blocks=(block,) * 2),),
        img_size=16,
        num_classes=10,
        patch_embed=Component("conv", kernel=4, stride=4),
        prefix=Component("class_token"),
        position=Component("learned"),
        pooling=POOLINGS[pooling],
    )


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("digits", img_size=16)


@pytest.fixture(scope="module")
def backbone(dataset, tmp_path_factory):
    """The folder of a trained backbone that pools by the mean, and what its training measured."""
    folder = tmp_path_factory.mktemp("backbone")
    recipe = Recipe(epochs=12, batch_size=64, lr=5e-3, warmup_epochs=1, label_smoothing=0.0, crop="none", flip=False)
    return folder, train_network(vit(), Context(seed=0, dataset=dataset, recipe=recipe, workdir=folder), TrainSettings())


@pytest.fixture
def probe(dataset, backbone, tmp_path):
    """A function from a pooling to what its probe measured, reported, and left as predictions."""

    def run(pooling, settings=QUICK, *, seed=0, model=None, data=None, exponent_lr_scale=10.0):
        reported = {}
        context = Context(
            seed=0,
            dataset=data or dataset,
            recipe=Recipe(epochs=1, seed=seed, exponent_lr_scale=exponent_lr_scale),
            earlier={"backbone": (EarlierTrial(number=0, workdir=backbone[0], key="backbone"),)},
            workdir=tmp_path / f"{pooling}-{seed}",
            report=lambda name, value, step: reported.setdefault(name, []).append((step, value)),
        )
        values = linear_probe(model or vit(pooling), context, settings)
        return values, reported, dict(np.load(context.workdir / "artifacts" / "predictions.npz"))

    return run


def test_cached_tokens_under_the_backbones_own_pooling_and_head_are_its_logits(dataset, backbone):
    weights = backbone[0] / "model.pt"
    network, _ = load_model(weights)
    tokens = cached_tokens(network, weights, dataset, device="cpu", dtype="float32")
    ids = np.concatenate([dataset.train, dataset.val, dataset.test])
    assert tokens.shape == (len(ids), 1 + 16, 32)
    with torch.no_grad():
        logits = network.get_submodule("head")(network.get_submodule("pooling")(torch.from_numpy(tokens))).numpy()
    # atol: float32, other batches
    assert np.allclose(logits, predict(network, dataset, ids, device="cpu"), atol=1e-4)


def test_tokens_are_computed_once_for_a_backbone_and_anew_for_another(dataset, backbone, tmp_path):
    network, spec = load_model(backbone[0] / "model.pt")
    save_model(tmp_path / "model.pt", network, spec)

    def files():
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.glob("tokens-*.npy")}

    first = cached_tokens(network, tmp_path / "model.pt", dataset, device="cpu", dtype="float32")
    before = files()
    second = cached_tokens(network, tmp_path / "model.pt", dataset, device="cpu", dtype="float32")
    assert len(before) == 1
    assert files() == before
    assert np.array_equal(first, second)
    other = build_model(spec, seed=1).eval()
    save_model(tmp_path / "model.pt", other, spec)
    third = cached_tokens(other, tmp_path / "model.pt", dataset, device="cpu", dtype="float32")
    assert len(files()) == 2
    assert not np.array_equal(first, third)
    assert not list(tmp_path.glob(".tokens-*"))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling_is_probed_and_its_predictions_give_its_metrics_again(probe, dataset, pooling):
    values, reported, stored = probe(pooling)
    assert set(values) == {metric.name for metric in evaluators.get("linear_probe").metrics}
    assert stored["ids"].tolist() == dataset.test.tolist()
    assert stored["labels"].tolist() == dataset.labels[dataset.test].tolist()
    assert values["test_top1_pct"] == top1_pct(stored["logits"], stored["labels"])
    assert values["test_nll"] == pytest.approx(mean_nll(stored["logits"], stored["labels"]))
    losses = [value for _, value in reported["train_loss"]]
    assert len(losses) == QUICK.epochs
    assert losses[-1] < losses[0]
    assert stored["train_loss"].tolist() == losses


def test_a_probe_with_the_backbones_own_pooling_is_about_as_good_as_the_backbone(probe, backbone):
    values, _, _ = probe("mean", LinearProbeSettings())
    assert values["test_top1_pct"] > backbone[1]["test_top1_pct"] - 3


def test_the_backbone_is_left_as_it_was(probe, backbone):
    before = (backbone[0] / "model.pt").read_bytes()
    probe("ggem")
    assert (backbone[0] / "model.pt").read_bytes() == before


def test_equal_probes_are_equal_and_seeds_differ(probe):
    first, again, other = (probe("gem", seed=seed)[2]["logits"] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_global_generators_are_left_as_they_were(probe):
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    probe("gem")
    assert (torch.rand(1), np.random.rand()) == expected


def test_exponents_are_learned_where_the_pooling_learns_them(probe):
    learned = {name: points for name, points in probe("ggem")[1].items() if name.startswith("exponent_")}
    assert sorted(learned) == [f"exponent_{group}" for group in range(4)]
    assert all(step == QUICK.epochs and value != 3.0 for ((step, value),) in learned.values())
    assert not any(name.startswith("exponent_") for name in probe("gem_frozen")[1])


def test_an_exponent_that_hardly_learns_gives_what_a_frozen_one_gives(probe):
    # The frozen pooling is computed once before the training, the learned one in every step.
    _, _, frozen = probe("gem_frozen")
    _, _, slow = probe("gem", exponent_lr_scale=1e-9)
    _, _, fast = probe("gem")
    assert np.allclose(frozen["logits"], slow["logits"], atol=1e-3)
    assert not np.allclose(frozen["logits"], fast["logits"], atol=1e-2)


def test_exponents_have_no_weight_decay(probe):
    heavy = replace(QUICK, weight_decay=30.0)
    _, reported, _ = probe("gem", heavy, exponent_lr_scale=1e-9)
    assert reported["exponent_0"] == [(QUICK.epochs, pytest.approx(3.0, abs=1e-6))]


def test_an_image_that_a_seed_did_not_draw_has_no_say(probe, dataset):
    labels = dataset.labels.copy()
    labels[dataset.train[0]] = (labels[dataset.train[0]] + 1) % 10
    relabelled = replace(dataset, labels=labels)

    def num_unmoved(subsample):
        brief = replace(QUICK, epochs=2, subsample=subsample)
        pairs = [[probe("max", brief, seed=seed, data=data)[2]["logits"] for data in (dataset, relabelled)] for seed in range(6)]
        return sum(np.array_equal(*pair) for pair in pairs)

    assert 0 < num_unmoved(0.5) < 6
    assert num_unmoved(1.0) == 0


def test_half_precision_tokens_take_half_the_space_and_change_little(probe, backbone):
    single, half = (probe("ggem", replace(QUICK, dtype=dtype))[0] for dtype in ("float32", "float16"))
    sizes = sorted(path.stat().st_size for path in backbone[0].glob("tokens-*.npy"))
    assert sizes[-1] == pytest.approx(2 * sizes[0], rel=1e-3)
    assert half["test_nll"] == pytest.approx(single["test_nll"], rel=1e-2)


def test_another_architecture_is_refused_with_the_difference_named(probe, dataset):
    with pytest.raises(SpecError, match=r"stages is .* there and .* here"):
        probe("gem", model=vit("gem", embed_dim=64))
    with pytest.raises(SpecError, match=r'position is \["learned"\] there and null here'):
        probe("gem", model=replace(vit("gem"), position=None))
    with pytest.raises(SpecError, match="models of timm and subnets have none"):
        probe("gem", model=TimmSpec(name="vit_tiny_patch16_224", img_size=16, num_classes=10))


def test_a_study_without_a_backbone_is_refused(dataset, tmp_path):
    context = Context(seed=0, dataset=dataset, recipe=Recipe(epochs=1), workdir=tmp_path)
    with pytest.raises(SpecError, match="unknown earlier phase 'backbone'"):
        linear_probe(vit("gem"), context, QUICK)
    untrained = {"backbone": (EarlierTrial(number=0, workdir=tmp_path, key="untrained"),)}
    with pytest.raises(EvaluationError, match="phase 'backbone' left no trained network"):
        linear_probe(vit("gem"), replace(context, earlier=untrained), QUICK)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ({"subsample": "0"}, "subsample is 0.0; allowed: above 0 to 1"),
        ({"epochs": "0"}, "epochs is 0; allowed"),
        ({"dtype": "int8"}, "allowed: float32, float16"),
    ],
)
def test_settings_out_of_range_are_refused(assignment, words):
    with pytest.raises(ValueError, match=words):
        evaluators.get("linear_probe").parse_settings(assignment)


def test_a_backbone_whose_tokens_have_sizes_is_refused():
    merging = with_reductions(vit(), {1: Component("mctf", r=4)})
    with pytest.raises(SpecError, match="linear_probe keeps tokens without their sizes"):
        check_same_but_pooling(merging, merging)


def test_a_network_probed_on_its_own_weights_is_a_backbone_with_its_own_pooling(dataset, backbone, probe, tmp_path):
    values, _, left = probe("mean")
    context = Context(
        seed=0,
        dataset=dataset,
        recipe=Recipe(epochs=1, seed=0),
        weights=weights_from(backbone[0] / "model.pt", vit()),
        workdir=tmp_path / "own",
    )
    own = linear_probe(vit(), context, QUICK)
    assert own == pytest.approx(values, abs=1e-4)  # sums in another order
    there = dict(np.load(tmp_path / "own" / "artifacts" / "predictions.npz"))
    assert (there["ids"] == left["ids"]).all()
    assert 100 * there["val_correct"].mean() == pytest.approx(own["val_top1_pct"])


def test_the_weights_of_a_timm_network_stay_and_its_classifier_learns(dataset, tmp_path):
    model = TimmSpec(name="test_vit", img_size=16, num_classes=10)
    torch.save(build_model(model, seed=3).state_dict(), tmp_path / "test_vit.pth")
    weights = weights_from(tmp_path, model, "timm:test_vit")
    context = Context(seed=0, dataset=dataset, recipe=Recipe(epochs=1), weights=weights, workdir=tmp_path / "timm")
    assert linear_probe(model, context, QUICK)["val_top1_pct"] > 30  # chance is 10

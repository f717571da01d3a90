"""Robustness curves of a trained network, and their figure."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy.stats import t

from results.curves import area_pct, mean_and_half_width, read_curves
from results.figures.robustness import write_html, write_png
from space.model import build_model
from space.recipe import Recipe
from space.spec import ArchSpec, BlockSpec, Component, StageSpec
from workers.checkpoints import load_model, save_model
from workers.corruptions import cell_counts, other_class_partners, random_orders
from workers.data import IMAGENET_MEAN, IMAGENET_STD, load_dataset
from workers.evaluator import Context, EvaluationError
from workers.evaluators.robustness import RobustnessSettings, robustness
from workers.evaluators.train import TrainSettings, train_network

CURVES = {"patch_mix_coarse": 6, "patch_mix_fine": 6, "patch_drop": 5, "permutation": 4}


def vit(**parts):
    block = BlockSpec(mixer=Component("attention", num_heads=2, head_dim=16), feed_forward=Component("mlp", hidden_dim=64))
    given = {"position": Component("learned"), "pooling": Component("mean"), **parts}
    return ArchSpec(
        stages=(StageSpec(embed_dim=32, blocks=(block,) * 2),),
        img_size=16,
        num_classes=10,
        patch_embed=Component("conv", kernel=4, stride=4),
        **given,
    )


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("digits", img_size=16)


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """The context of a trial whose network is trained, what was measured, and what was reported of the curves."""
    reported = {}
    context = Context(
        seed=0,
        dataset=dataset,
        recipe=Recipe(epochs=12, batch_size=64, lr=5e-3, warmup_epochs=1, label_smoothing=0.0, crop="none", flip=False),
        workdir=tmp_path_factory.mktemp("trial"),
        report=lambda name, value, step: reported.setdefault(name, []).append((step, value)),
    )
    values = {**train_network(vit(), context, TrainSettings()), **robustness(vit(), context, RobustnessSettings())}
    return context, values, reported


@pytest.fixture(scope="module")
def stored(trained):
    return dict(np.load(trained[0].workdir / "artifacts" / "robustness.npz"))


def measured_again(trained, tmp_path, settings, seed=0):
    context, _, _ = trained
    network, spec = load_model(context.workdir / "model.pt")
    save_model(tmp_path / "model.pt", network, spec)
    values = robustness(vit(), Context(seed=seed, dataset=context.dataset, workdir=tmp_path), settings)
    return values, dict(np.load(tmp_path / "artifacts" / "robustness.npz"))


def test_the_clean_level_of_every_curve_is_the_accuracy_of_the_training(trained, stored):
    context, values, _ = trained
    assert stored["ids"].tolist() == context.dataset.test.tolist()
    for name, num_levels in CURVES.items():
        assert stored[name].shape == (len(stored["ids"]), num_levels)
        assert stored[name].dtype == bool
        assert 100 * stored[name][:, 0].mean() == pytest.approx(values["test_top1_pct"], abs=1e-9)


def test_areas_are_trapezoids_over_the_shares_really_replaced(trained, stored):
    _, values, _ = trained
    assert stored["patch_mix_coarse_levels"].tolist() == [0, 12.5, 18.75, 31.25, 37.5, 50]
    assert stored["permutation_levels"].tolist() == [0, 2, 4, 6]
    for name in CURVES:
        x, y = stored[f"{name}_levels"], 100 * stored[name].mean(axis=0)
        area = sum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(len(x) - 1)) / (x[-1] - x[0])
        assert values[f"{name}_auc_pct"] == pytest.approx(area, abs=1e-9)
    both = values["patch_mix_coarse_auc_pct"] + values["patch_mix_fine_auc_pct"]
    assert values["patch_mix_auc_pct"] == pytest.approx(both / 2, abs=1e-9)


def test_a_trained_network_loses_accuracy_with_the_information(trained, stored):
    _, values, _ = trained
    assert values["test_top1_pct"] > 60
    for name in CURVES:
        accuracy = 100 * stored[name].mean(axis=0)
        assert accuracy[-1] < accuracy[0] - 5


def test_curves_are_reported_over_percent_and_over_tiles(trained, stored):
    _, _, reported = trained
    assert [step for step, _ in reported["patch_drop_top1_pct"]] == [0, 20, 41, 59, 80]
    assert [step for step, _ in reported["permutation_top1_pct"]] == [1, 4, 16, 64]
    for name in CURVES:
        accuracy = (100 * stored[name].mean(axis=0)).tolist()
        assert [value for _, value in reported[f"{name}_top1_pct"]] == pytest.approx(accuracy)


def test_each_level_is_what_the_network_says_of_the_image_corrupted_by_hand(trained, stored):
    context, _, _ = trained
    dataset, ids = context.dataset, stored["ids"][:40]
    network, _ = load_model(context.workdir / "model.pt")
    partners = other_class_partners(ids, dataset.test, dataset.labels, seed=0)
    mean, std = np.array(IMAGENET_MEAN).reshape(3, 1, 1), np.array(IMAGENET_STD).reshape(3, 1, 1)

    def normalised(which):
        return (dataset.load(np.array([which]))[0] / 255 - mean) / std

    def is_correct(image, label):
        with torch.no_grad():
            return network(torch.tensor(image[None], dtype=torch.float32)).argmax().item() == label

    for row, (image_id, partner) in enumerate(zip(ids, partners, strict=True)):
        label = dataset.labels[image_id]
        level, count = 4, cell_counts((0.4,), 64)[0]
        mixed, dropped = normalised(image_id), normalised(image_id)
        for cell in random_orders(np.array([image_id]), 64, seed=0, name="patch_mix_fine")[0, :count].tolist():
            place = (slice(None), slice(cell // 8 * 2, cell // 8 * 2 + 2), slice(cell % 8 * 2, cell % 8 * 2 + 2))
            mixed[place] = normalised(partner)[place]
        for cell in random_orders(np.array([image_id]), 64, seed=0, name="patch_drop")[0, : cell_counts((0.8,), 64)[0]].tolist():
            dropped[:, cell // 8 * 2 : cell // 8 * 2 + 2, cell % 8 * 2 : cell % 8 * 2 + 2] = 0
        assert stored["patch_mix_fine"][row, level] == is_correct(mixed, label)
        assert stored["patch_drop"][row, -1] == is_correct(dropped, label)


def test_neither_the_batches_nor_the_seed_of_the_trial_change_what_an_image_meets(trained, stored, tmp_path):
    _, again = measured_again(trained, tmp_path, RobustnessSettings(batch_size=37), seed=5)
    assert all(np.array_equal(again[name], stored[name]) for name in stored)


def test_an_image_meets_the_same_in_a_part_of_the_test_images(trained, stored, tmp_path):
    _, part = measured_again(trained, tmp_path, RobustnessSettings(max_images=50))
    assert len(set(part["ids"])) == 50
    rows = [stored["ids"].tolist().index(each) for each in part["ids"]]
    for name in CURVES:
        assert np.array_equal(part[name], stored[name][rows])


def test_another_seed_corrupts_otherwise(trained, stored, tmp_path):
    _, other = measured_again(trained, tmp_path, RobustnessSettings(seed=1))
    for name in CURVES:
        assert np.array_equal(other[name][:, 0], stored[name][:, 0])
        assert not np.array_equal(other[name][:, -1], stored[name][:, -1])


def test_a_network_without_positions_does_not_notice_that_its_patches_are_shuffled(dataset, tmp_path):
    model = vit(position=None)
    save_model(tmp_path / "model.pt", build_model(model, seed=0), model)
    robustness(model, Context(seed=0, dataset=dataset, workdir=tmp_path), RobustnessSettings())
    permuted = np.load(tmp_path / "artifacts" / "robustness.npz")["permutation"]
    # 4 and 16 tiles are whole patches of 4 pixels; 64 tiles of 2 pixels are not.
    assert (permuted[:, :3] == permuted[:, :1]).all()


def test_without_a_trained_network_it_says_what_to_put_before_it(dataset, tmp_path):
    with pytest.raises(EvaluationError, match="--evaluators train,robustness"):
        robustness(vit(), Context(seed=0, dataset=dataset, workdir=tmp_path), RobustnessSettings())


@pytest.mark.parametrize(("coarse", "fine"), [(3, 8), (4, 0), (8, 4), (4, 5)])
def test_grids_that_do_not_fit_the_image_are_refused(coarse, fine):
    with pytest.raises(ValueError, match=f"coarse_grid {coarse} and fine_grid {fine}; allowed: two divisors of img_size 16"):
        RobustnessSettings(coarse_grid=coarse, fine_grid=fine).grids(16)


def test_the_curves_of_seeds_are_read_together_and_those_of_other_levels_refused(trained, stored, tmp_path):
    first, second, other = (tmp_path / f"{name}.npz" for name in ("first", "second", "other"))
    np.savez(first, **stored)
    np.savez(second, **{**stored, "patch_drop": ~stored["patch_drop"]})
    np.savez(other, **{**stored, "patch_drop_levels": stored["patch_drop_levels"] + 1})
    levels, accuracy = read_curves([first, second])["patch_drop"]
    assert levels.tolist() == stored["patch_drop_levels"].tolist()
    assert np.allclose(accuracy, [100 * stored["patch_drop"].mean(axis=0), 100 * (~stored["patch_drop"]).mean(axis=0)])
    with pytest.raises(ValueError, match=r"other\.npz and .*first\.npz were measured at different levels of patch_drop"):
        read_curves([first, other])


def test_the_area_is_the_mean_height():
    levels = np.array([0.0, 10.0, 50.0])
    assert area_pct(levels, np.array([[70.0, 70, 70], [100, 80, 0]])).tolist() == [70, (10 * 90 + 40 * 40) / 50]


def test_the_band_is_students_interval_over_seeds():
    accuracy = np.random.default_rng(0).normal(80, 3, size=(5, 4))
    mean, half_width = mean_and_half_width(accuracy)
    low, high = t.interval(0.95, 4, loc=accuracy.mean(axis=0), scale=accuracy.std(axis=0, ddof=1) / np.sqrt(5))
    assert np.allclose([mean - half_width, mean + half_width], [low, high])
    assert mean_and_half_width(accuracy[:1])[1] is None


def test_the_page_names_every_point_and_loads_nothing(tmp_path):
    levels = np.array([0.0, 50.0])
    curves = {
        "A <1>": {"patch_drop": (levels, np.array([[90.0, 40.0], [92.0, 50.0]]))},
        "B": {"patch_drop": (levels, np.array([[80.0, 70.0]])), "permutation": (np.array([0.0, 2.0, 4.0]), np.array([[80.0, 60, 30]]))},
    }
    write_html(curves, tmp_path / "plot.html", title="Two & more", chance_pct=10)
    page = (tmp_path / "plot.html").read_text()
    body = ElementTree.fromstring(page[page.index("<body>") : page.index("</html>")])
    hover = [each.text for each in body.iter("{http://www.w3.org/2000/svg}title")]
    assert len(hover) == 2 + 2 + 3
    assert hover[1] == "A <1>\nPatch drop, dropped cells (%): 50\naccuracy 45.00 ± 63.53 %, mean of 2 seeds"
    assert hover[-1] == "B\nPatch permutation, shuffled tiles: 16\naccuracy 30.00 %"
    assert "<script" not in page
    assert "src=" not in page


def test_the_picture_has_the_width_of_the_readme(trained, tmp_path):
    from PIL import Image

    context, _, _ = trained
    with Image.open(context.workdir / "artifacts" / "robustness.png") as image:
        assert 1790 <= image.width <= 1810
    many = {f"network {number}": {"patch_drop": (np.array([0.0, 50.0]), np.full((2, 2), 50.0))} for number in range(9)}
    write_png(many, tmp_path / "many.png", title="Nine networks", chance_pct=10)
    with Image.open(tmp_path / "many.png") as image:
        assert image.format == "PNG"

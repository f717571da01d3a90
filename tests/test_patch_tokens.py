"""Patch-token mixing of ViT-ResNAS: what every token shows, its label, and the classifier that learns it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_mixing import constant_images, mixer

from space.model import build_model
from space.recipe import Recipe
from space.registry import SpecError
from space.timm_spec import TimmSpec
from workers.data import load_dataset
from workers.mixing import Mixed, token_loss
from workers.mixings.patch_tokens import draw_box, released_box
from workers.training import check_recipe, train

pytestmark = pytest.mark.usefixtures("one_thread")


def patch_tokens(**choices):
    return mixer("patch_tokens", img_size=32, patch_size=8, **choices)


@pytest.mark.parametrize("reference", [False, True])
def test_the_label_of_a_token_is_that_of_what_it_shows(reference):
    """A token of the first half shows one image, one of the second a blend of two."""
    images, order = constant_images(), torch.arange(8.0)
    boxes = 0
    for seed in range(30):
        mixed = patch_tokens(mixing_reference=reference).mix(images, seed)
        assert mixed.token_lam is not None
        shown = F.avg_pool2d(mixed.images, 8)[:, 0]
        expected = mixed.token_lam * order[:, None, None] + (1 - mixed.token_lam) * mixed.partner[:, None, None]
        torch.testing.assert_close(shown, expected, atol=1e-5, rtol=1e-5)
        met = mixed.partner != torch.arange(8)
        assert set(mixed.token_lam[:4][met[:4]].unique().tolist()) <= {0.0, 1.0}
        assert all(len(token_lam.unique()) == 1 for token_lam in mixed.token_lam[4:])
        assert set(mixed.partner[:4].tolist()) == {0, 1, 2, 3}, "partners are of the same half"
        boxes += bool((mixed.token_lam[:4] == 0).any())
    assert boxes > 20


def coverage(box, num_draws=4000):
    """`(4, 4)`: how often a box covers each cell."""
    generator, covered = np.random.default_rng(0), np.zeros((4, 4))
    for _ in range(num_draws):
        top, left, height, width = box(4, generator)
        covered[top : top + height, left : left + width] += 1
    return covered / num_draws


def test_the_released_boxes_never_cover_the_bottom_row_and_ours_cover_opposite_cells_alike():
    # atol: five standard deviations of a share of 4,000 draws
    tolerance = 5 * 0.5 / 4000**0.5
    released = coverage(released_box)
    # Measured on the released code, 20,000 draws, first column.
    assert np.allclose(released[:, 0], [0.50, 0.67, 0.50, 0.00], atol=tolerance)
    assert not released[3].any()
    ours = coverage(draw_box)
    for turned in (ours[::-1], ours[:, ::-1]):
        assert np.allclose(ours, turned, atol=1.5 * tolerance)
    assert ours.min() > 0.25
    assert ours.mean() == pytest.approx(0.5, abs=tolerance)


@pytest.mark.parametrize("grid", range(2, 9))
def test_a_box_lies_on_the_grid_and_is_neither_empty_nor_the_whole(grid):
    generator = np.random.default_rng(grid)
    sizes = set()
    for _ in range(300):
        top, left, height, width = draw_box(grid, generator)
        assert 0 <= top <= top + height <= grid
        assert 0 <= left <= left + width <= grid
        assert 0 < height * width < grid**2
        sizes.add((height, width))
        top, left, height, width = released_box(grid, generator)
        assert 0 <= top <= top + height <= grid
        assert 0 <= left <= left + width <= grid
    assert {(1, 1), (grid - 1, grid)} <= sizes or grid > 4


def test_the_loss_of_tokens_is_the_soft_target_cross_entropy_of_their_labels():
    labels, partner = torch.tensor([3, 1, 4]), torch.tensor([1, 2, 0])
    token_lam = torch.rand(3, 2, 2)
    mixed = Mixed(images=torch.zeros(3, 3, 8, 8), partner=partner, lam=token_lam.mean(dim=(1, 2)), token_lam=token_lam)
    logits = torch.randn(3, 4, 5)
    own, other = F.one_hot(labels, 5)[:, None], F.one_hot(labels[partner], 5)[:, None]
    lam = token_lam.reshape(3, 4, 1)
    targets = 0.9 * (lam * own + (1 - lam) * other) + 0.1 / 5
    expected = -(targets * logits.log_softmax(dim=2)).sum(dim=2).mean()
    torch.testing.assert_close(token_loss(logits, labels, mixed, 0.1), expected)
    plain = Mixed(images=mixed.images, partner=torch.arange(3), lam=torch.ones(3))
    torch.testing.assert_close(token_loss(logits, labels, plain, 0.0), F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(4)))


def test_the_classifier_of_tokens_is_trained_and_is_no_part_of_the_network(tiny_vit, tmp_path):
    dataset = load_dataset("digits", img_size=8)
    recipe = Recipe(epochs=2, batch_size=256, lr=2e-3, warmup_epochs=1, flip=False, mixing="patch_tokens", ema_decay=0.9)
    parts = {stop: train(tiny_vit, recipe, dataset, workdir=tmp_path, stop_after=stop) for stop in (1, None)}
    network = parts[None].network
    assert network.state_dict().keys() == build_model(tiny_vit, seed=0).state_dict().keys()
    saved = torch.load(next(parts[1].checkpoints.glob("step-*")), weights_only=True)["network"]
    assert saved["token_head.weight"].shape == (10, 16)
    assert saved["token_head.bias"].any()


@pytest.mark.parametrize(
    ("model", "recipe", "words"),
    [
        (TimmSpec(name="test_convnext", img_size=32, num_classes=10), {}, "the network has no square grid of them"),
        (TimmSpec(name="test_vit", img_size=32, num_classes=10), {}, "which labels tokens, takes networks of our components"),
        (None, {"mixing_grids": (2,)}, "mixing_grids is (2,); allowed: 4, the tokens per side of the last stage"),
    ],
)
def test_a_network_without_a_grid_of_tokens_is_refused(tiny_vit, model, recipe, words):
    with pytest.raises(SpecError) as refused:
        check_recipe(model or tiny_vit, Recipe(epochs=1, mixing="patch_tokens", **recipe))
    assert words in str(refused.value)
    with pytest.raises(SpecError, match="leaves no two cells to mix"):
        check_recipe(replace(tiny_vit, img_size=2), Recipe(epochs=1, mixing="patch_tokens"))

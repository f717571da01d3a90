import math
import pickle
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from space.randomness import stream
from space.recipe import Recipe
from space.registry import SpecError
from workers.mixing import (
    Mixed,
    attended_share,
    cell_count,
    draw_cells,
    grid_mix,
    make_mixer,
    mixed_loss,
    numpy_seeded,
    token_shares,
)
from workers.mixings import mixings
from workers.mixings.mixpro import confidence
from workers.mixings.transmix import nearest_tokens

METHODS = mixings.names()
GRID_METHODS = ("patch_mixing", "mask_mix", "mixpro")


def mixer(mixing, *, img_size=32, patch_size=4, batch_size=8, **choices):
    made = make_mixer(Recipe(epochs=1, mixing=mixing, batch_size=batch_size, **choices), img_size=img_size, patch_size=patch_size)
    assert made is not None
    return made


def constant_images(num_images=8, img_size=32):
    """Every pixel of image i is i."""
    return torch.arange(float(num_images)).view(-1, 1, 1, 1).repeat(1, 3, img_size, img_size)


def own_pixels(mixed):
    """(B, H, W) bool of `constant_images`; images that are their own partner left out."""
    order = torch.arange(len(mixed.images))
    met = mixed.partner != order
    return (mixed.images == order.view(-1, 1, 1, 1))[met][:, 0], met


def tokens(images, patch_size=4):
    """(B, N, 3 P P)"""
    return F.unfold(images, patch_size, stride=patch_size).transpose(1, 2)


def mixed_by(own, *, cell_size, partner=None, img_size=8):
    B = len(own)
    partner = torch.arange(B).flip(0) if partner is None else partner
    lam = token_shares(own, cell_size, img_size, 1)[:, 0]
    return Mixed(images=torch.zeros(B, 3, img_size, img_size), partner=partner, lam=lam, mask=own, cell_size=cell_size)


def global_states():
    return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()


# What every method keeps to.


@pytest.mark.parametrize("mixing", METHODS)
def test_same_seed_same_batch_whatever_the_threads(mixing):
    images = torch.rand(8, 3, 32, 32)
    made = mixer(mixing)
    threads = torch.get_num_threads()
    first = made.mix(images, stream(0, "mixing"))
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        second = made.mix(images, stream(0, "mixing"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.partner, second.partner)
    assert torch.equal(first.lam, second.lam)
    others = [made.mix(images, stream(seed, "mixing")) for seed in range(1, 4)]
    assert all(not torch.equal(first.images, other.images) for other in others)


@pytest.mark.parametrize("mixing", METHODS)
def test_global_generators_and_the_given_images_stay_as_they_were(mixing):
    images = torch.rand(8, 3, 32, 32)
    made, kept = mixer(mixing), images.clone()
    before = global_states()
    made.mix(images, 5)
    assert global_states() == before
    assert torch.equal(images, kept)


def test_numpy_is_as_it_was_also_after_an_error():
    before = np.random.get_state()[1].copy()
    with pytest.raises(ZeroDivisionError), numpy_seeded(2**64 - 1):
        _ = 1 / int(np.random.rand())
    assert np.array_equal(np.random.get_state()[1], before)


def test_all_64_bits_of_a_seed_seed_numpy():
    drawn = []
    for seed in (5, 5 + 2**40):
        with numpy_seeded(seed):
            drawn.append(np.random.rand())
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("mixing", METHODS)
def test_pixels_are_own_and_partner_weighed_by_lam(mixing):
    images = constant_images()
    for seed in range(20):
        mixed = mixer(mixing).mix(images, seed)
        theirs = mixed.partner.float()
        expected = mixed.lam * torch.arange(8.0) + (1 - mixed.lam) * theirs
        # The mean of an image is its lam-weighted label, to the rounding of a mean over 1,024 pixels.
        torch.testing.assert_close(mixed.images.mean(dim=(1, 2, 3)), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(mixed.partner.sort().values, torch.arange(8))
        assert mixed.lam.dtype is torch.float32
        assert ((mixed.lam >= 0) & (mixed.lam <= 1)).all()


@pytest.mark.parametrize("mixing", METHODS)
def test_an_image_that_is_its_own_partner_is_unchanged_and_has_lam_1(mixing):
    images = torch.rand(5, 3, 32, 32)
    seen = 0
    for seed in range(10):
        for reference in (False, True):
            mixed = mixer(mixing, mixing_reference=reference).mix(images, seed)
            alone = mixed.partner == torch.arange(5)
            assert torch.equal(mixed.images[alone], images[alone])
            assert (mixed.lam[alone] == 1).all()
            seen += int(alone.sum())
    assert seen


@pytest.mark.parametrize("mixing", METHODS)
def test_without_luck_a_batch_stays_whole(mixing):
    images = torch.rand(8, 3, 32, 32)
    mixed = mixer(mixing, mixing_prob=0.0).mix(images, 0)
    assert mixed.images is images
    assert torch.equal(mixed.partner, torch.arange(8))
    assert torch.equal(mixed.lam, torch.ones(8))
    assert mixed.mask is None


@pytest.mark.parametrize("mixing", METHODS)
def test_mixing_prob_is_the_share_of_mixed_batches(mixing):
    made, images = mixer(mixing, mixing_prob=0.3), torch.rand(2, 3, 32, 32)
    num_mixed = sum(made.mix(images, stream("share", seed)).images is not images for seed in range(400))
    # Five standard deviations of 400 draws.
    assert abs(num_mixed / 400 - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 400)


@pytest.mark.parametrize("mixing", METHODS)
def test_the_loss_of_an_unmixed_batch_is_smoothed_cross_entropy(mixing):
    made, labels = mixer(mixing, mixing_prob=0.0), torch.arange(8)
    mixed, logits = made.mix(torch.rand(8, 3, 32, 32), 0), torch.randn(8, 10)
    loss = made.loss(logits, labels, mixed, torch.rand(8, 64), 0.1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, label_smoothing=0.1))


class CountedBytes(TorchDispatchMode):
    """Adds up what every operation allocates, whether or not it is freed again: no less than the peak."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        made = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        self.num_bytes += sum(storage.nbytes() for pointer, storage in made.items() if pointer not in given)
        return result


@pytest.mark.parametrize("mixing", METHODS)
def test_mixing_allocates_at_most_three_copies_of_the_batch(mixing):
    images = torch.rand(32, 3, 64, 64)
    made, most = mixer(mixing, img_size=64, patch_size=8), 0
    for seed in range(6):
        with CountedBytes() as counted:
            made.mix(images, seed)
        most = max(most, counted.num_bytes)
    assert images.nbytes <= most <= (1.5 if mixing in GRID_METHODS else 2.5) * images.nbytes


@pytest.mark.gpu
@pytest.mark.parametrize("mixing", METHODS)
def test_a_device_mixes_as_the_cpu_does_and_is_never_waited_for(mixing):
    images, labels, made = torch.rand(8, 3, 32, 32), torch.arange(8), mixer(mixing)
    on_cpu = made.mix(images, 3)
    there = [tensor.cuda() for tensor in (images, labels, torch.randn(8, 10), torch.rand(8, 64).softmax(dim=1))]
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_device = made.mix(there[0], 3)
        made.loss(there[2], there[1], on_device, there[3], 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Mixup multiplies, which a device may fuse; the others copy.
    torch.testing.assert_close(on_device.images.cpu(), on_cpu.images, atol=1e-6 if "mixup" in mixing else 0, rtol=0)
    assert torch.equal(on_device.partner.cpu(), on_cpu.partner)
    assert torch.equal(on_device.lam.cpu(), on_cpu.lam)


# The grid.


@pytest.mark.parametrize("img_size", [8, 10])
def test_grid_mix_takes_whole_cells_and_crops_the_last(img_size):
    own = torch.tensor([[[True, False], [False, True]]]).repeat(2, 1, 1)
    mixed = grid_mix(constant_images(2, img_size), own, torch.tensor([1, 0]), 6)
    expected = torch.ones(img_size, img_size)
    expected[:6, :6] = 0
    expected[6:, 6:] = 0
    assert torch.equal(mixed[0], expected.expand(3, -1, -1))
    assert torch.equal(mixed[1], 1 - expected.expand(3, -1, -1))


@pytest.mark.parametrize("cell_size", [4, 8, 12])
def test_all_cells_own_is_identity_and_none_is_a_full_swap(cell_size):
    images, partner = torch.rand(4, 3, 32, 32), torch.tensor([2, 0, 3, 1])
    grid = math.ceil(32 / cell_size)
    assert torch.equal(grid_mix(images, torch.ones(4, grid, grid, dtype=torch.bool), partner, cell_size), images)
    assert torch.equal(grid_mix(images, torch.zeros(4, grid, grid, dtype=torch.bool), partner, cell_size), images[partner])


@given(grid=st.integers(1, 9), share=st.floats(0, 1), seed=st.integers(0, 2**64 - 1))
def test_every_image_has_exactly_k_cells(grid, share, seed):
    k = round(share * grid**2)
    cells = draw_cells(3, grid, k, torch.Generator().manual_seed(seed))
    assert cells.shape == (3, grid, grid)
    assert torch.equal(cells.sum(dim=(1, 2)), torch.full((3,), k))


def test_cells_are_drawn_for_each_image_and_equally_likely():
    cells = draw_cells(4000, 3, 4, torch.Generator().manual_seed(0))
    assert len(cells.flatten(1).unique(dim=0)) == math.comb(9, 4)
    assert chisquare(cells.sum(dim=0).flatten().numpy()).pvalue > 0.01


def draws(rule, n, num_draws=20_000):
    r = torch.rand(num_draws, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    return np.array([cell_count(value, n, rule) for value in r])


@pytest.mark.parametrize("n", [4, 9, 16])
def test_reference_k_is_uniform_on_1_to_n_and_biased_to_the_own_image(n):
    k = draws("ceil", n)
    assert chisquare(np.bincount(k, minlength=n + 1)[1:]).pvalue > 0.01
    # Five standard errors of the mean of a uniform law.
    assert (k / n).mean() == pytest.approx(1 / 2 + 1 / (2 * n), abs=5 / math.sqrt(12 * len(k)))


@pytest.mark.parametrize("n", [4, 9, 16])
def test_default_k_is_uniform_on_1_to_n_minus_1_and_unbiased(n):
    k = draws("uniform", n)
    assert len(np.bincount(k)) == n
    assert chisquare(np.bincount(k)[1:]).pvalue > 0.01
    assert (k / n).mean() == pytest.approx(1 / 2, abs=5 / math.sqrt(12 * len(k)))


@pytest.mark.parametrize("n", [4, 16, 49])
def test_patch_mixing_k_is_the_nearest_in_1_to_n_minus_1_and_unbiased(n):
    k = draws("round", n)
    expected = np.full(n - 1, len(k) / n)
    expected[[0, -1]] *= 1.5
    assert chisquare(np.bincount(k, minlength=n)[1:], expected).pvalue > 0.01
    assert (k / n).mean() == pytest.approx(1 / 2, abs=5 / math.sqrt(12 * len(k)))


@pytest.mark.parametrize("rule", ["ceil", "round", "uniform"])
@given(r=st.floats(0, 1, exclude_max=True), n=st.integers(4, 4096))
def test_k_never_swaps_an_image_whole(rule, r, n):
    assert 1 <= cell_count(r, n, rule) <= (n if rule == "ceil" else n - 1)


@pytest.mark.parametrize("mixing", ["mask_mix", "mixpro"])
@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_every_token_of_a_mask_mix_image_comes_from_one_source(mixing, patch_size):
    images = torch.rand(8, 3, 32, 32)
    for grids in ((), (2,), (3,)) if patch_size < 8 else ((), (2,)):
        for seed in range(10):
            mixed = mixer(mixing, patch_size=patch_size, mixing_grids=grids).mix(images, seed)
            mine = (tokens(mixed.images, patch_size) == tokens(images, patch_size)).all(dim=2)
            theirs = (tokens(mixed.images, patch_size) == tokens(images[mixed.partner], patch_size)).all(dim=2)
            assert (mine | theirs).all()


@pytest.mark.parametrize("mixing", ["cutmix", "transmix"])
def test_cutmix_cuts_through_tokens(mixing):
    images, num_cut = torch.rand(8, 3, 32, 32), 0
    for seed in range(50):
        mixed = mixer(mixing).mix(images, seed)
        mine = (tokens(mixed.images) == tokens(images)).all(dim=2)
        theirs = (tokens(mixed.images) == tokens(images[mixed.partner])).all(dim=2)
        num_cut += not (mine | theirs).all()
    assert num_cut > 40


@pytest.mark.parametrize("mixing", GRID_METHODS)
@pytest.mark.parametrize("grid", [2, 3, 4])
def test_lam_is_the_exact_share_of_pixels(mixing, grid):
    made = mixer(mixing, mixing_grids=(grid,))
    for seed in range(10):
        mixed = made.mix(constant_images(), seed)
        own, met = own_pixels(mixed)
        assert torch.equal(mixed.lam[met], own.float().mean(dim=(1, 2)))
        pixels = mixed.mask.repeat_interleave(mixed.cell_size, 1).repeat_interleave(mixed.cell_size, 2)[:, :32, :32]
        assert torch.equal(pixels[met], own)


def test_default_lam_of_mask_mix_favours_neither_image():
    images, lam = torch.zeros(16, 3, 8, 8), []
    made = mixer("mask_mix", img_size=8, patch_size=1, mixing_grids=(3,))
    for seed in range(600):
        mixed = made.mix(images, stream("lam", seed))
        lam.append(mixed.lam[mixed.partner != torch.arange(16)].mean().item())
    # k is shared by a batch: five standard errors over 600 batches.
    assert np.mean(lam) == pytest.approx(0.5, abs=5 * np.std(lam) / math.sqrt(600))
    assert max(lam) < 1


def test_reference_label_is_the_share_of_the_uncropped_grid():
    # 32 px in cells of 12: the third of each side is cropped to 8. For k = 6 of n = 9 the released code labels all images .667.
    made = mixer("mask_mix", mixing_grids=(3,), mixing_reference=True, batch_size=64)
    images, seen = constant_images(64), []
    for seed in range(60):
        mixed = made.mix(images, seed)
        own, met = own_pixels(mixed)
        k = mixed.mask[met].sum(dim=(1, 2)).unique().item()
        assert torch.equal(mixed.lam[met], torch.full((int(met.sum()),), k / 9))
        if k == 6:
            seen.append(own.float().mean(dim=(1, 2)))
    shares = torch.cat(seen)
    # Without the larger cells 12 x 12, without the cropped ones 8 x 8: three of 144 px against 8 x 8, 8 x 12 and 12 x 8 px.
    assert shares.min() == pytest.approx(1 - 3 * 144 / 1024)
    assert shares.max() == pytest.approx(1 - (64 + 96 + 96) / 1024)
    assert (shares.min().round(decimals=3).item(), shares.max().item()) == pytest.approx((0.578, 0.750))


def test_reference_mask_mix_leaves_one_in_n_batches_whole():
    made, images = mixer("mask_mix", mixing_grids=(2,), mixing_reference=True), constant_images(4)
    num_whole = sum(torch.equal(made.mix(images, stream("whole", seed)).lam, torch.ones(4)) for seed in range(600))
    # And the identity permutation, one in 24 of the rest.
    expected = 1 / 4 + 3 / 4 / 24
    assert abs(num_whole / 600 - expected) < 5 * math.sqrt(expected * (1 - expected) / 600)


@pytest.mark.parametrize(("img_size", "grids"), [(224, {7, 14}), (32, {4, 8})])
def test_patch_mixing_draws_from_a_coarse_and_a_fine_grid(img_size, grids):
    made, images = mixer("patch_mixing", img_size=img_size, patch_size=None), torch.zeros(2, 3, img_size, img_size)
    drawn = [made.mix(images, stream("grid", seed)).mask.shape[-1] for seed in range(100)]
    assert set(drawn) == grids
    assert 25 < drawn.count(min(grids)) < 75


@pytest.mark.parametrize("mixing", GRID_METHODS)
def test_the_drawn_cells_are_as_many_in_every_image_and_of_the_named_owner(mixing):
    made = mixer(mixing, mixing_grids=(4,))
    for seed in range(10):
        of_own, of_partner = (replace(made, drawn=drawn).mix(constant_images(), seed) for drawn in ("own", "partner"))
        met = of_own.partner != torch.arange(8)
        assert torch.equal(of_own.mask[met], ~of_partner.mask[met])
        k = cells_of(seed, made.rule)
        assert (of_own.mask[met].sum(dim=(1, 2)) == k).all()
    assert made.drawn == ("partner" if mixing == "patch_mixing" else "own")


def cells_of(seed, rule):
    """k of 16 cells: the third draw, after whether to mix and which grid."""
    r = torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))[2].item()
    return cell_count(r, 16, rule)


@pytest.mark.parametrize(
    ("img_size", "patch_size", "cell_size"),
    [(224, 14, 56), (224, 16, 64), (224, None, 56), (32, 4, 8), (32, 16, 16), (8, 1, 2), (48, 16, 16)],
)
def test_mask_mix_has_about_four_cells_per_side_of_whole_patches(img_size, patch_size, cell_size):
    assert mixer("mask_mix", img_size=img_size, patch_size=patch_size).cell_sizes == (cell_size,)


# Shares of tokens.


def test_token_shares_of_aligned_cells_are_the_repeated_cells():
    own = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = own.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1).float()
    assert torch.equal(token_shares(own, 8, 32, 64), expected)


def test_token_shares_of_cropped_cells_are_those_of_the_released_code():
    # Cells of 12 px are 3 patches of 4 px; the last is cropped to 2 patches.
    own = torch.rand(5, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = own.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :8, :8].flatten(1).float()
    assert torch.equal(token_shares(own, 12, 32, 64), expected)


@given(img_size=st.integers(4, 40), cell_size=st.integers(1, 20), tokens=st.integers(1, 12), seed=st.integers(0, 99))
def test_token_shares_are_areas(img_size, cell_size, tokens, seed):
    grid = math.ceil(img_size / cell_size)
    own = torch.rand(2, grid, grid, generator=torch.Generator().manual_seed(seed)) < 0.5
    shares = token_shares(own, cell_size, img_size, tokens**2)
    fine = own.repeat_interleave(cell_size, 1).repeat_interleave(cell_size, 2)[:, :img_size, :img_size]
    fine = fine.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2).double()
    torch.testing.assert_close(shares.double(), F.avg_pool2d(fine, img_size).flatten(1), atol=1e-6, rtol=0)
    # The mean over tokens is the share of the image.
    torch.testing.assert_close(shares.mean(dim=1), token_shares(own, cell_size, img_size, 1)[:, 0])


def test_autocast_does_not_round_areas():
    # bfloat16 holds whole numbers up to 256; the first row is 303 pixels wide.
    own = torch.tensor([[[True, True, True], [False, True, False], [False, False, True]]])
    with torch.autocast("cpu", torch.bfloat16):
        assert token_shares(own, 101, 303, 1).item() == pytest.approx(5 / 9, rel=1e-7)


@pytest.mark.parametrize(("img_size", "tokens"), [(32, 8), (32, 7), (30, 8)])
def test_nearest_tokens_are_those_of_nearest_interpolation(img_size, tokens):
    own = torch.rand(2, img_size, img_size, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = F.interpolate(own[:, None].float(), size=(tokens, tokens), mode="nearest").flatten(1)
    assert torch.equal(nearest_tokens(own, tokens**2), expected)


# Attention and labels.


def test_uniform_attention_gives_the_share_of_tokens():
    shares = torch.rand(4, 16) < 0.3
    torch.testing.assert_close(attended_share(torch.full((4, 16), 0.02), shares.float()), shares.float().mean(dim=1))
    torch.testing.assert_close(attended_share(torch.zeros(4, 16), shares.float()), shares.float().mean(dim=1))


def test_attention_on_own_cells_alone_gives_lam_attn_1():
    own = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(attended_share(own * 0.1, own.float()), torch.ones(4))
    assert (attended_share(~own * 0.1, own.float()) < 1e-30).all()


def test_the_labels_weights_are_one_between_them():
    row, shares = torch.rand(8, 16), torch.rand(8, 16)
    torch.testing.assert_close(attended_share(row, shares) + attended_share(row, 1 - shares), torch.ones(8))


@given(
    logits=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=2, max_size=2),
    lam=st.floats(0, 1, width=32),
    smoothing=st.floats(0, 0.9),
    labels=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_alpha_is_in_0_to_1(logits, lam, smoothing, labels):
    alpha = confidence(torch.tensor(logits), torch.tensor(labels), torch.tensor([1, 0]), torch.full((2,), lam), smoothing)
    assert ((alpha >= 0) & (alpha <= 1)).all()


@pytest.mark.parametrize("K", [10, 100, 1000])
def test_alpha_of_an_untrained_network_is_one_over_root_k_and_the_labels_length(K):
    labels, partner, lam = torch.tensor([0, 1]), torch.tensor([1, 0]), torch.full((2,), 0.3)
    target = mixup_target(labels, K, 0.3, smoothing=0.1)
    alpha = confidence(torch.zeros(2, K), labels, partner, lam, 0.1)
    torch.testing.assert_close(alpha, 1 / math.sqrt(K) / target.norm(dim=1))


@pytest.mark.parametrize("K", [5, 10, 100])
def test_alpha_of_the_label_itself_is_1_and_not_a_rounding_more(K):
    labels, partner = torch.arange(64) % K, torch.arange(64).flip(0)
    for lam in torch.linspace(0.1, 0.9, 50).tolist():
        target = mixup_target(labels, K, lam, smoothing=0.1)
        alpha = confidence(target.log(), labels, partner, torch.full((64,), lam), 0.1)
        torch.testing.assert_close(alpha, torch.ones(64))
        assert alpha.max() <= 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mixed_loss_is_timms_soft_target_cross_entropy(lam, smoothing):
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    expected = SoftTargetCrossEntropy()(logits, mixup_target(labels, 5, lam, smoothing))
    torch.testing.assert_close(mixed_loss(logits, labels, torch.arange(6).flip(0), torch.full((6,), lam), smoothing), expected)


def test_each_image_has_its_own_lam_and_partner():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    partner, lam = torch.tensor([2, 2, 1, 3]), torch.tensor([0.1, 0.9, 0.5, 1.0])
    one_by_one = [
        lam[i] * F.cross_entropy(logits[i], labels[i]) + (1 - lam[i]) * F.cross_entropy(logits[i], labels[partner[i]]) for i in range(4)
    ]
    torch.testing.assert_close(mixed_loss(logits, labels, partner, lam, 0.0), torch.stack(one_by_one).mean())


@pytest.mark.parametrize(("mixing", "alphas"), [("mixup", {"mixup_alpha": 0.8}), ("cutmix", {"mixup_alpha": 0.0, "cutmix_alpha": 1.0})])
def test_mixup_and_cutmix_are_timms(mixing, alphas):
    from timm.data import Mixup

    images, labels, logits = torch.rand(8, 3, 32, 32), torch.arange(8) % 5, torch.randn(8, 5)
    made = mixer(mixing)
    mixed = made.mix(images, 7)
    with numpy_seeded(7):
        expected, target = Mixup(**alphas, num_classes=5, label_smoothing=0.1)(images.clone(), labels)
    assert torch.equal(mixed.images, expected)
    torch.testing.assert_close(made.loss(logits, labels, mixed, None, 0.1), SoftTargetCrossEntropy()(logits, target))


def test_mixup_cutmix_is_one_of_them_at_even_odds():
    images = constant_images(2)
    mixed = [mixer("mixup_cutmix").mix(images, stream("switch", seed)).images for seed in range(300)]
    num_cut = sum(bool(((some == 0) | (some == 1)).all()) for some in mixed)
    assert abs(num_cut / 300 - 0.5) < 5 * math.sqrt(0.25 / 300)


# MixPro.

OWN = torch.tensor([[[True, True], [False, True]], [[True, False], [False, False]]])
LABELS = torch.tensor([0, 1])


def mixpro_loss(logits, class_row, *, smoothing=0.1, reference=False):
    return mixer("mixpro", img_size=8, patch_size=2, mixing_reference=reference).loss(
        logits, LABELS, mixed_by(OWN, cell_size=4), class_row, smoothing
    )


def test_at_alpha_0_progressive_labelling_is_off():
    # All of the prediction on a third class: its cosine with the unsmoothed label is 0.
    logits, mixed = torch.tensor([[-200.0, -200.0, 0.0]]).repeat(2, 1), mixed_by(OWN, cell_size=4)
    assert torch.equal(confidence(logits, LABELS, mixed.partner, mixed.lam, 0.0), torch.zeros(2))
    off = mixer("mask_mix").loss(logits, LABELS, mixed, None, 0.0)
    assert torch.equal(mixpro_loss(logits, torch.rand(2, 16), smoothing=0.0), off)


@pytest.mark.parametrize("reference", [False, True])
def test_uniform_attention_makes_mixpro_mask_mix_with_hard_labels_in_the_released_code(reference):
    logits, mixed = torch.randn(2, 5), mixed_by(OWN, cell_size=4)
    expected = mixed_loss(logits, LABELS, mixed.partner, mixed.lam, 0.0 if reference else 0.1)
    torch.testing.assert_close(mixpro_loss(logits, torch.full((2, 16), 1 / 17), reference=reference), expected)


@pytest.mark.parametrize("mixing", METHODS)
def test_labels_of_every_mixing_are_smoothed(mixing):
    """Likelihoods of two arms compare only if both were trained towards labels of the same smoothness."""
    sure = 50.0 * F.one_hot(LABELS, 5).float()
    all_own = mixed_by(torch.ones(2, 2, 2, dtype=torch.bool), cell_size=4)
    loss = mixer(mixing).loss(sure, LABELS, all_own, torch.full((2, 16), 1 / 16), 0.1)
    # -log p of the other classes is 50: the smoothed label has .02 of its mass on each of them.
    torch.testing.assert_close(loss, torch.tensor(4 * 0.02 * 50.0))


def test_mixpro_is_its_equations():
    torch.manual_seed(0)
    logits, row = torch.randn(2, 5), torch.rand(2, 16)
    token_mask = OWN.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1).double()
    target = torch.stack([mixup_target(LABELS, 5, lam, 0.1)[i] for i, lam in enumerate((3 / 4, 1 / 4))])
    total = 0.0
    for i, lam_area in enumerate((3 / 4, 1 / 4)):
        lam_attn = (token_mask[i] * row[i]).sum() / row[i].sum()
        p = logits[i].softmax(dim=0)
        alpha = (target[i] @ p) / (target[i].norm() * p.norm())
        lam = alpha * lam_attn + (1 - alpha) * lam_area
        own, other = (F.cross_entropy(logits[i], LABELS[j], label_smoothing=0.1) for j in (i, 1 - i))
        total += lam * own + (1 - lam) * other
    torch.testing.assert_close(mixpro_loss(logits, row).double(), total.double() / 2, atol=1e-6, rtol=0)


def gradient(reference):
    torch.manual_seed(0)
    logits, row = torch.randn(2, 5, requires_grad=True), torch.rand(2, 16, requires_grad=True)
    mixpro_loss(logits, row, reference=reference).backward()
    assert row.grad is None
    return logits.grad


def test_alpha_is_not_trained_unless_the_released_code_is_followed():
    torch.manual_seed(0)
    logits, row = torch.randn(2, 5, requires_grad=True), torch.rand(2, 16)
    mixed = mixed_by(OWN, cell_size=4)
    alpha = confidence(logits, LABELS, mixed.partner, mixed.lam, 0.1).detach()
    lam = mixed.lam + alpha * (attended_share(row, token_shares(OWN, 4, 8, 16)) - mixed.lam)
    mixed_loss(logits, LABELS, mixed.partner, lam, 0.1).backward()
    torch.testing.assert_close(gradient(reference=False), logits.grad)
    assert (gradient(reference=True) - logits.grad).abs().max() > 1e-5


@pytest.mark.parametrize("reference", [False, True])
def test_gradient_of_reference_mixpro_is_that_of_its_value(reference):
    torch.manual_seed(0)
    logits, row = torch.randn(2, 5), torch.rand(2, 16)
    grad, step = gradient(reference), 1e-2
    numeric = torch.zeros_like(logits)
    for i in range(2):
        for j in range(5):
            shift = torch.zeros_like(logits)
            shift[i, j] = step
            above, below = (mixpro_loss(logits + sign * shift, row, reference=reference) for sign in (1, -1))
            numeric[i, j] = (above - below) / (2 * step)
    # 1e-4: central differences in float32. Only with the gradient through alpha it is the derivative of the value.
    assert ((grad - numeric).abs().max() < 1e-4) == reference


# TransMix.


def boxed(*, top=0, bottom=4, left=2, right=8):
    own = torch.ones(8, 8, dtype=torch.bool)
    own[top:bottom, left:right] = False
    return mixed_by(own.expand(2, -1, -1), cell_size=1)


@pytest.mark.parametrize(("on_box", "lam_attn"), [(True, 0.0), (False, 1.0)])
def test_transmix_gives_half_of_the_label_to_what_is_attended(on_box, lam_attn):
    mixed, logits = boxed(), torch.randn(2, 3)
    box = ~mixed.mask[:, ::2, ::2].flatten(1)
    expected = mixed_loss(logits, LABELS, mixed.partner, (mixed.lam + lam_attn) / 2, 0.1)
    row = (box if on_box else ~box) * 0.05
    torch.testing.assert_close(mixer("transmix", img_size=8).loss(logits, LABELS, mixed, row, 0.1), expected)


def test_uniform_attention_leaves_the_label_of_cutmix():
    # The box cuts through tokens: by area that is exact, by the nearest pixel it is not.
    mixed, logits, row = boxed(top=1, bottom=4, left=3, right=8), torch.randn(2, 3), torch.full((2, 16), 0.05)
    expected = mixed_loss(logits, LABELS, mixed.partner, mixed.lam, 0.1)
    torch.testing.assert_close(mixer("transmix", img_size=8).loss(logits, LABELS, mixed, row, 0.1), expected)
    by_nearest = mixer("transmix", img_size=8, mixing_reference=True).loss(logits, LABELS, mixed, row, 0.1)
    # First pixels of tokens in the box: rows 2, columns 4 and 6, so 2 of 16 tokens.
    torch.testing.assert_close(by_nearest, mixed_loss(logits, LABELS, mixed.partner, (mixed.lam + 14 / 16) / 2, 0.1))


def test_transmix_mask_is_where_the_pixels_are_own():
    for seed in range(20):
        mixed = mixer("transmix").mix(constant_images(), seed)
        own, met = own_pixels(mixed)
        assert torch.equal(mixed.mask[met], own)
        assert torch.equal(mixed.partner, torch.arange(8).flip(0))


def test_transmix_pulls_no_gradient_through_the_attention():
    row = torch.rand(2, 16, requires_grad=True)
    loss = mixer("transmix", img_size=8).loss(torch.randn(2, 3, requires_grad=True), LABELS, boxed(), row, 0.1)
    loss.backward()
    assert row.grad is None


# What is registered.


NEW_MIXING = '''
from dataclasses import dataclass
import torch
from workers.mixing import Mixed, Mixer
from workers.mixings import mixing

@mixing("swap_halves")
@dataclass(frozen=True)
class SwapHalves(Mixer):
    """The lower half of the image is the partner's."""

    @classmethod
    def of(cls, recipe, *, img_size, patch_size):
        return cls()

    def mix(self, images, seed):
        mixed = images.clone()
        mixed[:, :, images.shape[-1] // 2 :] = images.flip(0)[:, :, images.shape[-1] // 2 :]
        return Mixed(images=mixed, partner=torch.arange(len(images)).flip(0), lam=torch.full((len(images),), 0.5))
'''
TRAINING = """
import math, sys
from pathlib import Path
import workers.mixings
workers.mixings.__path__.append(sys.argv[1])
assert "swap_halves" in workers.mixings.mixings.names() and "torch" not in sys.modules
from search.studies.ablations import LEVELS
assert LEVELS["mixing"][-2:] == ("mixpro", "swap_halves"), LEVELS
from space.catalog import resolve
from space.recipe import Recipe
from workers.data import load_dataset
from workers.training import train
recipe = Recipe.from_json({"epochs": 1, "batch_size": 1200, "mixing": "swap_halves", "warmup_epochs": 0.0})
model = resolve("vit_digits")
dataset = load_dataset("digits", img_size=model.img_size)
assert math.isfinite(train(model, recipe, dataset, workdir=Path(sys.argv[2])).losses[-1])
"""


def test_a_mixing_is_one_file(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "swap_halves.py").write_text(NEW_MIXING)
    command = [sys.executable, "-c", TRAINING, str(tmp_path / "package"), str(tmp_path / "work")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_mixing_has_a_summary():
    assert all(mixings.summary(name) for name in METHODS)


def test_an_unknown_mixing_is_answered_with_the_nearest():
    with pytest.raises(SpecError, match=r"unknown mixing 'cutmixx' in recipe; did you mean 'cutmix'.*known: cutmix, .*none"):
        mixer("cutmixx")


# What is refused.


def test_no_mixing_is_no_mixer():
    assert make_mixer(Recipe(epochs=1), img_size=32, patch_size=4) is None


@pytest.mark.parametrize("mixing", METHODS)
def test_only_attention_labels_need_the_class_row(mixing):
    assert mixer(mixing).needs_class_row == (mixing in ("transmix", "mixpro"))


@pytest.mark.parametrize("mixing", METHODS)
@pytest.mark.parametrize("parts", [1, 4])
def test_a_batch_of_one_is_refused(mixing, parts):
    with pytest.raises(SpecError, match="needs two images at a time"):
        mixer(mixing, batch_size=parts, num_accumulation=parts)


@pytest.mark.parametrize("mixing", GRID_METHODS)
def test_a_grid_finer_than_the_image_is_refused(mixing):
    with pytest.raises(SpecError, match=r"at 8 px: 9 cells per side do not fit; allowed: 2, "):
        mixer(mixing, img_size=8, patch_size=None, mixing_grids=(2, 9))


@pytest.mark.parametrize("mixing", ["mask_mix", "mixpro"])
def test_cells_that_cut_through_patches_are_refused(mixing):
    with pytest.raises(SpecError, match="8 cells per side of whole 8 px patches do not fit; allowed: 2, 4"):
        mixer(mixing, patch_size=8, mixing_grids=(8,))
    assert mixer(mixing, patch_size=None, mixing_grids=(8,)).cell_sizes == (4,)
    with pytest.raises(SpecError, match="a patch of 32 px leaves no two cells"):
        mixer(mixing, patch_size=32)


def test_an_image_without_default_grids_asks_for_some():
    with pytest.raises(SpecError, match="name its mixing_grids"):
        mixer("patch_mixing", img_size=31, patch_size=None)
    assert mixer("patch_mixing", img_size=31, patch_size=None, mixing_grids=(4,)).cell_sizes == (8,)


def test_a_process_with_one_image_of_a_batch_cannot_mix():
    recipe = Recipe(epochs=1, batch_size=4, mixing="mixup")
    assert make_mixer(recipe, img_size=32, patch_size=4, num_processes=2) is not None
    with pytest.raises(SpecError, match="batch_size 4 in 4 parts"):
        make_mixer(recipe, img_size=32, patch_size=4, num_processes=4)

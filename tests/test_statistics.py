"""Intervals, exact tests, equivalence and power of paired comparisons."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, permutation_test, ttest_1samp

from results.effects.statistics import (
    MAX_EXACT_SEEDS,
    Spread,
    holm,
    mcnemar_test,
    minimum_detectable_effect,
    paired_bootstrap,
    resample,
    shown_detectable_effect,
    sign_flip_detectable_effect,
    sign_flip_test,
    spread_of,
    t_test_power,
    tost,
)

NUM_EXPERIMENTS = 500
METHODS = ("calibrated", "percentile", "bca")
# Multiples of 1/16 add up exactly, so that a tie is a tie in every order of summing.
exact_values = st.lists(st.integers(-64, 64).map(lambda value: value / 16), min_size=2, max_size=8)


def crossed(generator: np.random.Generator, S: int, N: int, *, seeds: float, images: float, residual: float) -> np.ndarray:
    rows, columns = generator.normal(size=(S, 1)), generator.normal(size=(1, N))
    return seeds * rows + images * columns + residual * generator.normal(size=(S, N))


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_one_seed_is_scipys_bootstrap_of_its_images(method: str):
    values = np.random.default_rng(0).exponential(size=60)
    ours = paired_bootstrap(values[None], seed=0, num_resamples=40_000, method=method)  # pyright: ignore[reportArgumentType]
    theirs = bootstrap((values,), np.mean, n_resamples=40_000, method=method, rng=np.random.default_rng(1)).confidence_interval
    assert ours.estimate == pytest.approx(values.mean())
    # 40,000 resamples leave a standard error of about 1 % of the standard error in each end.
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.04 * values.std() / math.sqrt(60))
    assert ours.resampled == ("images",)


def test_a_resample_draws_seeds_and_the_same_images_for_all_of_them():
    D = crossed(np.random.default_rng(0), 6, 40, seeds=1, images=3, residual=0.5)
    generator = np.random.default_rng(1)
    means = [D[generator.integers(0, 6, 6)][:, generator.integers(0, 40, 40)].mean() for _ in range(20_000)]
    found = paired_bootstrap(D, seed=0, num_resamples=20_000, method="percentile")
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.04 * np.std(means))


def test_images_of_all_seeds_do_not_average_out():
    """Images are crossed with seeds: more seeds do not make the same hundred images more."""
    noise = np.random.default_rng(0).normal(size=(1, 100))
    one, many = (paired_bootstrap(np.repeat(noise, S, axis=0), seed=0, method="percentile") for S in (1, 16))
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.05)


def test_calibrated_is_students_interval_where_seeds_rule():
    values = np.random.default_rng(0).normal(size=12)
    found = paired_bootstrap(np.repeat(values[:, None], 5, axis=1), seed=0, num_resamples=40_000)
    exact = ttest_1samp(values, 0).confidence_interval(0.95)
    # Quantiles of means of 12 values are those of a normal to a few percent of the width.
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.05 * (exact.high - exact.low))


@pytest.mark.parametrize(("S", "seeds", "images"), [(3, 1.0, 1.0), (8, 1.0, 1.0), (5, 0.3, 5.0)])
def test_calibrated_intervals_cover_about_as_often_as_they_say(S: int, seeds: float, images: float):
    covered = 0
    for run in range(200):
        D = 0.7 + crossed(np.random.default_rng(run), S, 60, seeds=seeds, images=images, residual=1.0)
        found = paired_bootstrap(D, seed=run, num_resamples=500)
        covered += found.low <= 0.7 <= found.high
    # Nominal 95 %, standard error 1.5 %; a crossed bootstrap counts the residual thrice and may cover more.
    assert covered / 200 >= 0.90


@pytest.mark.parametrize("method", METHODS)
def test_equal_calls_are_equal_and_shifts_and_scales_carry_over(method):
    D = np.random.default_rng(0).normal(size=(4, 30))
    found, again = (paired_bootstrap(D, seed=3, num_resamples=500, method=method) for _ in range(2))
    moved = paired_bootstrap(100 + 2 * D, seed=3, num_resamples=500, method=method)
    assert found == again
    assert found.low < found.estimate < found.high
    expected = [100 + 2 * value for value in (found.estimate, found.low, found.high)]
    assert [moved.estimate, moved.low, moved.high] == pytest.approx(expected, abs=1e-5)  # float32 resamples


@pytest.mark.parametrize("method", METHODS)
def test_no_difference_anywhere_is_an_interval_of_nothing(method):
    found = paired_bootstrap(np.zeros((3, 10)), seed=0, num_resamples=100, method=method)
    assert (found.estimate, found.low, found.high) == (0, 0, 0)


def test_intervals_do_not_depend_on_the_chunk(monkeypatch):
    D = np.random.default_rng(0).normal(size=(3, 50))
    whole = paired_bootstrap(D, seed=0, num_resamples=300)
    monkeypatch.setattr("results.effects.statistics.CHUNK_ELEMENTS", 50 * 7)
    pieces = paired_bootstrap(D, seed=0, num_resamples=300)
    assert (pieces.low, pieces.high) == pytest.approx((whole.low, whole.high), abs=1e-6)  # float32 sum order


def test_many_differences_share_draws_and_are_each_what_they_are_alone():
    generator = np.random.default_rng(0)
    many = [generator.normal(size=shape) for shape in ((4, 30), (1, 30), (4, 12), (6, 30))]
    for D, found in zip(many, resample(many, seed=3, num_resamples=400), strict=True):
        for confidence in (0.9, 0.95):
            alone = paired_bootstrap(D, seed=3, num_resamples=400, confidence=confidence)
            shared = found.interval(confidence)
            assert (shared.low, shared.high) == pytest.approx((alone.low, alone.high), abs=1e-6)  # float32 sum order
            assert (shared.num_seeds, shared.num_images, shared.confidence) == (*D.shape, confidence)


def test_a_sum_of_differences_has_the_sum_of_their_deviations():
    """Contrasts over the same seeds and images are resampled together."""
    D = np.random.default_rng(0).normal(size=(2, 5, 40))
    one, other, both = resample([D[0], D[1], D[0] + D[1]], seed=0, num_resamples=100)
    assert both.deviations == pytest.approx(one.deviations + other.deviations, abs=1e-5)  # float32 products


@pytest.mark.parametrize(
    ("differences", "reason"),
    [
        (np.zeros(4), "got shape"),
        (np.zeros((0, 3)), "got shape"),
        (np.full((2, 2), np.nan), "4 of 4"),
        (np.zeros((1, 1)), "nothing can be"),
    ],
)
def test_what_has_no_interval_is_refused(differences: np.ndarray, reason: str):
    with pytest.raises(ValueError, match=reason):
        paired_bootstrap(differences, seed=0)


@settings(max_examples=40)
@given(exact_values, st.sampled_from(["two-sided", "greater", "less"]))
def test_sign_flips_are_scipys_exact_permutation_test(values, alternative):
    found = sign_flip_test(values, alternative=alternative)
    theirs = permutation_test((np.array(values),), np.sum, permutation_type="samples", alternative=alternative, n_resamples=np.inf)
    assert found.is_exact
    assert found.p_value == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize(("S", "one_sided"), [(1, 1 / 2), (3, 1 / 8), (5, 1 / 32), (6, 1 / 64)])
def test_the_smallest_p_is_what_unanimous_seeds_give(S: int, one_sided: float):
    values = 1 + np.random.default_rng(0).random(S)
    assert sign_flip_test(values, alternative="greater").p_value == one_sided == sign_flip_test(values, alternative="greater").smallest_p
    assert sign_flip_test(values).p_value == 2 * one_sided == sign_flip_test(-values).smallest_p
    assert sign_flip_test(values, alternative="less").p_value == 1


def test_sign_flips_reject_a_true_null_exactly_as_often_as_they_say():
    values = np.random.default_rng(0).random(7)
    p = np.array([sign_flip_test(values * signs).p_value for signs in itertools.product([1, -1], repeat=7)])
    # Without ties each of the 64 two-sided p-values comes twice.
    assert [(p <= level / 64).mean() for level in range(1, 65)] == [level / 64 for level in range(1, 65)]


def test_many_seeds_are_flipped_at_random():
    values = np.random.default_rng(0).normal(0.35, 1, size=MAX_EXACT_SEEDS + 1)
    exact_enough = ttest_1samp(values, 0).pvalue
    found = sign_flip_test(values, seed=1)
    assert not found.is_exact
    assert found == sign_flip_test(values, seed=1)
    assert found.p_value == pytest.approx(exact_enough, rel=0.1)
    assert sign_flip_test(values + 9).p_value == found.smallest_p


def test_all_zero_differences_reject_nothing():
    assert sign_flip_test([0.0] * 6).p_value == 1


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [[1.0], [2.0]]])
def test_sign_flips_need_finite_values_one_per_seed(values):
    with pytest.raises(ValueError, match="one per seed"):
        sign_flip_test(values)


def test_holm_is_the_textbook_example():
    # Wikipedia, "Holm-Bonferroni method", example: 0.01, 0.04, 0.03, 0.005 at 0.05 rejects the first and the last.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # 5 * .001, 4 * .008, 3 * .039, and never less than the one before.
    assert holm([0.001, 0.008, 0.039, 0.041, 0.042]) == pytest.approx([0.005, 0.032, 0.117, 0.117, 0.117])


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_lies_between_the_raw_values_and_bonferroni_in_the_same_order(p):
    adjusted = holm(p)
    assert all(raw <= one <= min(1, len(p) * raw) for raw, one in zip(p, adjusted, strict=True))
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_holm_refuses_what_is_no_probability():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([0.1, math.nan])


def test_tost_is_the_worse_of_two_t_tests():
    values = np.random.default_rng(0).normal(0.2, 0.5, size=9)
    sides = ttest_1samp(values, -1, alternative="greater").pvalue, ttest_1samp(values, 1, alternative="less").pvalue
    assert tost(values, 1.0) == pytest.approx(max(sides))
    assert tost(values + 5, 1.0) > 0.99
    assert math.isnan(tost([0.5, 0.5], 1.0))


def test_tost_needs_a_margin_and_two_seeds():
    with pytest.raises(ValueError, match="margin"):
        tost([1.0, 2.0], 0.0)
    with pytest.raises(ValueError, match="at least 2"):
        tost([1.0], 1.0)


@pytest.mark.parametrize(("effect", "n", "power"), [(0.5, 34, 0.8078), (0.8, 15, 0.8213), (0.2, 199, 0.8017)])
def test_power_is_that_of_published_tables(effect: float, n: int, power: float):
    # G*Power 3.1, matched pairs, two-sided, alpha .05: the smallest n for power .8 at d = .5, .8 and .2.
    assert t_test_power(effect, 1.0, n) == pytest.approx(power, abs=5e-4)
    assert t_test_power(effect, 1.0, n - 1) < 0.8


def test_power_is_how_often_the_test_rejects():
    values = np.random.default_rng(0).normal(1.0, 2.0, size=(20_000, 6))
    rejected = (ttest_1samp(values, 0, axis=1).pvalue <= 0.05).mean()
    assert t_test_power(1.0, 2.0, 6) == pytest.approx(rejected, abs=0.01)  # standard error .003


@pytest.mark.parametrize("n", [2, 3, 5, 20, 10_000])
def test_the_minimum_detectable_effect_has_the_power_it_was_asked_for(n: int):
    effect = minimum_detectable_effect(3.0, n)
    assert t_test_power(effect, 3.0, n) == pytest.approx(0.8, abs=1e-6)


def test_the_minimum_detectable_effect_of_many_is_the_normal_one():
    # (z_.975 + z_.8) / sqrt(n) = 2.8016 / 100
    assert minimum_detectable_effect(1.0, 10_000) == pytest.approx(0.028016, abs=1e-5)
    assert minimum_detectable_effect(1.0, 1) == math.inf
    assert math.isnan(minimum_detectable_effect(math.nan, 5))


@pytest.mark.parametrize(
    ("n", "alternative", "alpha"),
    [(6, "two-sided", 0.05), (5, "greater", 0.05), (8, "two-sided", 0.025), (9, "less", 0.01), (14, "greater", 0.05)],
)
def test_sign_flips_find_the_detectable_effect_as_often_as_they_say(n: int, alternative, alpha: float):
    effect = sign_flip_detectable_effect(2.0, n, alpha=alpha, alternative=alternative)
    values = (-effect if alternative == "less" else effect) + 2.0 * np.random.default_rng(1).normal(size=(600, n))
    rejected = np.mean([sign_flip_test(one, alternative=alternative).p_value <= alpha for one in values])
    assert rejected == pytest.approx(0.8, abs=0.05)  # standard error .016, of the simulated effect about the same


def test_sign_flips_that_cannot_reject_detect_nothing():
    assert [sign_flip_detectable_effect(1.0, n) for n in (1, 3, 5)] == [math.inf] * 3
    assert math.isfinite(sign_flip_detectable_effect(1.0, 6))
    assert sign_flip_detectable_effect(1.0, 6, alpha=0.05 / 2) == math.inf
    assert math.isnan(sign_flip_detectable_effect(math.nan, 6))
    assert math.isinf(sign_flip_detectable_effect(math.nan, 1))


@pytest.mark.parametrize("n", [6, 8, 12, 20])
def test_sign_flips_need_more_than_a_t_test_and_less_and_less(n: int):
    ratio = sign_flip_detectable_effect(1.0, n) / minimum_detectable_effect(1.0, n)
    assert 0.98 < ratio < {6: 1.4, 8: 1.1, 12: 1.05, 20: 1.03}[n]


@pytest.mark.parametrize(
    ("S", "N", "spread", "alternative", "alpha"),
    [
        (6, 360, Spread(seeds=3.0, images=20.0, cells=25.0), "two-sided", 0.05),
        (9, 360, Spread(seeds=1.0, images=25.0, cells=10.0), "two-sided", 0.05),
        (9, 1000, Spread(seeds=0.5, images=8.0, cells=20.0), "less", 0.05),
        (9, 360, Spread(seeds=3.0, images=5.0, cells=25.0), "two-sided", 0.05 / 9),
    ],
)
def test_the_effect_that_can_be_shown_is_shown_as_often_as_it_says(S: int, N: int, spread: Spread, alternative, alpha: float):
    """The rule itself, with the real test and the real interval, on other draws than those that the effect was computed from."""
    sign = -1 if alternative == "less" else 1
    effect = sign * shown_detectable_effect(spread, S, N, alpha=alpha, alternative=alternative)
    generator = np.random.default_rng(1)
    made = [
        effect + crossed(generator, S, N, seeds=spread.seeds, images=spread.images, residual=spread.cells) for _ in range(NUM_EXPERIMENTS)
    ]
    intervals = [found.interval(0.95) for found in resample(made, seed=0, num_resamples=1000)]
    rejected = [sign_flip_test(one.mean(axis=1), alternative=alternative).p_value <= alpha for one in made]
    is_beyond_0 = [interval.low > 0 if sign > 0 else interval.high < 0 for interval in intervals]
    is_shown = np.logical_and(rejected, is_beyond_0)
    # Three standard errors of a share of .8 in so many experiments, and one of the 4,000 simulated ones that the effect comes from.
    assert np.mean(is_shown) == pytest.approx(0.8, abs=3 * math.sqrt(0.16 / NUM_EXPERIMENTS) + math.sqrt(0.16 / 4000))


def test_what_the_rule_shows_is_larger_than_what_test_or_images_alone_find():
    spread = Spread(seeds=2.0, images=20.0, cells=20.0)
    by_seeds = sign_flip_detectable_effect(math.hypot(2.0, 20 / math.sqrt(360)), 9)
    by_images = minimum_detectable_effect(math.hypot(20.0, 20 / math.sqrt(9)), 360)
    assert shown_detectable_effect(spread, 9, 360) > 1.2 * max(by_seeds, by_images)
    only_seeds = shown_detectable_effect(Spread(seeds=2.0, images=0.0, cells=0.0), 9, 360)
    assert only_seeds == pytest.approx(sign_flip_detectable_effect(2.0, 9), rel=0.1)


def test_what_few_seeds_cannot_reject_cannot_be_shown():
    spread = Spread(seeds=1.0, images=1.0, cells=1.0)
    assert [shown_detectable_effect(spread, S, 100) for S in (1, 3, 5)] == [math.inf] * 3
    assert math.isfinite(shown_detectable_effect(spread, 6, 100))
    assert shown_detectable_effect(spread, 6, 100, alpha=0.05 / 2) == math.inf


def test_components_of_variance_are_those_that_were_put_in():
    found = spread_of(crossed(np.random.default_rng(0), 300, 400, seeds=2.0, images=5.0, residual=10.0))
    # Standard errors of standard deviations of 300 seeds, 400 images and their cells: 4 %, 4 %, .2 %.
    assert (found.seeds, found.images, found.cells) == pytest.approx((2.0, 5.0, 10.0), rel=0.12)
    assert found.cells == pytest.approx(10.0, rel=0.01)
    noise = spread_of(np.random.default_rng(1).normal(size=(4, 50)))
    assert min(noise.seeds, noise.images) >= 0
    with pytest.raises(ValueError, match="at least 2 seeds and 2 images, got 1 and 3"):
        spread_of(np.ones((1, 3)))


def of_counts(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = (both, only_first, only_second, neither)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


def test_mcnemar_is_a_coin_for_each_image_that_one_network_alone_has_right():
    # Two-sided sign test of 3 against 12: (1 + 15 + 105 + 455) / 2^15 twice.
    assert mcnemar_test(*of_counts(100, 3, 12, 20)) == pytest.approx(2 * 576 / 2**15)
    assert mcnemar_test(*of_counts(0, 12, 3, 500)) == pytest.approx(2 * 576 / 2**15), "only the images that differ count"
    assert mcnemar_test(*of_counts(10, 4, 4, 10)) == 1.0
    assert mcnemar_test(*of_counts(10, 0, 0, 10)) == 1.0


def test_mcnemar_takes_truth_values_of_the_same_images():
    with pytest.raises(ValueError, match="truth values over the same images"):
        mcnemar_test(np.array([100.0, 0.0]), np.array([100.0, 100.0]))
    with pytest.raises(ValueError, match="truth values over the same images"):
        mcnemar_test(np.array([True]), np.array([True, False]))

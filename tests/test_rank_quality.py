"""Kendall's tau-b, its bootstrap interval and the partial tau."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from results.formats import format_tau
from results.rank_quality import (
    agreement_table,
    kendall_tau,
    partial_kendall_tau,
    partial_rank_agreement,
    rank_agreement,
    resampled_partial_taus,
    resampled_taus,
)

pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=40)
triples = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=40)


@given(pairs)
def test_tau_is_scipys_with_ties_and_undefined_for_a_constant(values):
    x, y = np.array(values, dtype=float).T
    expected = kendalltau(x, y).statistic
    assert kendall_tau(x, y) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_tau_counts_agreeing_minus_disagreeing_pairs():
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx((5 - 1) / 6)
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1


@given(triples)
def test_a_resample_has_the_taus_of_the_networks_it_drew(values):
    x, y, z = np.array(values, dtype=float).T
    draws = np.random.default_rng(3).multinomial(len(x), np.full(len(x), 1 / len(x)), size=5)
    drawn = [[np.repeat(column, counts) for column in (x, y, z)] for counts in draws]
    direct = [kendall_tau(*columns[:2]) for columns in drawn]
    assert resampled_taus(x, y, draws) == pytest.approx(direct, abs=1e-12, nan_ok=True)
    partial = [partial_kendall_tau(*columns) for columns in drawn]
    # Dividing by up to 1e-6 blows up the rounding of the numerator.
    assert resampled_partial_taus(x, y, z, draws) == pytest.approx(partial, abs=1e-9, nan_ok=True)


def test_the_interval_covers_the_true_tau_about_as_often_as_it_says():
    correlation = 0.6
    # Kendall's tau of a bivariate normal is 2/pi asin(rho) (Greiner's relation).
    truth = 2 / math.pi * math.asin(correlation)
    covered = 0
    for seed in range(200):
        x, noise = np.random.default_rng(seed).normal(size=(2, 80))
        found = rank_agreement(x, correlation * x + math.sqrt(1 - correlation**2) * noise, seed=seed, num_resamples=300)
        covered += found.low <= truth <= found.high
    # 95 % nominal; 200 repeats have a standard error of 1.5 %.
    assert 0.90 <= covered / 200 <= 0.99


def test_the_interval_of_many_networks_is_that_of_the_full_bootstrap(monkeypatch):
    x, noise = np.random.default_rng(0).normal(size=(2, 1500))
    full = rank_agreement(x, x + noise, seed=0)
    monkeypatch.setattr("results.rank_quality.MAX_BOOTSTRAP_POINTS", 500)
    shrunk = rank_agreement(x, x + noise, seed=0)
    assert shrunk.tau == full.tau
    assert (shrunk.high - shrunk.low) / (full.high - full.low) == pytest.approx(1, abs=0.15)  # quantiles of 1000 resamples


def test_equal_calls_give_equal_intervals():
    x, y = np.random.default_rng(1).normal(size=(2, 50))
    assert rank_agreement(x, y, seed=5) == rank_agreement(x, y, seed=5)


def test_partial_tau_removes_what_both_share():
    z, first, second = np.random.default_rng(0).normal(size=(3, 3000))
    x, y = z + first, z + second
    assert kendall_tau(x, y) > 0.3
    # x and y are independent given z; partial tau is known to leave a small rest for continuous z.
    assert abs(partial_kendall_tau(x, y, z)) < 0.15
    assert math.isnan(partial_kendall_tau(x, y, x))


def test_partial_tau_is_kendalls_formula():
    x, y, z = [1, 2, 3, 4, 5], [2, 1, 3, 5, 4], [1, 3, 2, 5, 4]
    xy, xz, yz = 6 / 10, 6 / 10, 6 / 10
    assert [kendall_tau(x, y), kendall_tau(x, z), kendall_tau(y, z)] == pytest.approx([xy, xz, yz])
    assert partial_kendall_tau(x, y, z) == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)))


def test_the_interval_of_partial_tau_covers_the_true_one_about_as_often_as_it_says():
    def sample(seed: int, num: int) -> np.ndarray:
        z, first, second = np.random.default_rng(seed).normal(size=(3, num))
        return np.array([z + first, z + first + second, z])

    # Over 4000 networks the standard error is .01, a tenth of the interval's width at 60.
    truth = partial_kendall_tau(*sample(999, 4000))
    found = [partial_rank_agreement(*sample(seed, 60), seed=seed, num_resamples=300) for seed in range(200)]
    covered = sum(agreement.low <= truth <= agreement.high for agreement in found) / 200
    assert 0.88 <= covered <= 0.99


def test_partial_tau_is_undefined_where_z_is_one_of_the_two():
    x, y = np.random.default_rng(0).normal(size=(2, 20))
    found = partial_rank_agreement(x, y, x, seed=0)
    assert math.isnan(found.tau)
    assert math.isnan(found.low)


def test_the_table_has_a_row_per_score_and_baseline():
    frame = pd.DataFrame({"score": [1.0, 2, 3, 4, None], "params_m": [1.0, 2, 3, 4, 5], "depth": [4.0] * 5})
    table = agreement_table(frame, ["score"])
    assert table[["score", "baseline", "n"]].values.tolist() == [["score", "params_m", 4], ["score", "depth", 4]]
    assert table["tau"][0] == 1
    assert table.loc[0, ["low", "high"]].isna().all()
    assert table.loc[1, ["tau", "low", "high"]].isna().all()


def test_fewer_than_ten_networks_have_no_interval_and_the_table_says_so():
    frame = pd.DataFrame({"score": np.arange(10.0), "gmacs": np.arange(10.0), "depth": 4.0})
    few, enough = (agreement_table(frame.head(n), "score").to_dict("records") for n in (9, 10))
    assert [format_tau(row) for row in few] == ["too few networks (9 of 10)"] * 2
    assert [format_tau(row) for row in enough] == ["+1.00 [+1.00, +1.00]", "constant"]
    assert math.isnan(rank_agreement([1, 2], [1, 2], seed=0).high)

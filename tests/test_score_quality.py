"""What scores say of trained networks: every number against a direct computation, and verdicts on tables whose answer is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from results.rank_quality import kendall_tau, partial_kendall_tau
from results.score_quality import EQUAL_SIZE, judge, regret_at


def table(n: int = 60, seed: int = 0) -> pd.DataFrame:
    """Networks whose accuracy grows with their parameters, and with something else that is called `insight`."""
    generator = np.random.default_rng(seed)
    params = generator.uniform(5, 9, n)
    insight = generator.normal(size=n)
    return pd.DataFrame(
        {
            "params": params,
            "macs": params * generator.uniform(0.9, 1.1, n),
            "insight": insight,
            "size_again": params**2 + generator.normal(size=n),
            "noise": generator.normal(size=n),
            "steps": np.round(insight),
            "accuracy": params + 2 * insight + generator.normal(size=n) / 5,
        }
    )


def verdict_of(frame: pd.DataFrame, *scores: str):
    verdict = judge(frame, target="accuracy", scores=["params", "macs", *scores], trivial=["params", "macs"], params="params", macs="macs")
    return verdict, {one.score: one for one in verdict.qualities}


def test_tau_is_kendalls_tau_b_and_ties_count():
    frame = table()
    _, found = verdict_of(frame, "steps", "insight")
    for score in ("params", "steps", "insight"):
        assert found[score].tau.value == pytest.approx(kendall_tau(frame[score], frame["accuracy"]))
        assert found[score].tau.low < found[score].tau.value < found[score].tau.high


def test_tau_at_equal_size_looks_at_pairs_of_equal_size_alone():
    frame = table(30)
    verdict, found = verdict_of(frame, "steps")
    agreeing = x_untied = y_untied = pairs = 0
    for one, other in itertools.combinations(frame.to_dict("records"), 2):
        if abs(one["params"] - other["params"]) <= EQUAL_SIZE * max(one["params"], other["params"]):
            x, y = np.sign(one["steps"] - other["steps"]), np.sign(one["accuracy"] - other["accuracy"])
            agreeing, x_untied, y_untied, pairs = agreeing + x * y, x_untied + abs(x), y_untied + abs(y), pairs + 1
    assert verdict.num_equal_pairs == pairs
    assert found["steps"].tau_equal_size.value == pytest.approx(agreeing / math.sqrt(x_untied * y_untied))


def test_partial_tau_with_two_equal_controls_is_that_with_one():
    frame = table().assign(macs=lambda rows: 3 * rows["params"])
    _, found = verdict_of(frame, "insight")
    expected = partial_kendall_tau(frame["insight"], frame["accuracy"], frame["params"])
    assert found["insight"].partial_tau.value == pytest.approx(expected)
    assert math.isnan(found["params"].partial_tau.value)


def test_partial_tau_with_two_controls_is_kendalls_by_recursion():
    frame = table()
    _, found = verdict_of(frame, "insight")

    def partial(x: str, y: str) -> float:
        return partial_kendall_tau(frame[x], frame[y], frame["params"])

    xy, xm, ym = partial("insight", "accuracy"), partial("insight", "macs"), partial("accuracy", "macs")
    assert found["insight"].partial_tau.value == pytest.approx((xy - xm * ym) / math.sqrt((1 - xm**2) * (1 - ym**2)))


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_regret_averages_over_all_choices_among_ties(k: int):
    score = np.array([3.0, 2.0, 2.0, 2.0, 1.0, 1.0])
    target = np.array([70.0, 71.0, 74.0, 72.0, 75.0, 60.0])
    ways = []
    for chosen in itertools.combinations(range(6), k):
        left = [i for i in range(6) if i not in chosen]
        if not left or score[list(chosen)].min() >= score[left].max():
            ways.append(target.max() - target[list(chosen)].max())
    assert regret_at(k, score, target) == pytest.approx(np.mean(ways))


def test_a_score_that_knows_more_than_size_beats_the_baselines_and_one_that_repeats_size_does_not():
    verdict, found = verdict_of(table(), "insight", "size_again", "noise")
    assert verdict.beating == ("insight",)
    assert found["size_again"].tau.low > 0.1
    assert verdict.best_baseline in ("params", "macs")


def test_scores_of_noise_rarely_beat_the_baselines():
    frames = [table(40, seed).assign(accuracy=np.random.default_rng(1000 + seed).normal(size=40)) for seed in range(12)]
    # Five percent of 12 tables are 0.6; 4 or more have a probability below 1 %.
    assert sum(bool(verdict_of(frame, "insight")[0].beating) for frame in frames) < 4


def test_a_combination_is_worth_what_it_adds_on_networks_it_has_not_seen():
    added = verdict_of(table(80), "insight")[0].combination
    assert added is not None
    assert added.gain.low > 0
    nothing = table(80).assign(accuracy=np.random.default_rng(5).normal(size=80))
    overfitted = verdict_of(nothing, "insight", "noise", "steps", "size_again")[0].combination
    assert overfitted is not None
    assert overfitted.gain.low < 0 < overfitted.gain.high or abs(overfitted.tau.value) < 0.2


def test_a_network_without_a_score_is_left_out_for_that_score_alone():
    frame = table()
    frame.loc[frame.index[:7], "insight"] = np.nan
    _, found = verdict_of(frame, "insight")
    assert (found["insight"].num_networks, found["params"].num_networks) == (53, 60)
    assert found["insight"].tau.value == pytest.approx(kendall_tau(frame["insight"][7:], frame["accuracy"][7:]))


def test_too_few_networks_and_a_constant_target_are_refused():
    with pytest.raises(ValueError, match="9 networks have accuracy; at least 10"):
        verdict_of(table(9))
    with pytest.raises(ValueError, match="nothing to rank"):
        verdict_of(table().assign(accuracy=1.0))


def test_equal_calls_give_equal_numbers():
    assert verdict_of(table(), "insight")[0] == verdict_of(table(), "insight")[0]

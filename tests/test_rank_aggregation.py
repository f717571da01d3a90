import math

import numpy as np
import pytest

from results.rank_aggregation import nonlinear_rank_aggregation


def test_the_best_of_all_scores_has_0_and_others_the_logarithms_of_their_ranks():
    found = nonlinear_rank_aggregation({"a": [1.0, 5.0, 3.0], "b": [10.0, 30.0, 20.0]})
    assert found == pytest.approx([2 * math.log(1 / 3), 0.0, 2 * math.log(2 / 3)])


def test_a_network_that_is_poor_in_one_score_ranks_below_one_that_is_fair_in_both():
    extremes, fair, other = nonlinear_rank_aggregation({"a": [3.0, 2.0, 1.0], "b": [1.0, 2.0, 3.0]})
    assert extremes == pytest.approx(other)
    assert fair > extremes


def test_only_the_order_of_each_score_counts():
    scores = {"a": np.array([0.1, 0.5, -2.0, 3.0]), "b": np.array([4.0, 1.0, 2.0, 8.0])}
    stretched = {"a": np.exp(scores["a"]), "b": 7 * scores["b"] - 3}
    assert nonlinear_rank_aggregation(scores).tolist() == nonlinear_rank_aggregation(stretched).tolist()


def test_equal_values_share_their_mean_rank():
    assert nonlinear_rank_aggregation({"a": [1.0, 1.0]}) == pytest.approx([math.log(0.75)] * 2)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({}, "at least one network"),
        ({"a": []}, "at least one network"),
        ({"a": [1.0, 2.0], "b": [1.0]}, "a 2, b 1"),
        ({"a": [1.0, math.nan]}, "a of network 1"),
    ],
)
def test_a_population_that_has_no_ranks_is_refused(scores, words):
    with pytest.raises(ValueError, match=words):
        nonlinear_rank_aggregation(scores)

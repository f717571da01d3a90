"""Pareto fronts and ranks over several objectives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from results.records import Goal


def to_minimize(points: np.ndarray, goals: Sequence[Goal]) -> np.ndarray:
    """(n, objectives) values with the maximised columns negated."""
    return np.asarray(points, dtype=float) * np.array([1.0 if goal == "minimize" else -1.0 for goal in goals])


def pareto_front(costs: np.ndarray) -> np.ndarray:
    """Which rows of `costs` (n, objectives), all minimised, no other row dominates: (n,) bool.

    A row dominates another when it is nowhere worse and somewhere better, so equal rows stand or fall together. A row
    with a missing value is never on the front. n log n for one or two objectives, n times the front's size for more.
    """
    costs = np.asarray(costs, dtype=float)
    is_front = np.zeros(len(costs), dtype=bool)
    known = np.flatnonzero(~np.isnan(costs).any(axis=1))
    if len(known):
        is_front[known] = _plane_front(costs[known]) if costs.shape[1] <= 2 else _general_front(costs[known])
    return is_front


def _plane_front(costs: np.ndarray) -> np.ndarray:
    first, second = costs[:, 0], costs[:, -1]
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    # Row i survives if nobody with a smaller first cost reaches its second cost, and nobody with an equal one is below it.
    starts_group = np.r_[True, first[1:] != first[:-1]]
    group_start = np.maximum.accumulate(np.where(starts_group, np.arange(len(first)), 0))
    lowest_before = np.r_[np.inf, np.minimum.accumulate(second)[:-1]][group_start]
    survives = (second == second[group_start]) & ((second < lowest_before) | (group_start == 0))
    is_front = np.zeros(len(costs), dtype=bool)
    is_front[order] = survives
    return is_front


def _general_front(costs: np.ndarray) -> np.ndarray:
    order = np.lexsort(costs.T[::-1])
    front: list[int] = []
    for index in order:
        members = costs[front]
        if not ((members <= costs[index]).all(axis=1) & (members < costs[index]).any(axis=1)).any():
            front.append(int(index))
    is_front = np.zeros(len(costs), dtype=bool)
    is_front[front] = True
    return is_front


def mean_ranks(costs: np.ndarray) -> np.ndarray:
    """The mean over objectives of each row's rank (1 is best, ties share their mean rank): (n,).

    If one row dominates another its mean rank is smaller. A row with a missing value comes last in every objective.
    """
    from scipy.stats import rankdata

    is_missing = np.isnan(costs).any(axis=1, keepdims=True)
    return rankdata(np.where(is_missing, np.inf, costs), axis=0).mean(axis=1)


def front_first_ranks(costs: np.ndarray) -> np.ndarray:
    """Ranks from 1 on: the Pareto front first, then the other rows, each part by `mean_ranks`; equals share the best of theirs: (n,) int.

    A row that dominates another ranks above it.
    """
    from scipy.stats import rankdata

    score = mean_ranks(costs) + len(costs) * ~pareto_front(costs)
    return rankdata(score, method="min").astype(int)

"""One order of networks out of several scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def nonlinear_rank_aggregation(scores: Mapping[str, Sequence[float]]) -> np.ndarray:
    """The sum over scores of ln(rank / m) of each of m networks, `(m,)`; larger is better, 0 for a network that is best in all of them.

    Lee and Ham, "AZ-NAS", CVPR 2024, https://arxiv.org/abs/2403.19232: the logarithm punishes a network that is poor in one score
    more than it rewards one that is good in another. The rank of the largest value is m; equal values share their mean rank. A score of
    which less is better is given with its sign turned. AZ-NAS aggregates az_expressivity, az_progressivity, az_trainability and gmacs,
    of which more is better within a budget.

    The result depends on the whole population. Raises ValueError for no score or network, scores of different length, and values that
    are not finite.
    """
    from scipy.stats import rankdata

    columns = {name: np.asarray(values, dtype=float) for name, values in scores.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    if not lengths or not all(lengths.values()):
        raise ValueError("an aggregation of ranks needs scores of at least one network")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"scores of different numbers of networks: {', '.join(f'{name} {length}' for name, length in lengths.items())}")
    for name, column in columns.items():
        if not np.isfinite(column).all():
            raise ValueError(f"{name} of network {int(np.flatnonzero(~np.isfinite(column))[0])} is not finite; leave the network out")
    return np.sum([np.log(rankdata(column) / len(column)) for column in columns.values()], axis=0)

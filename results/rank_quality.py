"""How well one quantity ranks networks like another: Kendall's tau-b with its uncertainty.

tau-b is the share of agreeing minus disagreeing pairs, corrected for ties (Kendall, "The treatment of ties in ranking
problems", Biometrika 33, 1945); partial tau is Kendall, "Partial rank correlation", Biometrika 32, 1942.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from results.formats import MIN_NETWORKS

if TYPE_CHECKING:
    import pandas as pd

TRIVIAL_METRICS = ("length_distortion_closed_form", "closed_form", "params_m", "gmacs", "depth")
"""Numbers of a topology that cost nothing to know. An expensive score is worth its price only if it says more than these."""

MAX_BOOTSTRAP_POINTS = 1000


@dataclass(frozen=True, kw_only=True)
class RankAgreement:
    """tau-b of `num_points` pairs of values with the ends of its bootstrap interval.

    All are nan where tau is undefined, the ends also for fewer than `MIN_NETWORKS` points.
    """

    tau: float
    low: float
    high: float
    num_points: int


def kendall_tau(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Kendall's tau-b; nan if either argument is constant or has fewer than two values."""
    from scipy.stats import kendalltau

    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) != len(y):
        raise ValueError(f"tau needs values in pairs, got {len(x)} and {len(y)}")
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    result: Any = kendalltau(x, y)
    return float(result.statistic)


def partial_kendall_tau(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, z: Sequence[float] | np.ndarray) -> float:
    """Agreement of x and y after the part that both share with z is removed; nan if z orders one of them perfectly."""
    xy, xz, yz = kendall_tau(x, y), kendall_tau(x, z), kendall_tau(y, z)
    remaining = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / math.sqrt(remaining) if remaining > 1e-12 else math.nan


def rank_agreement(
    x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, *, seed: int, num_resamples: int = 1000, confidence: float = 0.95
) -> RankAgreement:
    """tau-b with its percentile bootstrap interval over networks.

    Above `MAX_BOOTSTRAP_POINTS` networks the interval is that of a random subset, its distance from tau shrunk by the
    square root of the subset's share (the width goes as one over the root of n).
    """
    return _with_interval(kendall_tau, resampled_taus, (x, y), seed, num_resamples, confidence)


def partial_rank_agreement(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    z: Sequence[float] | np.ndarray,
    *,
    seed: int,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> RankAgreement:
    """Partial tau of x and y given z with its interval, as `rank_agreement` makes it: networks are drawn as triples."""
    return _with_interval(partial_kendall_tau, resampled_partial_taus, (x, y, z), seed, num_resamples, confidence)


def _with_interval(
    statistic: Callable[..., float],
    resampled_statistic: Callable[..., np.ndarray],
    columns: tuple[Sequence[float] | np.ndarray, ...],
    seed: int,
    num_resamples: int,
    confidence: float,
) -> RankAgreement:
    arrays = [np.asarray(column, dtype=float) for column in columns]
    tau = statistic(*arrays)
    num_points = len(arrays[0])
    if math.isnan(tau) or num_points < MIN_NETWORKS:
        return RankAgreement(tau=tau, low=math.nan, high=math.nan, num_points=num_points)
    generator = np.random.default_rng(seed)
    shrink = 1.0
    if num_points > MAX_BOOTSTRAP_POINTS:
        subset = generator.choice(num_points, MAX_BOOTSTRAP_POINTS, replace=False)
        shrink = math.sqrt(MAX_BOOTSTRAP_POINTS / num_points)
        arrays = [array[subset] for array in arrays]
    n = len(arrays[0])
    draws = generator.multinomial(n, np.full(n, 1 / n), size=num_resamples)
    resampled = resampled_statistic(*arrays, draws)
    centre = statistic(*arrays)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail]) if not np.isnan(resampled).all() else (math.nan, math.nan)
    # Resamples repeat networks, and ties of a network with itself can put all of them on one side of tau.
    low, high = min(tau + shrink * (low - centre), tau), max(tau + shrink * (high - centre), tau)
    return RankAgreement(tau=tau, low=float(max(low, -1.0)), high=float(min(high, 1.0)), num_points=num_points)


def resampled_taus(x: np.ndarray, y: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """tau-b of each resample (R,); `draws` (R, n) counts how often a resample drew each network.

    The tau of a row w is (w'Aw) / sqrt(w'Bw w'Cw) with A_ij = sign(x_i - x_j) sign(y_i - y_j), B = |sign of x|,
    C = |sign of y|: three matrix products for all resamples. float32 holds the row sums exactly, they are integers of at
    most n.
    """
    counts = draws.T.astype(np.float32)
    x_sign = np.sign(x[:, None] - x[None, :]).astype(np.float32)
    y_sign = np.sign(y[:, None] - y[None, :]).astype(np.float32)

    def quadratic(pairs: np.ndarray) -> np.ndarray:
        return np.einsum("nb,nb->b", pairs @ counts, counts, dtype=np.float64)

    agreeing = quadratic(x_sign * y_sign)
    untied = quadratic(np.abs(x_sign)) * quadratic(np.abs(y_sign))
    return np.divide(agreeing, np.sqrt(untied), out=np.full(len(draws), np.nan), where=untied > 0)


def resampled_partial_taus(x: np.ndarray, y: np.ndarray, z: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Partial tau of x and y given z in each resample, as `resampled_taus`."""
    xy, xz, yz = (resampled_taus(first, second, draws) for first, second in ((x, y), (x, z), (y, z)))
    remaining = (1 - xz**2) * (1 - yz**2)
    return np.divide(xy - xz * yz, np.sqrt(remaining), out=np.full(len(draws), np.nan), where=remaining > 1e-12)


def agreement_table(
    frame: pd.DataFrame, scores: str | Sequence[str], baselines: Sequence[str] = TRIVIAL_METRICS, *, seed: int = 0
) -> pd.DataFrame:
    """For each expensive score and each trivial baseline among the frame's columns: score, baseline, tau, low, high, n.

    tau is of the values as they are, not turned by their goals. Rows of the frame that lack one of the two are left out.
    """
    import pandas as pd

    rows = []
    for score in [scores] if isinstance(scores, str) else scores:
        for baseline in baselines:
            if baseline == score or score not in frame or baseline not in frame:
                continue
            pair = frame[[score, baseline]].dropna().to_numpy(dtype=float)
            found = rank_agreement(pair[:, 0], pair[:, 1], seed=seed)
            rows.append((score, baseline, found.tau, found.low, found.high, found.num_points))
    return pd.DataFrame(rows, columns=pd.Index(["score", "baseline", "tau", "low", "high", "n"]))

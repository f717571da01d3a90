"""What scores of untrained networks say about trained ones: agreement with a measured target beyond what size says for nothing.

Everything here is about pairs of networks. tau-b is Kendall's (`results.rank_quality`). Three more numbers ask what a user asks:

- *tau at equal size*: tau-b over the pairs alone whose parameters differ by at most 10 % of the larger. A score that repeats the number
  of parameters has nothing to say about them.
- *partial tau* given parameters and MACs: Kendall's partial rank correlation with two controls, by the Schur complement of the matrix of
  taus. It is undefined for a score that the controls determine.
- *regret at k*: how far the best of the k best-scored networks lies below the best network, in the target's unit. If networks tie at the
  cut, it is the mean over all ways to choose among them.

Intervals are percentile bootstrap intervals over networks. A score is said to beat the trivial baselines if its tau at equal size exceeds
that of the best of them, and the interval of the difference, over the same draws of networks, excludes 0 after Bonferroni's correction for
the number of scores. The best baseline is the best one on this very table: its best chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from results.formats import MIN_NETWORKS
from results.rank_quality import kendall_tau

if TYPE_CHECKING:
    import pandas as pd

EQUAL_SIZE = 0.10
"""Two networks are of equal size if their parameters differ by at most this share of the larger."""
TOP_K = (1, 5, 10)
MAX_NETWORKS = 1000
"""Of a longer table a random part of this size is drawn for every number that looks at pairs."""
NUM_RESAMPLES = 1000
NUM_GAIN_RESAMPLES = 10_000
"""Bonferroni's correction asks for quantiles further out than a thousand draws hold."""
CONFIDENCE = 0.95
NUM_FOLDS, NUM_REPEATS = 10, 20


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with the ends of its interval; all nan where it is undefined."""

    value: float
    low: float
    high: float

    @property
    def is_defined(self) -> bool:
        return math.isfinite(self.value)


@dataclass(frozen=True, kw_only=True)
class ScoreQuality:
    """One score on one target. `gain` is its tau at equal size minus that of the best trivial baseline; None for a baseline."""

    score: str
    is_trivial: bool
    num_networks: int
    tau: Estimate
    tau_equal_size: Estimate
    partial_tau: Estimate
    regret: Mapping[int, Estimate]
    gain: Estimate | None = None
    beats_baselines: bool = False


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A weighted sum of all scores against the best single one, both chosen without the networks that they are judged on.

    `tau` is over the pairs of networks that were held out together, and `gain` its difference from the best single score's.
    """

    scores: tuple[str, ...]
    tau: Estimate
    single_tau: Estimate
    gain: Estimate


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All scores on one target, and the best trivial baseline at equal size; pairs are those of `num_compared` random networks."""

    target: str
    num_networks: int
    num_compared: int
    num_equal_pairs: int
    qualities: tuple[ScoreQuality, ...]
    best_baseline: str
    combination: Combination | None = None

    @property
    def beating(self) -> tuple[str, ...]:
        return tuple(one.score for one in self.qualities if one.beats_baselines)


class _Draws:
    """Bootstrap draws of networks, `(R, n)` counts, and sums over pairs weighted by them."""

    def __init__(self, n: int, seed: int, num_resamples: int = NUM_RESAMPLES):
        self._counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=num_resamples).T.astype(np.float32)

    def sums(self, pairs: np.ndarray) -> np.ndarray:
        """The sum over all pairs, then that of each resample: `(n, n) -> (1 + R,)`."""
        resampled = np.einsum("nb,nb->b", pairs.astype(np.float32) @ self._counts, self._counts, dtype=np.float64)
        return np.concatenate([[pairs.sum(dtype=np.float64)], resampled])

    def drawn(self) -> list[np.ndarray]:
        """The networks of all, then of each resample, by index."""
        everyone = np.arange(len(self._counts))
        return [everyone, *(np.repeat(everyone, counts) for counts in self._counts.T.astype(int))]


def estimate(values: np.ndarray, confidence: float = CONFIDENCE) -> Estimate:
    """The first value, with the percentile interval of the others that are finite, widened to hold the first."""
    resampled = values[1:][np.isfinite(values[1:])]
    if not (math.isfinite(values[0]) and len(resampled)):
        return Estimate(value=math.nan, low=math.nan, high=math.nan)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value=float(values[0]), low=float(min(low, values[0])), high=float(max(high, values[0])))


def signs(x: np.ndarray) -> np.ndarray:
    """sign(x_i - x_j), `(n,) -> (n, n)`."""
    return np.sign(x[:, None] - x[None, :])


def equal_size_pairs(params: np.ndarray) -> np.ndarray:
    """Which pairs are of equal size, `(n,) -> (n, n)`, none with itself."""
    larger = np.maximum(params[:, None], params[None, :])
    equal = np.abs(params[:, None] - params[None, :]) <= EQUAL_SIZE * larger
    np.fill_diagonal(equal, False)
    return equal


def _taus(x: np.ndarray, y: np.ndarray, draws: _Draws) -> np.ndarray:
    """tau-b of matrices of signs, over the pairs where they are not both 0 everywhere: of all, then of each resample."""
    agreeing, untied = draws.sums(x * y), draws.sums(np.abs(x)) * draws.sums(np.abs(y))
    return np.divide(agreeing, np.sqrt(untied), out=np.full(len(agreeing), np.nan), where=untied > 0)


def _partial_taus(x: np.ndarray, y: np.ndarray, controls: Sequence[np.ndarray], draws: _Draws) -> np.ndarray:
    columns = [x, y, *controls]
    k = len(columns)
    taus = np.ones((1 + NUM_RESAMPLES, k, k))
    for i in range(k):
        for j in range(i):
            taus[:, i, j] = taus[:, j, i] = _taus(columns[i], columns[j], draws)
    result = np.full(len(taus), np.nan)
    finite = np.isfinite(taus).all(axis=(1, 2))
    own, shared, between = taus[finite][:, :2, :2], taus[finite][:, :2, 2:], taus[finite][:, 2:, 2:]
    # Controls that order the networks alike make `between` singular; the pseudo-inverse counts them once.
    left = own - shared @ np.linalg.pinv(between, rcond=1e-6, hermitian=True) @ shared.transpose(0, 2, 1)
    variances = left[:, 0, 0] * left[:, 1, 1]
    is_defined = (left[:, 0, 0] > 1e-6) & (left[:, 1, 1] > 1e-6)
    result[finite] = np.divide(left[:, 0, 1], np.sqrt(np.where(is_defined, variances, 1)), out=np.full(len(left), np.nan), where=is_defined)
    return result


def regret_at(k: int, score: np.ndarray, target: np.ndarray) -> float:
    """The best target minus the best among the `k` highest scores, in the target's unit; ties at the cut are averaged over."""
    k = min(k, len(score))
    cut = np.sort(score)[-k]
    above, tied = target[score > cut], np.sort(target[score == cut])[::-1]
    places = k - len(above)
    # The best of `places` drawn from the tied is the i-th of them with the share of draws that hold it and none before it.
    shares = np.array([math.comb(len(tied) - 1 - i, places - 1) for i in range(len(tied))], dtype=float) / math.comb(len(tied), places)
    best = np.maximum(tied, above.max()) if len(above) else tied
    return float(target.max() - (shares * best).sum())


def judge(
    frame: pd.DataFrame,
    *,
    target: str,
    scores: Sequence[str],
    trivial: Sequence[str],
    params: str = "params_m",
    macs: str = "gmacs",
    seed: int = 0,
) -> Verdict:
    """Judge each of `scores`, trivial ones among them, on the networks of the frame, one a row; higher scores promise a higher target.

    A network without a value of a score (it failed) is left out for that score alone. Raises ValueError for fewer than 10 networks or a
    target without two different values.
    """
    frame = frame.dropna(subset=[target, params, macs])
    if len(frame) < MIN_NETWORKS:
        raise ValueError(f"{len(frame)} networks have {target}; at least {MIN_NETWORKS} are needed to judge a score")
    if len(np.unique(frame[target].to_numpy(float))) < 2:
        raise ValueError(f"{target} is {frame[target].iloc[0]:g} for every network; there is nothing to rank")
    whole = frame
    if len(frame) > MAX_NETWORKS:
        frame = frame.sample(MAX_NETWORKS, random_state=seed)
    taus = {name: _equal_size_taus(frame, name, target, params, seed) for name in scores}
    defined = [name for name in scores if math.isfinite(taus[name][0])]
    level = 1 - (1 - CONFIDENCE) / max(1, sum(name not in trivial for name in defined))
    best = max((name for name in defined if name in trivial), key=lambda name: taus[name][0], default="")
    qualities = []
    for name in scores:
        rows = frame.dropna(subset=[name])
        gain, beats = None, False
        if name in defined and name not in trivial and best:
            one, other = (_equal_size_taus(rows, score, target, params, seed, NUM_GAIN_RESAMPLES) for score in (name, best))
            gain, beats = estimate(one - other), estimate(one - other, level).low > 0
        quality = _quality(rows, name, target, (params, macs), taus[name], name in trivial, gain, beats, seed)
        qualities.append(_with_regret_of(quality, whole.dropna(subset=[name]), target))
    return Verdict(
        target=target,
        num_networks=len(whole),
        num_compared=len(frame),
        num_equal_pairs=int(equal_size_pairs(frame[params].to_numpy(float)).sum()) // 2,
        qualities=tuple(qualities),
        best_baseline=best,
        combination=combine(frame, target, scores, seed=seed),
    )


def _with_regret_of(quality: ScoreQuality, rows: pd.DataFrame, target: str) -> ScoreQuality:
    """The quality with the regret over all networks, of which pairs are perhaps those of a part."""
    if len(rows) == quality.num_networks:
        return quality
    score, measured = rows[quality.score].to_numpy(float), rows[target].to_numpy(float)
    regret = {k: replace(found, value=regret_at(k, score, measured)) for k, found in quality.regret.items()}
    return replace(quality, num_networks=len(rows), regret=regret)


def _equal_size_taus(
    frame: pd.DataFrame, score: str, target: str, params: str, seed: int, num_resamples: int = NUM_RESAMPLES
) -> np.ndarray:
    rows = frame.dropna(subset=[score])
    if len(rows) < MIN_NETWORKS:
        return np.full(1 + num_resamples, np.nan)
    equal = equal_size_pairs(rows[params].to_numpy(float))
    x, y = (signs(rows[name].to_numpy(float)) * equal for name in (score, target))
    return _taus(x, y, _Draws(len(rows), seed, num_resamples))


def _quality(
    rows: pd.DataFrame,
    score: str,
    target: str,
    controls: Sequence[str],
    equal_size: np.ndarray,
    is_trivial: bool,
    gain: Estimate | None,
    beats: bool,
    seed: int,
) -> ScoreQuality:
    undefined = Estimate(value=math.nan, low=math.nan, high=math.nan)
    if len(rows) < MIN_NETWORKS:
        regrets: dict[int, Estimate] = dict.fromkeys(TOP_K, undefined)
        return ScoreQuality(
            score=score,
            is_trivial=is_trivial,
            num_networks=len(rows),
            tau=undefined,
            tau_equal_size=undefined,
            partial_tau=undefined,
            regret=regrets,
        )
    draws = _Draws(len(rows), seed)
    values, measured = rows[score].to_numpy(float), rows[target].to_numpy(float)
    x, y = signs(values), signs(measured)
    drawn = draws.drawn()
    return ScoreQuality(
        score=score,
        is_trivial=is_trivial,
        num_networks=len(rows),
        tau=estimate(_taus(x, y, draws)),
        tau_equal_size=estimate(equal_size),
        partial_tau=estimate(_partial_taus(x, y, [signs(rows[name].to_numpy(float)) for name in controls], draws)),
        regret={k: estimate(np.array([regret_at(k, values[index], measured[index]) for index in drawn])) for k in TOP_K},
        gain=gain,
        beats_baselines=beats,
    )


def combine(frame: pd.DataFrame, target: str, scores: Sequence[str], *, seed: int = 0) -> Combination | None:
    """A ridge regression on the ranks of all scores, judged by nested cross-validation; None with fewer than two scores or 40 networks.

    In each of 10 folds, 20 times, the regression and its penalty (inner leave-one-out) and the best single score are chosen on nine tenths
    of the networks. Both are then judged on the pairs of the held-out tenth. The interval is over networks with these choices as they are.
    """
    rows = frame.dropna(subset=[*scores, target])
    names = [name for name in scores if len(np.unique(rows[name].to_numpy(float))) > 1]
    if len(names) < 2 or len(rows) < 4 * NUM_FOLDS:
        return None
    from scipy.stats import rankdata
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import RepeatedKFold

    measured = rows[target].to_numpy(float)
    values = rows[names].to_numpy(float)
    n = len(rows)
    truth = signs(measured)
    # For the combination and the single score: agreeing minus disagreeing pairs, and pairs that each does not tie.
    agreeing, untied = ({name: np.zeros((n, n)) for name in ("combined", "single")} for _ in range(2))
    ranked = np.zeros((n, n))
    for train, test in RepeatedKFold(n_splits=NUM_FOLDS, n_repeats=NUM_REPEATS, random_state=seed).split(values):
        # Ranks among the networks that the choice may see: a monotonous change of a score changes nothing.
        seen = np.sort(values[train], axis=0)
        ranks = np.stack([np.searchsorted(seen[:, i], values[:, i], side="left") for i in range(len(names))], axis=1) / len(train)
        ridge = RidgeCV(alphas=np.logspace(-3, 3, 13)).fit(ranks[train], rankdata(measured[train]))
        best = int(np.nanargmax([kendall_tau(values[train, i], measured[train]) for i in range(len(names))]))
        pairs = np.ix_(test, test)
        for name, found in (("combined", ridge.predict(ranks[test])), ("single", values[test, best])):
            agreeing[name][pairs] += signs(found) * truth[pairs]
            untied[name][pairs] += np.abs(signs(found))
        ranked[pairs] += np.abs(truth[pairs])
    draws = _Draws(n, seed)
    taus = {name: draws.sums(agreeing[name]) / np.sqrt(draws.sums(untied[name]) * draws.sums(ranked)) for name in agreeing}
    return Combination(
        scores=tuple(names),
        tau=estimate(taus["combined"]),
        single_tau=estimate(taus["single"]),
        gain=estimate(taus["combined"] - taus["single"]),
    )

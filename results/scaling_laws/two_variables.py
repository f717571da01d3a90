"""The form of two variables: loss = E + A/N^alpha + B/D^beta, by a Huber loss of 1e-3 on the logarithm of the loss.

Training Compute-Optimal Large Language Models, https://arxiv.org/abs/2203.15556, section 3.3 and appendix D.3. The optimiser is ours:
reweighted least squares with Levenberg and Marquardt's damping and analytic gradients, for many sets of weights and starts at once.
Letters: n rows, m distinct points, P the five parameters, B sets in a batch, R resamples.

Parameters travel as (log E, log A, alpha, log B, beta), so that E, A and B are positive. Errors are those of log loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from results.scaling_laws.law import CONFIDENCE, NO_INTERVAL, Criterion, Form, Interval, Law, Parameter, corrected_aic, percentiles
from results.scaling_laws.points import Points

CHINCHILLA = Form(
    name="chinchilla", formula="E + A/N^alpha + B/D^beta", parameters=("E", "A", "alpha", "B", "beta"), exponents=("alpha", "beta")
)
P = len(CHINCHILLA.parameters)
LOGARITHMS = ("E", "A", "B")
"""Parameters that travel as their logarithm."""

HUBER = 1e-3
START_EXPONENTS = (0.1, 0.2, 0.35, 0.5, 0.8, 1.2)
MAX_STEPS = 500
CONVERGED = 1e-9
"""A step that lowers the loss by a smaller share of it is the last one."""

MIN_DAMPING, MAX_DAMPING = 1e-9, 1e8
LEAST_SHARE = 1e-3
NUM_AT_ONCE = 250
PROFILE_STEPS = np.geomspace(0.2, 100, 20)
NUM_REFINED = 8
"""A profile is computed at these distances from the best value, in standard deviations of the bootstrap, and at so many more where it
crosses its threshold."""

NUM_CANDIDATES = 100
"""Draws of the bootstrap that a descent of the profile may start from."""


@dataclass(frozen=True, kw_only=True)
class _Surface:
    """The logarithms of N, D and the loss, (n,) each."""

    log_N: np.ndarray
    log_D: np.ndarray
    log_loss: np.ndarray

    def log_terms(self, theta: np.ndarray) -> np.ndarray:
        """The logarithms of the three terms for theta (B, P): (3, B, n)."""
        log_E, log_A, alpha, log_B, beta = theta.T[:, :, None]
        return np.stack(np.broadcast_arrays(log_E, log_A - alpha * self.log_N, log_B - beta * self.log_D))

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        return self.log_loss - np.logaddexp.reduce(self.log_terms(theta), axis=0)

    def gradients(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals (B, n), and the gradients of the fitted log loss (B, P, n)."""
        terms = self.log_terms(theta)
        fitted = np.logaddexp.reduce(terms, axis=0)
        E, A, B = np.exp(terms - fitted)
        return self.log_loss - fitted, np.stack([E, A, -A * self.log_N, B, -B * self.log_D], axis=1)

    def revived(self, theta: np.ndarray) -> np.ndarray:
        """theta (B, P) with every term at `LEAST_SHARE` of the loss or more: from less it has no gradient to come back by."""
        terms = self.log_terms(theta).mean(axis=2)
        lift = np.maximum(np.log(LEAST_SHARE) - (terms - np.logaddexp.reduce(terms, axis=0)), 0)
        revived = theta.copy()
        revived[:, [CHINCHILLA.parameters.index(name) for name in LOGARITHMS]] += lift.T
        return revived

    def fit(self, theta: np.ndarray, weights: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Descend from theta (B, P) under weights (B, n), in the parameters that are `free` (B, P): theta and its loss (B,)."""
        batches = range(0, len(theta), NUM_AT_ONCE)
        parts = [self._descend(*(array[first : first + NUM_AT_ONCE] for array in (theta, weights, free))) for first in batches]
        return np.concatenate([found for found, _ in parts]), np.concatenate([loss for _, loss in parts])

    def _descend(self, theta: np.ndarray, weights: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        theta, loss = theta.copy(), huber_loss(self.residuals(theta), weights)
        damping, moving = np.full(len(theta), 1e-3), np.arange(len(theta))
        for _ in range(MAX_STEPS):
            residuals, gradients = self.gradients(theta[moving])
            gradients *= free[moving, :, None]
            # A quadratic that touches the Huber loss from above: its minimum never has a larger loss (majorisation).
            weighted = gradients * (weights[moving] * np.minimum(1, HUBER / np.maximum(np.abs(residuals), HUBER)))[:, None]
            curvature = weighted @ gradients.transpose(0, 2, 1)
            # A parameter that is fixed, or changes nothing, has no curvature; any positive one keeps it where it is.
            diagonal = np.einsum("bpp->bp", curvature)
            scale = 1 / np.sqrt(np.where(diagonal < 1e-14, 1.0, diagonal))
            damped = curvature * scale[:, :, None] * scale[:, None, :] + damping[moving, None, None] * np.eye(P)
            step = scale * np.linalg.solve(damped, scale[:, :, None] * (weighted @ residuals[:, :, None]))[:, :, 0]
            proposed = theta[moving] + step
            proposed_loss = huber_loss(self.residuals(proposed), weights[moving])
            before = loss[moving]
            is_better = proposed_loss < before
            theta[moving[is_better]], loss[moving[is_better]] = proposed[is_better], proposed_loss[is_better]
            damping[moving] = np.maximum(damping[moving] * np.where(is_better, 0.2, 8.0), MIN_DAMPING)
            is_done = (is_better & (before - proposed_loss <= CONVERGED * before)) | (damping[moving] > MAX_DAMPING)
            moving = moving[~is_done]
            if not len(moving):
                break
        return theta, loss


def huber_loss(residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sums over the rows, (B, n) -> (B,)."""
    return (weights * special.huber(HUBER, residuals)).sum(axis=1)


def fit_two_variables(points: Points, *, num_resamples: int, seed: int) -> Law:
    """The law through points of (N, D); raises ValueError if there are fewer distinct points than parameters."""
    distinct = points.distinct()
    m = len(distinct.counts)
    if m < P:
        raise ValueError(f"{m} distinct points of {', '.join(points.x_names)} for the {P} parameters of {CHINCHILLA.formula}")
    surface = _Surface(log_N=np.log(points.x[:, 0]), log_D=np.log(points.x[:, 1]), log_loss=np.log(points.y))
    theta, loss = _best_of_starts(surface)
    free = points.n - P
    draws = scale = None
    # With one point for each parameter a resample that has them all is the sample itself.
    if m > P:
        weights = _resample(m, num_resamples, np.random.default_rng(seed))[:, distinct.which]
        draws, losses = surface.fit(np.tile(surface.revived(theta[None]), (num_resamples, 1)), weights, np.ones((num_resamples, P), bool))
        # How much lower a resample's own fit is than the whole sample's has the mean of P squared normal deviates, times this scale.
        drops = 2 * (huber_loss(surface.residuals(theta[None]), weights) - losses)
        scale = float(np.median(drops) / stats.chi2.median(P)) * points.n / free

    def at(x: np.ndarray) -> np.ndarray:
        return _losses(theta[None], x)[0]

    def interval_at(x: np.ndarray) -> Interval:
        return NO_INTERVAL if draws is None else percentiles(_losses(draws, x[None])[:, 0])

    residuals = surface.residuals(theta[None])[0]
    return Law(
        form=CHINCHILLA,
        points=points,
        best_fit={name: float(value) for name, value in zip(CHINCHILLA.parameters, _natural(theta), strict=True)},
        parameters=_parameters(surface, theta, loss, draws, scale, free),
        aicc=_aicc(loss, points.n),
        loo=_leave_one_out(surface, theta, distinct.which),
        noise_sd=float(np.sqrt(residuals @ residuals / free)) if draws is not None else None,
        curve=at,
        interval_at=interval_at,
    )


def _losses(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The fitted losses of theta (B, P) at x (k, 2): (B, k)."""
    surface = _Surface(log_N=np.log(x[:, 0]), log_D=np.log(x[:, 1]), log_loss=np.zeros(len(x)))
    return np.exp(-surface.residuals(theta))


def _natural(theta: np.ndarray) -> np.ndarray:
    """Parameters as the formula has them: (..., P) -> (..., P)."""
    return np.where([name in LOGARITHMS for name in CHINCHILLA.parameters], np.exp(np.minimum(theta, 700)), theta)


def _best_of_starts(surface: _Surface) -> tuple[np.ndarray, float]:
    """The best of descents from a grid of exponents, where E, A and B start at the non-negative least squares of relative errors."""
    starts = np.array(list(_starts(surface)))
    n = len(surface.log_loss)
    theta, loss = surface.fit(starts, np.ones((len(starts), n)), np.ones((len(starts), P), bool))
    return theta[loss.argmin()], float(loss.min())


def _starts(surface: _Surface) -> Iterator[list[float]]:
    inverse = np.exp(-surface.log_loss)
    # Terms are taken at the middle of the points, where none of them is too small or too large to be added.
    middle_N, middle_D = surface.log_N.mean(), surface.log_D.mean()
    for alpha in START_EXPONENTS:
        for beta in START_EXPONENTS:
            columns = [inverse, inverse * np.exp(-alpha * (surface.log_N - middle_N)), inverse * np.exp(-beta * (surface.log_D - middle_D))]
            found, _ = optimize.nnls(np.stack(columns, axis=1), np.ones(len(inverse)))
            log_E, log_A, log_B = np.log(np.maximum(found, 1e-3 * found.max()))
            yield [log_E, log_A + alpha * middle_N, alpha, log_B + beta * middle_D, beta]


def _resample(m: int, num_resamples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each resample drew each point (R, m); points come with all their replicates, and P of them at least."""
    counts = np.zeros((0, m))
    while len(counts) < num_resamples:
        drawn = generator.multinomial(m, np.full(m, 1 / m), size=num_resamples)
        counts = np.concatenate([counts, drawn[(drawn > 0).sum(axis=1) >= P]])
    return counts[:num_resamples]


def _parameters(
    surface: _Surface, theta: np.ndarray, loss: float, draws: np.ndarray | None, scale: float | None, free: int
) -> dict[str, Parameter]:
    if draws is None or scale is None:
        return {name: Parameter(value=None, profile=NO_INTERVAL, bootstrap=NO_INTERVAL) for name in CHINCHILLA.parameters}
    threshold = scale * float(stats.f.ppf(CONFIDENCE, 1, free))
    profiles = _profiles(surface, theta, loss, draws, threshold)
    found = {}
    for number, (name, value) in enumerate(zip(CHINCHILLA.parameters, _natural(theta), strict=True)):
        low, high = (
            None if end is None else float(_natural(np.full(P, end))[number]) for end in (profiles[number].low, profiles[number].high)
        )
        # The form falls with both variables: its exponents are positive, as its terms are.
        interval = Interval(low=max(low or 0.0, 0.0), high=high)
        is_inside = interval.is_bounded and interval.low != 0
        bootstrap = percentiles(_natural(draws)[:, number])
        found[name] = Parameter(value=float(value) if is_inside else None, profile=interval, bootstrap=bootstrap)
    return found


def _profiles(surface: _Surface, theta: np.ndarray, loss: float, draws: np.ndarray, threshold: float) -> list[Interval]:
    """For each parameter the values at which the best loss, doubled, rises by no more than the threshold."""
    # Percentiles, because draws of a parameter that is not identified have any value.
    spreads = np.clip(np.diff(np.quantile(draws, [0.16, 0.84], axis=0), axis=0)[0] / 2, 1e-9, 1.0)
    intervals = []
    for number in range(P):

        def root(values: np.ndarray, number: int = number) -> np.ndarray:
            """The root of the rise, which is almost a straight line, with the parameter held at each of the values (k,)."""
            starts = _profile_starts(surface, theta, draws, number, values)
            is_free = np.tile(np.arange(P) != number, (len(values), 1))
            _, losses = surface.fit(starts, np.ones((len(values), len(surface.log_loss))), is_free)
            return np.sqrt(np.maximum(2 * (losses - loss), 0))

        best = float(theta[number])
        ends = [_crossing(root, best, best + sign * spreads[number] * PROFILE_STEPS, math.sqrt(threshold)) for sign in (-1, 1)]
        intervals.append(Interval(low=ends[0], high=ends[1]))
    return intervals


def _crossing(root: Callable[[np.ndarray], np.ndarray], best: float, values: np.ndarray, threshold: float) -> float | None:
    """Where a root that is 0 at `best` last exceeds the threshold, going outward over the values; None if it does not at the last one."""
    around = _around_crossing(root, best, values, threshold)
    if around is None:
        return None
    ends, _ = around
    ends, roots = _around_crossing(root, best, np.linspace(ends[0], ends[1], NUM_REFINED), threshold) or around
    return float(np.interp(threshold, roots, ends))


def _around_crossing(
    root: Callable[[np.ndarray], np.ndarray], best: float, values: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """The last value inside and the next one, with their roots: (2,) each."""
    values, roots = np.concatenate([[best], values]), np.concatenate([[0.0], root(values)])
    inside = int(np.flatnonzero(roots <= threshold)[-1])
    return None if inside == len(roots) - 1 else (values[inside : inside + 2], roots[inside : inside + 2])


def _profile_starts(surface: _Surface, theta: np.ndarray, draws: np.ndarray, number: int, values: np.ndarray) -> np.ndarray:
    """Where to start with one parameter held at each of the values (k,): (k, P), the other parameters those of the best candidate.

    Candidates are the others as they go with this one in the bootstrap, on average, and as they are in some of its draws: where a parameter
    is not identified, the average is far from everything that fits.
    """
    covariance = np.cov(draws, rowvar=False)[number]
    average = theta + (values - theta[number])[:, None] * covariance / max(covariance[number], 1e-24)
    starts = np.empty((len(values), P))
    for place, value in enumerate(values):
        candidates = np.concatenate([average[place : place + 1], draws[:NUM_CANDIDATES]])
        candidates[:, number] = value
        candidates = surface.revived(candidates)
        candidates[:, number] = value
        starts[place] = candidates[huber_loss(surface.residuals(candidates), np.ones(len(surface.log_loss))).argmin()]
    return starts


def _aicc(loss: float, n: int) -> Criterion:
    """With the density exp(-Huber loss / s) of log loss, whose scale s is estimated and counted."""
    if loss == 0:
        return corrected_aic(-np.inf, P + 1, n)

    def deviance(log_s: float) -> float:
        s = np.exp(log_s)
        middle = np.sqrt(2 * np.pi * s) * special.erf(HUBER / np.sqrt(2 * s))
        tails = 2 * s / HUBER * np.exp(-(HUBER**2) / (2 * s))
        return 2 * loss / s + 2 * n * np.log(middle + tails)

    found = optimize.minimize_scalar(deviance, bracket=(np.log(loss / n) - 1, np.log(loss / n) + 1))
    return corrected_aic(float(found.fun), P + 1, n)


def _leave_one_out(surface: _Surface, theta: np.ndarray, which: np.ndarray) -> Criterion:
    """Root mean square error of log loss, of rows predicted without them and their replicates."""
    m = int(which.max()) + 1
    if m - 1 < P:
        return Criterion(value=None, reason=f"{m - 1} distinct points would be left for {P} parameters")
    is_left_out = which == np.arange(m)[:, None]
    found, _ = surface.fit(np.tile(theta, (m, 1)), (~is_left_out).astype(float), np.ones((m, P), bool))
    return Criterion(value=float(np.sqrt((surface.residuals(found)[is_left_out] ** 2).mean())))

"""Forms of one variable: a*x^alpha + b, a*x^alpha and c + d*log(x), by least squares.

For a fixed exponent each form is a straight line, y = slope * u + constant with u = x^alpha or log(x): separable least squares (Golub
and Pereyra, SIAM J. Numer. Anal. 10, 1973). Two things follow. A search over the exponent alone, from a grid of starts, finds the global
optimum. And the slopes and constants that fit at a fixed exponent fill an ellipse, so that a profile-likelihood interval, of a parameter
or of the curve at a point, is the extreme of a closed form over the exponent.

Errors are Gaussian around the curve with one standard deviation, that of seeds. Replicates enter as they are. A power law has
slope >= 0 and constant >= 0: a loss has no negative floor. Letters: n rows, m distinct x, p parameters, G exponents of the grid,
R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize, stats

from results.scaling_laws.law import CONFIDENCE, NO_INTERVAL, Criterion, Form, Interval, Law, Parameter, corrected_aic, percentiles
from results.scaling_laws.points import Points

MAX_EXPONENT = 10.0
"""Of a larger one all but the largest x (or the smallest) are alike: its curve is a step."""

_POSITIVE = np.geomspace(1e-3, MAX_EXPONENT, 400)
EXPONENTS = np.concatenate([-_POSITIVE[::-1], [0.0], _POSITIVE])
NUM_RESAMPLES_AT_ONCE = 500

SATURATING_POWER = Form(name="saturating_power", formula="a*x^alpha + b", parameters=("a", "alpha", "b"), exponents=("alpha",))
POWER = Form(name="power", formula="a*x^alpha", parameters=("a", "alpha"), exponents=("alpha",))
LOG_LINEAR = Form(name="log_linear", formula="c + d*log(x)", parameters=("c", "d"))
FORMS = (SATURATING_POWER, POWER, LOG_LINEAR)


@dataclass(frozen=True)
class _Line:
    """The sum of squares of y = slope * u + constant around the points' means, as a function of slope and constant.

    It is yy - 2 slope uy + slope^2 uu + total (constant + slope u_mean - y_mean)^2, with sums of centred values, each an array.
    """

    uu: np.ndarray
    uy: np.ndarray
    yy: np.ndarray
    u_mean: np.ndarray
    y_mean: np.ndarray
    total: float

    def squares(self, slope: np.ndarray, constant: np.ndarray) -> np.ndarray:
        off = constant + slope * self.u_mean - self.y_mean
        return np.maximum(self.yy - 2 * slope * self.uy + slope**2 * self.uu, 0) + self.total * off**2

    def through_origin(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the squares with constant = 0, a parabola in the slope: its place, curvature and least value."""
        curvature = self.uu + self.total * self.u_mean**2
        place = _ratio(self.uy + self.total * self.u_mean * self.y_mean, curvature)
        return place, curvature, self.squares(place, np.zeros_like(place))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, and 0 where a column has no variance (x^0): its slope changes nothing."""
    above, below = np.broadcast_arrays(above, below)
    return np.divide(above, below, out=np.zeros(above.shape), where=below > 0)


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """The distinct points of a form: `log_x` (m,) is centred at `log_reference`, so that powers stay within floating point."""

    form: Form
    log_x: np.ndarray
    log_reference: float
    weights: np.ndarray

    def column(self, exponents: np.ndarray, log_x: np.ndarray | None = None) -> np.ndarray:
        """u for exponents (...): (..., m)."""
        log_x = self.log_x if log_x is None else log_x
        return np.exp(exponents[..., None] * log_x) if self.form.exponents else np.broadcast_to(log_x, (*exponents.shape, len(log_x)))

    def lines(self, exponents: np.ndarray, y: np.ndarray, *, is_crossed: bool) -> _Line:
        """For exponents (G,) and means y (R, m): arrays (R, G) if crossed, else (R,) with G = R."""
        total = self.weights.sum()
        u = self.column(exponents)
        u_mean, y_mean = u @ self.weights / total, y @ self.weights / total
        u, y = u - u_mean[:, None], y - y_mean[:, None]
        uu, yy, weighted = u**2 @ self.weights, y**2 @ self.weights, y * self.weights
        if is_crossed:
            return _Line(uu, weighted @ u.T, yy[:, None], u_mean, y_mean[:, None], total)
        return _Line(uu, (weighted * u).sum(axis=1), yy, u_mean, y_mean, total)

    def best_lines(self, line: _Line) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slope, constant and sum of squares, the least within the form's domain."""
        if self.form is POWER:
            slope, _, _ = line.through_origin()
            constant = np.zeros_like(slope)
        else:
            slope = _ratio(line.uy, line.uu)
            constant = line.y_mean - slope * line.u_mean
            if self.form is SATURATING_POWER:
                slope = np.where(constant < 0, line.through_origin()[0], slope)
                constant = np.where(slope < 0, line.y_mean, np.maximum(constant, 0))
        if self.form.exponents:
            slope = np.maximum(slope, 0)
        return slope, constant, line.squares(slope, constant)

    def exponents(self) -> np.ndarray:
        return EXPONENTS if self.form.exponents else np.zeros(1)

    def fit(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Exponent, slope, constant and sum of squares for each row of means y (R, m): (R,) each."""
        parts = [self._fit_some(some) for some in np.array_split(y, -(-len(y) // NUM_RESAMPLES_AT_ONCE))]
        exponent, slope, constant, squares = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return exponent, slope, constant, squares

    def _fit_some(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        grid = self.exponents()
        start = self.best_lines(self.lines(grid, y, is_crossed=True))[2].argmin(axis=1)

        def squares(exponents: np.ndarray) -> np.ndarray:
            return self.best_lines(self.lines(exponents, y, is_crossed=False))[2]

        exponent = _golden_section(squares, grid[np.maximum(start - 1, 0)], grid[np.minimum(start + 1, len(grid) - 1)])
        return exponent, *self.best_lines(self.lines(exponent, y, is_crossed=False))

    def parameters(self, exponent: np.ndarray, slope: np.ndarray, constant: np.ndarray) -> dict[str, np.ndarray]:
        """By the names of the formula, in the units of x."""
        if self.form is LOG_LINEAR:
            return {"c": constant - slope * self.log_reference, "d": slope}
        found = {"a": slope * np.exp(-exponent * self.log_reference), "alpha": exponent, "b": constant}
        return {name: found[name] for name in self.form.parameters}


def _golden_section(function: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Minima of many functions at once, each between its low and high."""
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(48):
        left, right = high - golden * (high - low), low + golden * (high - low)
        is_left = function(left) < function(right)
        low, high = np.where(is_left, low, left), np.where(is_left, right, high)
    return (low + high) / 2


LinearFunction = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Of exponents (G,): how much a quantity grows with the slope, and with the constant."""


@dataclass(frozen=True, kw_only=True)
class _Profile:
    """Where a curve through the means y (m,) fits: its sum of squares is at most `limit`."""

    curve: _Curve
    y: np.ndarray
    best_exponent: float
    limit: float

    def exponents(self) -> Interval:
        """The exponents that fit; an end at the largest exponent is none."""

        def excess(exponent: float) -> float:
            return float(self._squares(np.array([exponent]))[0] - self.limit)

        grid = self._grid()
        fits = np.flatnonzero(self._squares(grid) <= self.limit)
        first, last = fits[0], fits[-1]
        root: Any = optimize.brentq
        low = None if first == 0 else root(excess, grid[first - 1], grid[first], xtol=1e-10)
        high = None if last == len(grid) - 1 else root(excess, grid[last], grid[last + 1], xtol=1e-10)
        return Interval(low=low, high=high)

    def extremes(self, quantity: LinearFunction, *, has_limit: bool) -> Interval:
        """Least and largest value of the quantity where the curve fits.

        An end that is reached at the largest exponent is none, unless the quantity `has_limit` as the exponent grows.
        """
        low, at_low = self._greatest(lambda exponents: -self._reach(exponents, quantity, -1.0))
        high, at_high = self._greatest(lambda exponents: self._reach(exponents, quantity, 1.0))
        is_open = [abs(at) == MAX_EXPONENT and not has_limit for at in (at_low, at_high)]
        return Interval(low=None if is_open[0] else -low, high=None if is_open[1] else high)

    def _grid(self) -> np.ndarray:
        return np.unique([*self.curve.exponents(), self.best_exponent])

    def _lines(self, exponents: np.ndarray) -> _Line:
        line = self.curve.lines(exponents, self.y[None], is_crossed=True)
        return _Line(line.uu, line.uy[0], line.yy[0], line.u_mean, line.y_mean[0], line.total)

    def _squares(self, exponents: np.ndarray) -> np.ndarray:
        return self.curve.best_lines(self._lines(exponents))[2]

    def _greatest(self, function: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """The maximum over the exponent and its place, by grids that close in; the function is -inf where nothing fits."""
        grid = self._grid()
        for _ in range(8):
            place = int(function(grid).argmax())
            grid = np.unique([grid[place], *np.linspace(grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)], 31)])
        values = function(grid)
        return float(values.max()), float(grid[values.argmax()])

    def _reach(self, exponents: np.ndarray, quantity: LinearFunction, sign: float) -> np.ndarray:
        """The largest (sign 1) or least (sign -1) value that fits, for each exponent (G,); -inf or inf where none does.

        A linear function is extreme on the ellipse of slopes and constants that fit, or where an edge of the domain cuts it.
        """
        by_slope, by_constant = quantity(exponents)
        line = self._lines(exponents)
        reach = np.full(len(exponents), -sign * np.inf)

        def offer(slope: np.ndarray, constant: np.ndarray, room: np.ndarray) -> None:
            allowed = room >= 0
            if self.curve.form.exponents:
                allowed &= (slope >= 0) & (constant >= 0)
            value = by_slope * slope + by_constant * constant
            np.copyto(reach, np.maximum(reach, value) if sign > 0 else np.minimum(reach, value), where=allowed)

        if self.curve.form is not POWER:
            slope = _ratio(line.uy, line.uu)
            room = self.limit - line.squares(slope, line.y_mean - slope * line.u_mean)
            # In slope and deviation = constant + slope * u_mean - y_mean the ellipse has the axes uu and total.
            along_slope = by_slope - by_constant * line.u_mean
            length = np.sqrt(_ratio(along_slope**2, line.uu) + by_constant**2 / line.total)
            step = sign * _ratio(np.sqrt(np.maximum(room, 0)), length)
            slope = slope + step * _ratio(along_slope, line.uu)
            offer(slope, line.y_mean - slope * line.u_mean + step * by_constant / line.total, room)
        if self.curve.form.exponents:
            place, curvature, least = line.through_origin()
            room = self.limit - least
            half = np.sqrt(_ratio(np.maximum(room, 0), curvature))
            for slope in (place - half, place + half):
                offer(np.maximum(slope, 0), np.zeros_like(slope), room)
        if self.curve.form is SATURATING_POWER:
            room = self.limit - (line.yy + np.zeros_like(line.uu))
            half = np.sqrt(np.maximum(room, 0) / line.total)
            for constant in (line.y_mean - half, line.y_mean + half):
                offer(np.zeros_like(line.uu), np.maximum(constant, 0), room)
        return reach


def fit_one_variable(points: Points, form: Form, *, noise_sd: float | None, num_resamples: int, seed: int) -> Law:
    """The law of this form through points of one variable; `noise_sd` is the standard deviation of one training, if it is known.

    Raises ValueError if there are fewer distinct x than parameters.
    """
    distinct = points.distinct()
    p, m = len(form.parameters), len(distinct.means)
    if m < p:
        name, known = points.x_names[0], "value" if m == 1 else "values"
        raise ValueError(f"{m} distinct {known} of {name} for the {p} parameters of {form.formula}; at least {p} are needed")
    log_x = np.log(distinct.x[:, 0])
    reference = float(log_x.mean())
    curve = _Curve(form=form, log_x=log_x - reference, log_reference=reference, weights=distinct.counts.astype(float))
    y = distinct.means
    exponent, slope, constant, squares = curve.fit(y[None])
    best = {name: float(values[0]) for name, values in curve.parameters(exponent, slope, constant).items()}
    all_squares, free = float(squares[0] + distinct.scatter.sum()), points.n - p
    sd = noise_sd if noise_sd is not None else math.sqrt(all_squares / free) if free else None
    profile = None
    if sd is not None:
        threshold = stats.chi2.ppf(CONFIDENCE, 1) if noise_sd is not None else stats.f.ppf(CONFIDENCE, 1, free)
        # A curve through every point leaves only rounding errors, which are no sum of squares.
        room = max(sd**2 * float(threshold), 1e-13 * float(curve.weights @ y**2))
        profile = _Profile(curve=curve, y=y, best_exponent=float(exponent[0]), limit=float(squares[0]) + room)

    def at(x: np.ndarray) -> np.ndarray:
        return slope[0] * curve.column(exponent, np.log(x[:, 0]) - reference)[0] + constant[0]

    def interval_at(x: np.ndarray) -> Interval:
        return _interval_at(profile, float(np.log(x[0]) - reference)) if profile else NO_INTERVAL

    return Law(
        form=form,
        points=points,
        best_fit=best,
        parameters=_parameters(
            curve, profile, best, _bootstrap(curve, at(distinct.x), sd, free, noise_sd is not None, num_resamples, seed)
        ),
        aicc=_aicc(points.n, p, all_squares, noise_sd),
        loo=_leave_one_out(curve, distinct.counts, y, distinct.scatter),
        noise_sd=sd,
        is_noise_known=noise_sd is not None,
        lack_of_fit_p=_lack_of_fit(float(squares[0]), float(distinct.scatter.sum()), m - p, points.n - m, noise_sd),
        curve=at,
        interval_at=interval_at,
    )


def _interval_at(profile: _Profile, log_x: float) -> Interval:
    curve = profile.curve

    def value(exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return curve.column(exponents, np.array([log_x]))[:, 0], np.ones(len(exponents))

    return profile.extremes(value, has_limit=curve.log_x.min() <= log_x <= curve.log_x.max())


def _parameters(
    curve: _Curve, profile: _Profile | None, best: dict[str, float], draws: dict[str, np.ndarray] | None
) -> dict[str, Parameter]:
    if profile is None or draws is None:
        return {name: Parameter(value=None, profile=NO_INTERVAL, bootstrap=NO_INTERVAL) for name in best}
    reference = curve.log_reference
    quantities: dict[str, LinearFunction] = {
        "a": lambda exponents: (np.exp(-exponents * reference), np.zeros(len(exponents))),
        "b": lambda exponents: (np.zeros(len(exponents)), np.ones(len(exponents))),
        "c": lambda exponents: (np.full(len(exponents), -reference), np.ones(len(exponents))),
        "d": lambda exponents: (np.ones(len(exponents)), np.zeros(len(exponents))),
    }
    found = {}
    for name, value in best.items():
        interval = profile.exponents() if name == "alpha" else profile.extremes(quantities[name], has_limit=name != "a")
        is_inside = interval.is_bounded and (name not in ("a", "b") or interval.low != 0)
        bootstrap = percentiles(draws[name])
        if name == "alpha":
            bootstrap = Interval(low=_below_largest(bootstrap.low), high=_below_largest(bootstrap.high))
        found[name] = Parameter(value=value if is_inside else None, profile=interval, bootstrap=bootstrap)
    return found


def _below_largest(exponent: float | None) -> float | None:
    return None if exponent is None or abs(exponent) > 0.999 * MAX_EXPONENT else exponent


def _bootstrap(
    curve: _Curve, fitted: np.ndarray, sd: float | None, free: int, is_known: bool, num_resamples: int, seed: int
) -> dict[str, np.ndarray] | None:
    """Parameters (R,) of the parametric bootstrap: means drawn around the fitted curve, and fitted again.

    An estimated standard deviation is drawn too, by its chi-squared distribution: a bootstrap of few points without it has the tails of a
    normal distribution where Student's t are due.
    """
    if sd is None:
        return None
    generator = np.random.default_rng(seed)
    each_sd = np.full((num_resamples, 1), sd) if is_known else sd * np.sqrt(free / generator.chisquare(free, (num_resamples, 1)))
    noise = generator.standard_normal((num_resamples, len(fitted))) * each_sd / np.sqrt(curve.weights)
    return curve.parameters(*curve.fit(fitted + noise)[:3])


def _aicc(n: int, p: int, squares: float, noise_sd: float | None) -> Criterion:
    if noise_sd is not None:
        return corrected_aic(squares / noise_sd**2 + n * np.log(2 * np.pi * noise_sd**2), p, n)
    with np.errstate(divide="ignore"):
        return corrected_aic(n * (np.log(2 * np.pi * squares / n) + 1), p + 1, n)


def _lack_of_fit(between: float, within: float, free_between: int, free_within: int, noise_sd: float | None) -> float | None:
    """The p-value of the F test of the means' distance from the curve against the scatter of seeds (chi-squared if that is known)."""
    if free_between < 1:
        return None
    if noise_sd is not None:
        return float(stats.chi2.sf(between / noise_sd**2, free_between))
    if free_within < 1 or within == 0:
        return None
    return float(stats.f.sf(between / free_between / (within / free_within), free_between, free_within))


def _leave_one_out(curve: _Curve, counts: np.ndarray, y: np.ndarray, scatter: np.ndarray) -> Criterion:
    """Root mean square error of rows predicted without them and their replicates."""
    m, p = len(y), len(curve.form.parameters)
    if m - 1 < p:
        return Criterion(value=None, reason=f"{m - 1} distinct x would be left for {p} parameters")
    squares = scatter.sum()
    for left_out in range(m):
        kept = np.arange(m) != left_out
        part = replace(curve, log_x=curve.log_x[kept], weights=curve.weights[kept])
        exponent, slope, constant, _ = part.fit(y[None, kept])
        predicted = slope[0] * curve.column(exponent, curve.log_x[left_out : left_out + 1])[0, 0] + constant[0]
        squares += counts[left_out] * (y[left_out] - predicted) ** 2
    return Criterion(value=float(np.sqrt(squares / counts.sum())))

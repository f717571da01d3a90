"""What a fit says: parameters with intervals, criteria to compare forms by, predictions. Each is a number or the reason for none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from results.scaling_laws.points import Points

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Form:
    """A family of curves; `exponents` are those of its parameters that are powers of a variable."""

    name: str
    formula: str
    parameters: tuple[str, ...]
    exponents: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Ends at a confidence of 95 %; None for one that the data do not bound."""

    low: float | None
    high: float | None

    @property
    def is_bounded(self) -> bool:
        return self.low is not None and self.high is not None


NO_INTERVAL = Interval(low=None, high=None)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """`value` is None where the data do not identify the parameter; `profile` holds the values that fit all the same.

    `profile` is the profile-likelihood interval. A parameter is identified if both ends of it lie inside the domain: a floor that may be 0
    is not, nor is an exponent that may be as large as you like.
    """

    value: float | None
    profile: Interval
    bootstrap: Interval

    @property
    def identified(self) -> bool:
        return self.value is not None

    def to_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "low": self.profile.low,
            "high": self.profile.high,
            "identified": self.identified,
            "bootstrap_low": self.bootstrap.low,
            "bootstrap_high": self.bootstrap.high,
        }


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A number that compares forms, lower is better; None with the reason where it is not defined."""

    value: float | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The curve at `x` with its interval; `refused` says why there is none. The noise of one more training is not part of it."""

    x: tuple[float, ...]
    value: float | None
    low: float | None
    high: float | None
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"x": list(self.x), "value": self.value, "low": self.low, "high": self.high, "refused": self.refused or None}


@dataclass(frozen=True, kw_only=True)
class Law:
    """One form fitted to points.

    `best_fit` are the parameters of the drawn curve, whether the data identify them or not. `noise_sd` is the standard deviation of one
    training around the curve, of y or (with two variables) of log y; `is_noise_known` if the user gave it; None if nothing is left to
    estimate it from. `lack_of_fit_p` tests whether the points miss the curve by more than that noise; None without seeds or a known noise.
    """

    form: Form
    points: Points
    best_fit: Mapping[str, float]
    parameters: Mapping[str, Parameter]
    aicc: Criterion
    loo: Criterion
    noise_sd: float | None
    is_noise_known: bool = False
    lack_of_fit_p: float | None = None
    curve: Callable[[np.ndarray], np.ndarray] = field(repr=False)
    interval_at: Callable[[np.ndarray], Interval] = field(repr=False)

    def predict(self, x: Sequence[float]) -> Prediction:
        """The curve at x (V,) with its interval, or the reason why it is refused.

        An extrapolation reaches as far beyond the points as they span themselves, on the logarithmic axis, and no further; one without an
        upper and a lower bound is refused.
        """
        at = np.asarray(x, dtype=float)
        refused = next(filter(None, map(_too_far, self.points.x_names, self.points.x.T, at)), "")
        if not refused:
            interval = self.interval_at(at)
            if interval.is_bounded:
                return Prediction(x=tuple(map(float, at)), value=float(self.curve(at[None])[0]), low=interval.low, high=interval.high)
            refused = "the data do not bound it" if self.noise_sd is not None else "nothing is left to estimate the noise from"
        return Prediction(x=tuple(map(float, at)), value=None, low=None, high=None, refused=refused)

    def to_json(self) -> dict[str, Any]:
        return {
            "form": self.form.name,
            "formula": self.form.formula,
            "params": {name: parameter.to_json() for name, parameter in self.parameters.items()},
            "aicc": self.aicc.value,
            "aicc_reason": self.aicc.reason or None,
            "loo": self.loo.value,
            "loo_reason": self.loo.reason or None,
            "n": self.points.n,
            "best_fit": dict(self.best_fit),
            "noise_sd": self.noise_sd,
            "lack_of_fit_p": self.lack_of_fit_p,
        }


def _too_far(name: str, measured: np.ndarray, at: float) -> str:
    span = measured.max() / measured.min()
    beyond = max(measured.min() / at, at / measured.max())
    if beyond <= span:
        return ""
    return f"{name} = {at:g} is {beyond:.3g} times beyond the points, which span a factor of {span:.3g}"


def corrected_aic(deviance: float, num_parameters: int, n: int) -> Criterion:
    """AICc of a fit with this -2 log likelihood (Hurvich and Tsai, Biometrika 76, 1989); undefined where n - k - 1 <= 0."""
    k = num_parameters
    if n - k - 1 <= 0:
        return Criterion(value=None, reason=f"n - k - 1 = {n - k - 1}, with n = {n} and k = {k}")
    if not np.isfinite(deviance):
        return Criterion(value=None, reason="the curve passes through every point")
    return Criterion(value=float(deviance + 2 * k + 2 * k * (k + 1) / (n - k - 1)))


def percentiles(draws: np.ndarray) -> Interval:
    """The percentile interval of bootstrap draws."""
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(low=float(low), high=float(high))

"""All forms fitted to the same points, and which of them the data prefer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from results.scaling_laws.law import Form, Law, Prediction
from results.scaling_laws.one_variable import FORMS, fit_one_variable
from results.scaling_laws.points import Points
from results.scaling_laws.two_variables import CHINCHILLA, fit_two_variables

NUM_RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True)
class Laws:
    """The law that was asked for, all forms of its variables (itself among them), and its predictions.

    The intervals are those of `law`. Its default, the saturating power law, holds a power law as a special case: its intervals say how much
    the choice between the two matters, where intervals of a form that was chosen on the same data would not.
    """

    law: Law
    forms: tuple[Law, ...]
    predictions: tuple[Prediction, ...] = ()

    def best(self, criterion: str) -> Law | None:
        """The form with the least `aicc` or `loo`; None if one of them has none, or there is nothing to compare."""
        values = {law.form.name: getattr(law, criterion).value for law in self.forms}
        if len(values) < 2 or None in values.values():
            return None
        return min(self.forms, key=lambda law: values[law.form.name])

    def to_json(self) -> dict[str, Any]:
        points = self.law.points
        return {
            **self.law.to_json(),
            "num_points": len(points.distinct().counts),
            "x": list(points.x_names),
            "y": points.y_name,
            "at": [prediction.to_json() for prediction in self.predictions],
            "best_by": {name: best.form.name if (best := self.best(name)) else None for name in ("aicc", "loo")},
            "forms": [law.to_json() for law in self.forms],
        }


def fit_laws(
    points: Points,
    *,
    form: str = "",
    noise_sd: float | None = None,
    at: Sequence[Sequence[float]] = (),
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Laws:
    """Fit every form of the points' variables that they have enough distinct x for; `at` are x to predict at, each of V numbers.

    `form` names the law to answer with (default: the saturating power law, or the Chinchilla form for two variables). `noise_sd` is the
    standard deviation of y from one training to another, where it is known from elsewhere; without it replicates and residuals tell.
    Raises ValueError for an unknown form and for fewer distinct x than it has parameters.
    """
    known = forms_of(points.x.shape[1])
    named = {one.name: one for one in known}
    if form and form not in named:
        raise ValueError(f"unknown form {form!r} of {_variables(points)}; known: {', '.join(named)}")
    chosen = named.get(form, known[0])
    if points.x.shape[1] == 2:
        if noise_sd is not None:
            raise ValueError("a known noise is for forms of one variable; with two variables the residuals of log loss tell")
        law = fit_two_variables(points, num_resamples=num_resamples, seed=seed)
        laws = {chosen.name: law}
    else:
        if noise_sd is not None and not 0 < noise_sd < float("inf"):
            raise ValueError(f"the noise is {noise_sd:g}; a positive standard deviation is expected")
        law = fit_one_variable(points, chosen, noise_sd=noise_sd, num_resamples=num_resamples, seed=seed)
        enough = [one for one in known if len(one.parameters) <= len(points.distinct().counts) and one is not chosen]
        others = {one.name: fit_one_variable(points, one, noise_sd=noise_sd, num_resamples=num_resamples, seed=seed) for one in enough}
        laws = {chosen.name: law, **others}
    predictions = tuple(law.predict(x) for x in at)
    return Laws(law=law, forms=tuple(laws[one.name] for one in known if one.name in laws), predictions=predictions)


def forms_of(num_variables: int) -> tuple[Form, ...]:
    """The forms of one variable or of two; the first one is the default."""
    return {1: FORMS, 2: (CHINCHILLA,)}[num_variables]


def _variables(points: Points) -> str:
    return "one variable" if points.x.shape[1] == 1 else "two variables"

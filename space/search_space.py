"""A search space: named axes and the function from a point on them to a candidate.

`suggest` works with anything that has Optuna's `suggest_categorical`, `suggest_int` and `suggest_float`, so this package needs no Optuna.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from space.component import Scalar
from space.model import Model
from space.recipe import Recipe
from space.registry import SpecError
from space.spec import ArchSpec, digest_of
from space.values import Choices, Interval
from space.weights import Weights


class Suggests(Protocol):
    """The part of `optuna.Trial` that a space uses."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int: ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One decision: a tuple of unordered choices, a `range` of integers, or an `Interval` of real numbers.

    An axis with `when=(other, value)` exists only where an earlier axis took that value, or one of a tuple of values:
    first the component, then its own choices.
    """

    name: str
    choices: Choices
    when: tuple[str, Scalar | tuple[Scalar, ...]] | None = None

    def is_active(self, params: Mapping[str, Scalar]) -> bool:
        if self.when is None:
            return True
        other, value = self.when
        return other in params and params[other] in (value if isinstance(value, tuple) else (value,))

    def suggest(self, trial: Suggests) -> Scalar:
        if isinstance(self.choices, range):
            return trial.suggest_int(self.name, self.choices[0], self.choices[-1], step=self.choices.step)
        if isinstance(self.choices, Interval):
            return trial.suggest_float(self.name, self.choices.low, self.choices.high, log=self.choices.log)
        return trial.suggest_categorical(self.name, self.choices)

    def at(self, share: float) -> Scalar:
        """The choice at `share` of the way through them, from 0, the first, to below 1."""
        if isinstance(self.choices, Interval):
            return self.choices.at(share)
        return self.choices[int(share * len(self.choices))]

    @property
    def size(self) -> float:
        """Number of choices."""
        return math.inf if isinstance(self.choices, Interval) else len(self.choices)

    def to_json(self) -> dict[str, Any]:
        values: Any = list(self.choices) if isinstance(self.choices, tuple) else str(self.choices)
        return {"name": self.name, "choices": values, **({"when": list(self.when)} if self.when else {})}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a trial measures: the network that is reported, how it is trained, and a stand-in where one is scored in its place.

    `settings` are evaluator settings of this trial alone, `{"profile": {"batch_size": 8}}`; they overrule those of its phase. Under
    the name "resources" they say what the trial takes of the cluster: `{"resources": {"accelerator_type": "H100"}}`. Settings and the
    accelerator type are part of the measurement's identity. `weights` are those that the network starts from, None for fresh ones. `label`
    is the method's own notation of the network, as a reader of the leaderboard knows it.
    """

    model: Model
    recipe: Recipe | None = None
    weights: Weights | None = None
    proxy: ArchSpec | None = None
    settings: Mapping[str, Mapping[str, Scalar]] = field(default_factory=dict, hash=False)
    label: str = ""

    @property
    def scored(self) -> Model:
        """The network that the score is computed on."""
        return self.proxy or self.model

    def to_json(self) -> dict[str, Any]:
        recipe = {"recipe": self.recipe.to_json()} if self.recipe else {}
        weights = {"weights": self.weights.to_json()} if self.weights else {}
        proxy = {"proxy": self.proxy.to_json()} if self.proxy else {}
        settings = {"settings": {name: dict(chosen) for name, chosen in self.settings.items()}} if self.settings else {}
        return {"label": self.label, "model": self.model.to_json(), **recipe, **weights, **proxy, **settings}


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Axes in the order they are decided, and `decode`: a point on them to the candidate it names."""

    name: str
    axes: tuple[Axis, ...]
    decode: Callable[[Mapping[str, Any]], Candidate]

    def suggest(self, trial: Suggests) -> dict[str, Scalar]:
        """A point of the space, decided by `trial` axis by axis."""
        params: dict[str, Scalar] = {}
        for axis in self.axes:
            if axis.is_active(params):
                params[axis.name] = axis.suggest(trial)
        return params

    def check(self, params: Mapping[str, Scalar]) -> None:
        """Raise SpecError unless `params` is a point of this space: which axis, what is allowed."""
        wanted = [axis for axis in self.axes if axis.is_active(params)]
        if extra := set(params) - {axis.name for axis in wanted}:
            raise SpecError(f"space {self.name!r} has no axis {', '.join(sorted(extra))} at this point")
        for axis in wanted:
            if axis.name not in params or params[axis.name] not in axis.choices:
                allowed = ", ".join(map(str, axis.choices)) if isinstance(axis.choices, tuple) else axis.choices
                raise SpecError(f"space {self.name!r}: {axis.name} is {params.get(axis.name)!r}; allowed: {allowed}")

    @property
    def size(self) -> float:
        """Number of points: whole, or infinite if an axis is an interval."""
        deciding = {axis.when[0] for axis in self.axes if axis.when}

        def count(params: dict[str, Scalar], axes: tuple[Axis, ...]) -> float:
            number: float = 1
            for index, axis in enumerate(axes):
                if not axis.is_active(params):
                    continue
                if axis.name in deciding and not isinstance(axis.choices, Interval):
                    return number * sum(count({**params, axis.name: value}, axes[index + 1 :]) for value in axis.choices)
                number *= axis.size
            return number

        return count({}, self.axes)

    def first_point(self) -> dict[str, Scalar]:
        """The first choice of every axis."""
        params: dict[str, Scalar] = {}
        for axis in self.axes:
            if axis.is_active(params):
                params[axis.name] = axis.at(0.0)
        return params

    def points(self) -> Iterator[dict[str, Scalar]]:
        """Every point, the last axis varying fastest; raises SpecError if an axis is an interval."""
        if intervals := [axis.name for axis in self.axes if isinstance(axis.choices, Interval)]:
            raise SpecError(f"space {self.name!r} has no list of points: {', '.join(intervals)} is an interval of real numbers")

        def extend(params: dict[str, Scalar], axes: tuple[Axis, ...]) -> Iterator[dict[str, Scalar]]:
            if not axes:
                yield dict(params)
            elif axes[0].is_active(params):
                assert not isinstance(axes[0].choices, Interval)
                for value in axes[0].choices:
                    yield from extend({**params, axes[0].name: value}, axes[1:])
            else:
                yield from extend(params, axes[1:])

        yield from extend({}, self.axes)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "axes": [axis.to_json() for axis in self.axes]}

    @property
    def digest(self) -> str:
        """Changes when an axis or a choice does: a study refuses to go on with another space."""
        return digest_of(self.to_json())

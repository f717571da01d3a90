"""A search space: named axes and the function from a point on them to a candidate.

`suggest` works with anything that has Optuna's `suggest_categorical` and `suggest_int`, so this package needs no Optuna.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from space.component import Scalar
from space.model import Model
from space.recipe import Recipe
from space.registry import SpecError
from space.spec import ArchSpec, digest_of
from space.weights import Weights


class Suggests(Protocol):
    """The part of `optuna.Trial` that a space uses."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One decision: a tuple of unordered choices or a `range` of integers.

    An axis with `when=(other, value)` exists only where an earlier axis took that value, or one of a tuple of values:
    first the component, then its own choices.
    """

    name: str
    choices: tuple[Scalar, ...] | range
    when: tuple[str, Scalar | tuple[Scalar, ...]] | None = None

    def is_active(self, params: Mapping[str, Scalar]) -> bool:
        if self.when is None:
            return True
        other, value = self.when
        return other in params and params[other] in (value if isinstance(value, tuple) else (value,))

    def suggest(self, trial: Suggests) -> Scalar:
        if isinstance(self.choices, range):
            return trial.suggest_int(self.name, self.choices[0], self.choices[-1], step=self.choices.step)
        return trial.suggest_categorical(self.name, self.choices)

    def to_json(self) -> dict[str, Any]:
        values: Any = str(self.choices) if isinstance(self.choices, range) else list(self.choices)
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
                allowed = axis.choices if isinstance(axis.choices, range) else ", ".join(map(str, axis.choices))
                raise SpecError(f"space {self.name!r}: {axis.name} is {params.get(axis.name)!r}; allowed: {allowed}")

    @property
    def size(self) -> int:
        """Number of points."""
        deciding = {axis.when[0] for axis in self.axes if axis.when}

        def count(params: dict[str, Scalar], axes: tuple[Axis, ...]) -> int:
            number = 1
            for index, axis in enumerate(axes):
                if not axis.is_active(params):
                    continue
                if axis.name in deciding:
                    return number * sum(count({**params, axis.name: value}, axes[index + 1 :]) for value in axis.choices)
                number *= len(axis.choices)
            return number

        return count({}, self.axes)

    def points(self) -> Iterator[dict[str, Scalar]]:
        """Every point, the last axis varying fastest."""

        def extend(params: dict[str, Scalar], axes: tuple[Axis, ...]) -> Iterator[dict[str, Scalar]]:
            if not axes:
                yield dict(params)
            elif axes[0].is_active(params):
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

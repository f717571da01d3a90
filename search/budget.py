"""What a network may cost: bounds on the metrics that are known without measuring, and the way to a network within them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from space.component import Scalar
from space.registry import SpecError, unknown_name
from space.search_space import Axis, Candidate, SearchSpace
from space.values import Choices, Interval
from workers.evaluator import Context, Evaluator, evaluators

MAX_ENUMERATED = 200_000
"""Points of the largest space that is searched whole before a budget is refused: some ten seconds at most."""

NUM_STARTS = 16
NUM_PAIRED = 4
"""Of so many networks, the nearest that climbing found, all changes of two axes are tried."""

Point = Mapping[str, Scalar]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bounds on free metrics (of an evaluator with `is_free`), in the metric's own unit: `at_most={"params_m": 22}`.

    Metrics are those of the candidate as its leaderboard row has them, measured with the default settings of their
    evaluator. Raises SpecError for a metric that is unknown or not free, a bound that is no finite number, and an upper
    bound below the lower one.

    A budget is not one of the settings that a study is created with. One that is resumed under another budget keeps and
    counts the trials it has; the new bounds hold for what is proposed from then on.
    """

    at_most: Mapping[str, float] = field(default_factory=dict)
    at_least: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for flag, bounds in (("--max", self.at_most), ("--min", self.at_least)):
            for metric, bound in bounds.items():
                _free_evaluator(metric, f"{flag} {metric}={bound:g}")
                if not math.isfinite(bound):
                    raise SpecError(f"{flag} {metric}={bound}: a finite number is expected")
        for metric in self.at_most.keys() & self.at_least.keys():
            if self.at_most[metric] < self.at_least[metric]:
                raise SpecError(f"--max {metric}={self.at_most[metric]:g} is below --min {metric}={self.at_least[metric]:g}")

    def __str__(self) -> str:
        at_most = [f"--max {metric}={bound:g}" for metric, bound in self.at_most.items()]
        return " ".join([*at_most, *(f"--min {metric}={bound:g}" for metric, bound in self.at_least.items())])

    @property
    def is_empty(self) -> bool:
        return not self.at_most and not self.at_least

    def upper(self) -> Budget:
        """The upper bounds alone."""
        return Budget(at_most=self.at_most)

    def values(self, candidate: Candidate) -> dict[str, float]:
        """The candidate's bounded metrics; raises SpecError if one is not defined for it."""
        measured: dict[str, float] = {}
        for evaluator in self._evaluators:
            subject = candidate.scored if evaluator.subject == "proxy" else candidate.model
            measured |= evaluator.function(subject, _CONTEXT, evaluator.settings())
        return {metric: measured[metric] for metric in dict.fromkeys([*self.at_most, *self.at_least])}

    def excess(self, candidate: Candidate) -> dict[str, float]:
        """By constraint (`max_params_m`, `min_params_m`, ...) how far the candidate is beyond the bound; at most 0 where it holds."""
        if self.is_empty:
            return {}
        values = self.values(candidate)
        over = {f"max_{metric}": values[metric] - bound for metric, bound in self.at_most.items()}
        return over | {f"min_{metric}": bound - values[metric] for metric, bound in self.at_least.items()}

    def holds(self, candidate: Candidate) -> bool:
        return all(over <= 0 for over in self.excess(candidate).values())

    def distance(self, space: SearchSpace, point: Point) -> float:
        """The sum of what the network at `point` is beyond each bound, relative to that bound.

        0 within the budget, infinite if there is no such network.
        """
        try:
            excess = self.excess(space.decode(point))
        except SpecError:
            return math.inf
        return sum(over / self._scale[name] for name, over in excess.items() if over > 0)

    def check_reachable(self, space: SearchSpace) -> None:
        """Raise SpecError, with the nearest network, if no network of the space is within the budget.

        Climbing from several starts finds one in most budgets that have one. Where it does not, a space of up to `MAX_ENUMERATED`
        points is searched whole; in a larger one the nearest networks found are changed in two axes at once.
        """
        if self.is_empty:
            return
        is_small = space.size <= MAX_ENUMERATED
        nearest, least = space.first_point(), math.inf
        climbed = sorted(self._climbed(space), key=lambda found: found[1])
        if climbed[0][1] == 0:
            return
        for point, distance in self._enumerated(space) if is_small else climbed[:1]:
            if distance == 0:
                return
            if distance < least:
                nearest, least = point, distance
        candidate = space.decode(nearest)
        if math.isinf(least):
            self._raise_undefined(space, candidate)
        shown = ", ".join(f"{metric} {value:.4g}" for metric, value in self.values(candidate).items())
        how = f"the nearest of its {space.size:,}" if is_small else f"the nearest found, climbing from {NUM_STARTS} starts,"
        raise SpecError(f"no network of space {space.name!r} is within {self}; {how} has {shown} ({candidate.label})")

    def _enumerated(self, space: SearchSpace) -> Iterator[tuple[Point, float]]:
        return ((point, self.distance(space, point)) for point in space.points())

    def _climbed(self, space: SearchSpace) -> Iterator[tuple[Point, float]]:
        generator = random.Random(0)
        found = []
        for number in range(NUM_STARTS):
            start = random_point(space, generator) if number else space.first_point()
            found.append(climb(space, start, self, generator))
            yield found[-1]
            if found[-1][1] == 0:
                return
        if space.size > MAX_ENUMERATED:
            for point, _ in sorted(found, key=lambda each: each[1])[:NUM_PAIRED]:
                yield from ((moved, self.distance(space, moved)) for moved in _moved_in_two_axes(space, point, generator))

    def _raise_undefined(self, space: SearchSpace, candidate: Candidate) -> None:
        try:
            self.values(candidate)
        except SpecError as error:
            raise SpecError(f"{self} has no meaning in space {space.name!r}: {error}") from error

    @cached_property
    def _evaluators(self) -> tuple[Evaluator, ...]:
        needed = {_free_evaluator(metric, str(self)).name for metric in (*self.at_most, *self.at_least)}
        return tuple(evaluators.get(name) for name in sorted(needed))

    @cached_property
    def _scale(self) -> dict[str, float]:
        upper = {f"max_{metric}": abs(bound) or 1.0 for metric, bound in self.at_most.items()}
        return upper | {f"min_{metric}": abs(bound) or 1.0 for metric, bound in self.at_least.items()}


UNLIMITED = Budget()

_CONTEXT = Context(seed=0)
"""A free evaluator looks at nothing but the model."""


def assigned_bounds(flag: str, assignments: Sequence[str]) -> list[tuple[str, str, float]]:
    """The flag as it was given, the metric and the bound of every METRIC=VALUE."""
    assigned: list[tuple[str, str, float]] = []
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        try:
            if not (name and equals):
                raise ValueError
            assigned.append((f"{flag} {assignment}", name.strip(), float(value)))
        except ValueError:
            raise SpecError(f"{flag} {assignment!r} is malformed; METRIC=VALUE with a number is expected, e.g. gmacs=1.3") from None
    return assigned


def free_metrics() -> tuple[str, ...]:
    """The names of all metrics that are known without measuring, sorted."""
    found = map(evaluators.get, evaluators.names())
    return tuple(sorted({metric.name for evaluator in found if evaluator.is_free for metric in evaluator.metrics}))


def _free_evaluator(metric: str, where: str) -> Evaluator:
    """The free evaluator of `metric`; raises SpecError that says what is free if there is none."""
    measuring: list[str] = []
    for evaluator in map(evaluators.get, evaluators.names()):
        if metric not in (declared.name for declared in evaluator.metrics):
            continue
        if evaluator.is_free:
            return evaluator
        measuring.append(evaluator.name)
    if not measuring:
        raise unknown_name("metric", metric, free_metrics(), where)
    raise SpecError(
        f"{where}: {metric} is known only after measuring (evaluator {', '.join(measuring)}); "
        f"a budget takes what is known before: {', '.join(free_metrics())}"
    )


def random_point(space: SearchSpace, generator: random.Random, fixed: Point | None = None) -> dict[str, Scalar]:
    """A point of the space, every active axis drawn uniformly but those that `fixed` holds."""
    return _completed(space, fixed or {}, generator)


def climb(space: SearchSpace, start: Point, budget: Budget, generator: random.Random, fixed: Collection[str] = ()) -> tuple[Point, float]:
    """From `start` towards the budget, one axis at a time; the point where it ends, and its distance.

    Moves are tried in random order and the first that lowers the distance is taken, so equal starts end at different
    networks. It ends within the budget or where no move lowers the distance. Axes named in `fixed` stay as they are.
    """
    point, distance = start, budget.distance(space, start)
    while distance > 0:
        moves = [
            (axis.name, value)
            for axis in space.axes
            if axis.name in point and axis.name not in fixed
            for value in _near(axis.choices, point[axis.name])
        ]
        generator.shuffle(moves)
        for name, value in moves:
            moved = _completed(space, {**point, name: value}, generator)
            if (there := budget.distance(space, moved)) < distance:
                point, distance = moved, there
                break
        else:
            break
    return point, distance


def _moved_in_two_axes(space: SearchSpace, point: Point, generator: random.Random) -> Iterator[Point]:
    axes = [axis for axis in space.axes if axis.name in point]
    for one, other in itertools.combinations(axes, 2):
        for values in itertools.product(_near(one.choices, point[one.name]), _near(other.choices, point[other.name])):
            yield _completed(space, {**point, one.name: values[0], other.name: values[1]}, generator)


def _near(choices: Choices, value: Any) -> list[Scalar]:
    """The other choices; of a range those at distances 1, 2, 4, ..., for it may be long. None of an interval: no cost depends on one."""
    if isinstance(choices, Interval):
        return []
    if isinstance(choices, tuple):
        return [choice for choice in choices if choice != value]
    here = choices.index(value)
    strides = [2**power for power in range(len(choices).bit_length())]
    return [choices[index] for stride in strides for index in (here - stride, here + stride) if 0 <= index < len(choices)]


def _completed(space: SearchSpace, wanted: Point, generator: random.Random) -> dict[str, Scalar]:
    """`wanted` without the axes that it deactivates, and with a random choice of those that it activates."""
    point: dict[str, Scalar] = {}
    for axis in space.axes:
        if axis.is_active(point):
            point[axis.name] = wanted[axis.name] if axis.name in wanted else random_choice(axis, generator)
    return point


def random_choice(axis: Axis, generator: random.Random) -> Scalar:
    """A choice of the axis, drawn uniformly."""
    return axis.at(generator.random()) if isinstance(axis.choices, Interval) else generator.choice(axis.choices)

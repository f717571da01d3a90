"""Successive halving in rounds: many short trainings, and longer ones of those that did best.

Non-stochastic best arm identification and hyperparameter optimization (Jamieson and Talwalkar), https://arxiv.org/abs/1502.07943,
figure 1: every point is trained to the first rung, the best share of them to the second, and so on. A point that goes on continues
its own training, so a rung costs only the epochs between it and the one before. The learning rate follows the schedule of the full
length from the first epoch on; what is compared at a rung are trainings in progress, not short ones that have ended.

Deviation from the paper: the rungs are given; in the paper they follow from a budget. Where the answer is not one point but a front, or
one point for each of several budgets, another rule than the best share says who goes on (`NearestToFront`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from results.records import Metric
from search.strategies.grid import Point, point_key, settles
from search.strategy import proposed_point
from space.component import Scalar
from space.registry import SpecError


def rung_sizes(num_points: int, num_rungs: int, reduction: float) -> list[int]:
    """How many points reach each rung: the share 1 / `reduction` of one rung's points, rounded up, goes on to the next."""
    sizes = [num_points]
    for _ in range(num_rungs - 1):
        sizes.append(math.ceil(sizes[-1] / reduction))
    return sizes


class Selection(Protocol):
    """Who goes on: called with the points that are complete at a rung, best first, and the value of each."""

    def __call__(self, points: Sequence[Mapping[str, Scalar]], values: Sequence[float], /) -> Collection[int]:
        """The positions of those that go on, at least one."""
        ...


@dataclass(frozen=True, kw_only=True)
class NearestToFront:
    """The rule of who goes on where a front and a winner under each of several budgets are asked for.

    Within each budget, every point on the front of the value over `cost` goes on, and those that are least behind it, up to
    1 / `reduction` of the points, rounded up, and `at_least` so many. A point is behind by what the best point that costs no more is ahead
    of it: so the cheapest point is on the front, however low its value, and the best point of a budget too. `budgets` say of a point
    whether it is within them; costs are minimised.
    """

    cost: Callable[[Mapping[str, Scalar]], float]
    budgets: Sequence[Callable[[Mapping[str, Scalar]], bool]]
    goal: Metric
    reduction: float
    at_least: int = 1

    def __call__(self, points: Sequence[Mapping[str, Scalar]], values: Sequence[float], /) -> Collection[int]:
        sign = 1 if self.goal.goal == "maximize" else -1
        costs, scores = np.array([self.cost(point) for point in points]), sign * np.array(values)
        chosen: set[int] = set()
        for is_within in self.budgets:
            within = [index for index, point in enumerate(points) if is_within(point)]
            behind = {one: max(scores[other] - scores[one] for other in within if costs[other] <= costs[one]) for one in within}
            number = max(math.ceil(len(within) / self.reduction), self.at_least)
            # Sorted stably: of points that are equally far behind, the best come first.
            chosen.update(sorted(within, key=behind.__getitem__)[:number])
            chosen.update(one for one in within if behind[one] == 0)
        return chosen


class Halving:
    """Proposer of successive halving over `points`, which lack the axis `epochs_axis`.

    `rungs` are epochs in rising order, the last one the whole training. Of the points that are complete at a rung, the best
    1 / `reduction` by `goal`, rounded up, go on, or those that `select` chooses. A point that fails takes no further part; the next start
    tries it again if the failure need not come again, as with a timeout or a lost worker. Everything is derived anew from the told trials.
    Raises SpecError for rungs that do not rise, a reduction of at most 1, or a point that is given twice.
    """

    def __init__(
        self,
        points: Sequence[Mapping[str, Scalar]],
        *,
        rungs: Sequence[int],
        goal: Metric,
        reduction: float = 3.0,
        epochs_axis: str = "epochs_trained",
        select: Selection | None = None,
    ):
        if not points:
            raise SpecError("halving needs at least one point")
        if not rungs or rungs[0] < 1 or any(later <= earlier for earlier, later in itertools.pairwise(rungs)):
            raise SpecError(f"rungs are {list(rungs)}; epochs from 1 are expected, each more than the one before")
        if not 1.0 < reduction < math.inf:
            raise SpecError(f"reduction is {reduction!r}; a number above 1 is expected")
        if len({point_key(point) for point in points}) < len(points):
            raise SpecError("a point is given twice")
        self.ended = ""
        self._points = {point_key(point): dict(point) for point in points}
        self._rungs = tuple(rungs)
        self._goal = goal
        self._reduction = reduction
        self._axis = epochs_axis
        self._select = select
        self._proposed: set[tuple[Point, int]] = set()

    def next_batch(self, study: optuna.Study) -> list[Mapping[str, Scalar]] | None:
        """The points of the first rung that is not complete; empty while it waits for trials in flight, None at the end."""
        trials = self._by_place(study)
        for rung, survivors in zip(self._rungs, self._survivors(trials), strict=False):
            held = [trials.get((point, rung)) for point in survivors]
            wanted: list[Mapping[str, Scalar]] = [
                {**self._points[point], self._axis: rung} for point, trial in zip(survivors, held, strict=True) if trial is None
            ]
            if wanted or any(trial is not None and not trial.state.is_finished() for trial in held):
                self._proposed.update((point_key(self._without_axis(point)), rung) for point in wanted)
                return wanted
        self.ended = self._summary(trials)
        return None

    def unwanted(self, study: optuna.Study) -> list[FrozenTrial]:
        """The waiting trials that this halving does not ask for, or whose point did not survive."""
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        wanted = {
            place
            for rung, points in zip(self._rungs, self._survivors(self._by_place(study)), strict=False)
            for place in itertools.product(points, [rung])
        }
        return [trial for trial in waiting if self._place(trial) not in wanted]

    def num_total(self, study: optuna.Study) -> int | None:
        """Trials that will be complete if no further trial fails; those of earlier starts with other points included.

        None while a `select` has still to say how many go on.
        """
        trials = self._by_place(study)
        known = self._survivors(trials)
        if self._select is not None and len(known) < len(self._rungs):
            return None
        sizes = [
            sum(not _has_failed(trials.get((point, rung))) for point in points) for rung, points in zip(self._rungs, known, strict=False)
        ]
        places = {place for rung, points in zip(self._rungs, known, strict=False) for place in itertools.product(points, [rung])}
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        others = sum(self._place(trial) not in places for trial in complete)
        return others + sum(sizes) + sum(rung_sizes(sizes[-1], len(self._rungs) - len(known) + 1, self._reduction)[1:])

    def family(self, study: optuna.Study) -> list[FrozenTrial]:
        """The trials of the last rung, the best first."""
        trials = self._by_place(study)
        survivors = self._survivors(trials)
        return self._ranked(trials, survivors[-1], self._rungs[-1]) if len(survivors) == len(self._rungs) else []

    def _survivors(self, trials: Mapping[tuple[Point, int], FrozenTrial]) -> list[list[Point]]:
        """The points of each rung, up to the first that is not told completely."""
        reached = [list(self._points)]
        for rung in self._rungs[:-1]:
            told = [trials.get((point, rung)) for point in reached[-1]]
            if any(trial is None or not trial.state.is_finished() for trial in told):
                break
            ranked = self._ranked(trials, reached[-1], rung)
            if not ranked:
                break
            reached.append([self._place(trial)[0] for trial in self._going_on(ranked)])
        return reached

    def _going_on(self, ranked: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Those of the complete trials of a rung, best first, whose points go on to the next."""
        if self._select is None:
            return list(ranked[: math.ceil(len(ranked) / self._reduction)])
        chosen = self._select([self._points[self._place(trial)[0]] for trial in ranked], [trial.values[0] for trial in ranked])
        return [trial for index, trial in enumerate(ranked) if index in chosen]

    def _ranked(self, trials: Mapping[tuple[Point, int], FrozenTrial], points: Sequence[Point], rung: int) -> list[FrozenTrial]:
        """The complete trials of `points` at a rung, the best first, equals in the order of the points."""
        complete = [trial for point in points if (trial := trials.get((point, rung))) and trial.state == TrialState.COMPLETE]
        sign = -1 if self._goal.goal == "maximize" else 1
        return sorted(complete, key=lambda trial: sign * trial.values[0])

    def _by_place(self, study: optuna.Study) -> dict[tuple[Point, int], FrozenTrial]:
        """The trial that counts at each point and rung: a complete one, else one in flight, else a failed one."""
        trials: dict[tuple[Point, int], FrozenTrial] = {}
        for trial in study.get_trials(deepcopy=False):
            place = self._place(trial)
            is_ours = place[0] in self._points and place[1] in self._rungs
            if is_ours and (settles(trial) or place in self._proposed) and _standing(trial) > _standing(trials.get(place)):
                trials[place] = trial
        return trials

    def _place(self, trial: FrozenTrial) -> tuple[Point, int]:
        point = proposed_point(trial)
        return point_key(self._without_axis(point)), point.get(self._axis, 0)

    def _without_axis(self, point: Mapping[str, Scalar]) -> dict[str, Scalar]:
        return {name: value for name, value in point.items() if name != self._axis}

    def _summary(self, trials: Mapping[tuple[Point, int], FrozenTrial]) -> str:
        survivors = self._survivors(trials)
        trained = sum(
            len(points) * (rung - before) for points, rung, before in zip(survivors, self._rungs, (0, *self._rungs), strict=False)
        )
        whole = len(self._points) * self._rungs[-1]
        if len(survivors) < len(self._rungs):
            return f"every point had failed by epoch {self._rungs[len(survivors) - 1]}"
        saved = f"{trained} of {whole} epochs trained, {100 * (1 - trained / whole):.0f} % saved"
        return f"{saved}; {len(survivors[-1])} of {len(self._points)} points went to the end"


def _standing(trial: FrozenTrial | None) -> int:
    if trial is None:
        return 0
    return 3 if trial.state == TrialState.COMPLETE else 1 + (not trial.state.is_finished())


def _has_failed(trial: FrozenTrial | None) -> bool:
    return trial is not None and trial.state.is_finished() and trial.state != TrialState.COMPLETE

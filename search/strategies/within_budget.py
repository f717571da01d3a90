"""Samplers that construct their points within a budget, where drawing and rejecting would waste most of the draws."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.budget import Point, climb
from search.strategy import ATTEMPT, Problem, stream_of
from space.component import Scalar
from space.search_space import Axis
from space.values import Interval

MAX_ATTEMPTS = 10


def within_budget(sampler: BaseSampler, problem: Problem) -> BaseSampler:
    """`sampler`, made to construct points within the problem's budget; `sampler` itself if there are no bounds."""
    return sampler if problem.budget.is_empty else WithinBudget(sampler, problem)


class WithinBudget(BaseSampler):
    """Proposes whole points: the first of `MAX_ATTEMPTS` draws of `sampler` within the budget, else a climb from the nearest.

    A climb (`search.budget.climb`) that ends outside the budget is tried again from the next nearest draw. If none
    succeeds, the first draw is proposed, and the loop prunes it with its constraint.

    The point is a function of (problem, trial number, told trials), if that of `sampler` is. A trial that a lost driver began gets the
    point it would have had. If the trials told since then lead elsewhere, the rest of the point is constructed around the parameters that
    the trial has. Parameters that are no axis of the space are left to `sampler`.
    """

    def __init__(self, sampler: BaseSampler, problem: Problem):
        self._sampler = sampler
        self._space = problem.space
        self._budget = problem.budget
        self._seed = problem.seed
        self._distributions = {axis.name: distribution_of(axis) for axis in problem.space.axes}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._distributions)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        enqueued = trial.system_attrs.get("fixed_params", {})
        point = self._construct(study, trial, enqueued)
        if not trial.params.items() <= point.items():
            point = self._construct(study, trial, {**enqueued, **trial.params})
        return {name: value for name, value in point.items() if name in search_space}

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._sampler.after_trial(study, trial, state, values)

    def _construct(self, study: Study, trial: FrozenTrial, fixed: Mapping[str, Any]) -> Point:
        draws: list[tuple[float, int, Point]] = []
        for attempt in range(MAX_ATTEMPTS):
            point = self._draw(study, trial, attempt, fixed)
            if draws and point == draws[0][2]:
                # The sampler has one answer for a trial, such as its position in a sequence.
                break
            distance = self._budget.distance(self._space, point)
            if distance == 0:
                return point
            draws.append((distance, attempt, point))
        generator = random.Random(repr(stream_of(self._seed, trial)))
        for _, _, start in sorted(draws, key=lambda draw: draw[:2]):
            point, distance = climb(self._space, start, self._budget, generator, fixed)
            if distance == 0:
                return point
        return draws[0][2]

    def _draw(self, study: Study, trial: FrozenTrial, attempt: int, fixed: Mapping[str, Any]) -> Point:
        """What the sampler would propose for the trial if nothing of it was suggested yet."""
        draft = copy.copy(trial)
        draft.params = {}
        draft.distributions = {}
        draft.user_attrs = {**trial.user_attrs, ATTEMPT: attempt}
        self._sampler.before_trial(study, draft)
        relative = self._sampler.sample_relative(study, draft, self._sampler.infer_relative_search_space(study, draft))
        point: dict[str, Scalar] = {}
        for axis in self._space.axes:
            if not axis.is_active(point):
                continue
            name, distribution = axis.name, self._distributions[axis.name]
            if name in fixed:
                value = fixed[name]
            elif distribution.single():
                value = axis.at(0.0)
            elif name in relative:
                value = relative[name]
            else:
                value = self._sampler.sample_independent(study, draft, name, distribution)
            point[name] = draft.params[name] = value
            draft.distributions[name] = distribution
        return point


def distribution_of(axis: Axis) -> BaseDistribution:
    """The axis as Optuna knows it."""
    if isinstance(axis.choices, range):
        return IntDistribution(axis.choices[0], axis.choices[-1], step=axis.choices.step)
    if isinstance(axis.choices, Interval):
        return FloatDistribution(axis.choices.low, axis.choices.high, log=axis.choices.log)
    return CategoricalDistribution(axis.choices)

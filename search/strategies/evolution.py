"""Evolution as in ViT-ResNAS, https://arxiv.org/abs/2109.00642, and HAT, https://arxiv.org/abs/2005.14187: random points, then generations.

The first `num_random` points are random. Each generation after them has half its points by mutation and half by crossover, of the
`num_parents` best points of the whole history. Mutation draws every gene anew with probability `MUTATION`; a gene of two choices takes
the other, as a skippable block is flipped. Crossover takes every gene from one of two parents. A gene is an axis, and one that does not
exist at a point (`Axis.when`), such as the width of a dropped block, is neither kept nor mutated.

Published sizes are 500 random points and 19 generations of 75 + 75, with 75 parents: 3,350 trials. For fewer trials every size shrinks
by the same share, so that there are 19 generations still; for more there are more generations.

A point outside the budget, or told before, is drawn again. Several objectives rank by non-domination, and within a front by the mean of
the ranks in each. Deviations from the release, so that no search hangs: a point is drawn again at most `MAX_DRAWS` times and as often by
mutation, and one that still is outside the budget is moved into it (`within_budget`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from results.pareto import mean_ranks, pareto_front
from search.budget import Point, random_choice, random_point
from search.strategies.grid import Point as Key
from search.strategies.grid import point_key
from search.strategies.samplers import SeededByTrial
from search.strategies.within_budget import distribution_of, within_budget
from search.strategy import Problem, strategy, stream_of
from space.component import Scalar
from space.values import Interval

NUM_TRIALS, NUM_RANDOM, NUM_PARENTS, NUM_GENERATION = 3350, 500, 75, 150
"""The published sizes."""
MUTATION = 0.3
CROSSOVER = 0.5
MAX_DRAWS = 50


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many points are random, how many have children, and how many children a generation has; half of these are mutations."""

    num_random: int
    num_parents: int
    num_generation: int

    @classmethod
    def of(cls, num_trials: int | None) -> Sizes:
        """The published sizes, each times `num_trials` / 3350 where that is below 1; at least two parents and two children."""
        share = min(1.0, (num_trials or NUM_TRIALS) / NUM_TRIALS)
        return cls(
            num_random=max(2, round(share * NUM_RANDOM)),
            num_parents=max(2, round(share * NUM_PARENTS)),
            num_generation=max(2, 2 * round(share * NUM_GENERATION / 2)),
        )

    def first_of_generation(self, number: int) -> int:
        """The first trial of the generation that trial `number` belongs to; 0 for the random points."""
        if number < self.num_random:
            return 0
        return number - (number - self.num_random) % self.num_generation


@strategy("evolution")
def evolution(problem: Problem) -> BaseSampler:
    """Evolve the best points of all told trials by mutation and crossover, after a random population (ViT-ResNAS)."""
    return within_budget(Evolution(problem), problem)


class Evolution(SeededByTrial):
    """Proposes whole points. The parents of a generation are the best of the trials told complete that began before it.

    A parameter that is no axis of the space is drawn at random.
    """

    def __init__(self, problem: Problem):
        super().__init__(RandomSampler, problem.seed)
        self._problem_seed = problem.seed
        self._space = problem.space
        self._budget = problem.budget
        self._sizes = Sizes.of(problem.num_trials)
        self._distributions = {axis.name: distribution_of(axis) for axis in problem.space.axes}
        self._parents: tuple[tuple[str, int, int], list[Point]] = ("", 0, 0), []
        self._told = _Told("")

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._distributions)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        generator = random.Random(repr(stream_of(self._problem_seed, trial)))
        parents = self._parents_of(study, trial)
        told = self._told_points(study)
        is_crossover = (trial.number - self._sizes.num_random) % 2 == 1
        point: Point = {}
        for draw in range(2 * MAX_DRAWS):
            # Parents that have become alike have few children by crossover.
            point = self._child(parents, is_crossover and draw < MAX_DRAWS, generator)
            if point_key(point) not in told and self._is_within_budget(point):
                break
        return {name: value for name, value in point.items() if name in search_space}

    def _is_within_budget(self, point: Point) -> bool:
        return self._budget.is_empty or self._budget.distance(self._space, point) == 0

    def _child(self, parents: Sequence[Point], is_crossover: bool, generator: random.Random) -> Point:
        if len(parents) < 2:
            return random_point(self._space, generator)
        if is_crossover:
            one, other = generator.sample(parents, 2)
            return self._crossed(one, other, generator)
        return self._mutated(generator.choice(parents), generator)

    def _mutated(self, parent: Point, generator: random.Random) -> Point:
        child: dict[str, Scalar] = {}
        for axis in self._space.axes:
            if not axis.is_active(child):
                continue
            value = parent.get(axis.name)
            if value is None:
                value = random_choice(axis, generator)
            elif generator.random() < MUTATION:
                others = [] if isinstance(axis.choices, Interval) else [choice for choice in axis.choices if choice != value]
                value = others[0] if len(others) == 1 else random_choice(axis, generator)
            child[axis.name] = value
        return child

    def _crossed(self, one: Point, other: Point, generator: random.Random) -> Point:
        child: dict[str, Scalar] = {}
        for axis in self._space.axes:
            if axis.is_active(child):
                first, second = (other, one) if generator.random() < CROSSOVER else (one, other)
                value = first.get(axis.name, second.get(axis.name))
                # Only a point from outside can lack the gene: the one that it depends on came from a parent that has it.
                child[axis.name] = random_choice(axis, generator) if value is None else value
        return child

    def _parents_of(self, study: Study, trial: FrozenTrial) -> list[Point]:
        """The parents of the trial's generation, best first; empty among the random points."""
        first = self._sizes.first_of_generation(trial.number)
        if not first:
            return []
        told = [each for each in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if each.number < first]
        key = study.study_name, first, len(told)
        if self._parents[0] != key:
            self._parents = key, best_points(told, study.directions, self._sizes.num_parents)
        return self._parents[1]

    def _told_points(self, study: Study) -> set[Key]:
        """The points of all finished trials; those that are known from before are not read again."""
        if self._told.study_name != study.study_name:
            self._told = _Told(study.study_name)
        for trial in study.get_trials(deepcopy=False):
            if trial.number not in self._told.numbers and trial.state.is_finished():
                self._told.numbers.add(trial.number)
                self._told.points.add(point_key(trial.params))
        return self._told.points


@dataclass
class _Told:
    study_name: str
    numbers: set[int] = field(default_factory=set)
    points: set[Key] = field(default_factory=set)


def best_points(trials: Sequence[FrozenTrial], directions: Sequence[StudyDirection], number: int) -> list[Point]:
    """The `number` best different points, front by front; within a front by the mean of the ranks, then by the trial's number."""
    signs = np.array([-1.0 if direction == StudyDirection.MAXIMIZE else 1.0 for direction in directions])
    costs = np.array([trial.values for trial in trials], dtype=float).reshape(len(trials), len(signs)) * signs
    mean_rank = mean_ranks(costs)
    left = np.arange(len(trials))
    found: dict[Key, Point] = {}
    while len(left) and len(found) < number:
        # Without a missing value some row is never dominated, so every round takes at least one.
        is_front = pareto_front(costs[left])
        for index in sorted(left[is_front], key=lambda index: (mean_rank[index], trials[index].number)):
            if len(found) < number:
                found.setdefault(point_key(trials[index].params), trials[index].params)
        left = left[~is_front]
    return list(found.values())

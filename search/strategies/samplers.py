"""Optuna's own samplers as strategies, seeded trial by trial.

Optuna seeds a sampler once, so a study that is interrupted and resumed with the same seed would propose its first points
again. Here every trial gets a sampler of its own, seeded by (seed, trial number): a resumed study goes on exactly as if
it had never stopped, and everything else these samplers know is in the told trials anyway.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.strategies.within_budget import within_budget
from search.strategy import ATTEMPT, Problem, strategy, stream_of


@strategy("random")
def random(problem: Problem) -> BaseSampler:
    """Draw every axis uniformly, whatever was told."""
    return within_budget(SeededByTrial(RandomSampler, problem.seed), problem)


@strategy("tpe")
def tpe(problem: Problem) -> BaseSampler:
    """Tree-structured Parzen estimator over groups of axes that occur together, taking trials in flight for bad ones."""
    return within_budget(SeededByTrial(_grouped_tpe, problem.seed), problem)


@strategy("nsga2")
def nsga2(problem: Problem) -> BaseSampler:
    """Genetic search by non-dominated sorting (NSGA-II), whose parents are complete trials only."""
    common = IntersectionSearchSpace()
    return within_budget(SeededByTrial(lambda trial_seed: _Nsga2(trial_seed, common), problem.seed), problem)


def _grouped_tpe(seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


class _Nsga2(NSGAIISampler):
    """NSGA-II that keeps the axes common to all trials in `common`: to find them anew costs 100 ms a trial at 3,000 trials."""

    def __init__(self, seed: int, common: IntersectionSearchSpace):
        super().__init__(seed=seed)
        self._common = common

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: distribution for name, distribution in self._common.calculate(study).items() if not distribution.single()}


class SeededByTrial(BaseSampler):
    """`make(seed)` anew for every trial and every attempt at it, with a seed that follows from `stream_of(seed, trial)`."""

    def __init__(self, make: Callable[[int], BaseSampler], seed: int):
        self._make = make
        self._seed = seed
        self._open: dict[tuple[str, int], dict[int, BaseSampler]] = {}

    def _sampler_of(self, study: Study, trial: FrozenTrial) -> BaseSampler:
        attempts = self._open.setdefault((study.study_name, trial.number), {})
        attempt = trial.user_attrs.get(ATTEMPT, 0)
        if attempt not in attempts:
            attempts[attempt] = self._make(int(np.random.SeedSequence(stream_of(self._seed, trial)).generate_state(1)[0]))
        return attempts[attempt]

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler_of(study, trial).before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler_of(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return self._sampler_of(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return self._sampler_of(study, trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._sampler_of(study, trial).after_trial(study, trial, state, values)
        del self._open[study.study_name, trial.number]

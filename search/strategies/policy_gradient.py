"""REINFORCE over independent categorical choices: As-ViT's topology search, https://arxiv.org/abs/2202.11921, section 3.

The policy is one categorical head per axis and no network. Every told trial is one step of gradient ascent on
log pi(point) * (reward - baseline) by Adam; the baseline is a bias-corrected moving average of the rewards. The reward
is made from the last `BUFFER_SIZE` told trials, each objective in units of its range over them.

Deviations from the released code: an objective without range in the buffer counts nothing, instead of being divided by
1e-6, which is not small beside scores of 1e-4; and with several trials in flight the gradient is taken at the policy of
the moment of telling, not of asking.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Literal
from zlib import crc32

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search.strategies.within_budget import within_budget
from search.strategy import Problem, strategy, stream_of

LEARNING_RATE = 0.08
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8
INITIAL_LOGIT_SCALE = 1e-3
BASELINE_MOMENTUM = 0.9
BUFFER_SIZE = 20

Reward = Literal["difference", "merit"]


@strategy("policy_gradient")
def policy_gradient(problem: Problem) -> BaseSampler:
    """REINFORCE on one categorical per axis, rewarded for being better than the trial told before (As-ViT)."""
    return within_budget(PolicyGradientSampler(problem.seed), problem)


@strategy("policy_gradient_merit")
def policy_gradient_merit(problem: Problem) -> BaseSampler:
    """REINFORCE on one categorical per axis, rewarded for being better than the last trials' mean."""
    return within_budget(PolicyGradientSampler(problem.seed, reward="merit"), problem)


def reward_of_last(values: np.ndarray, signs: np.ndarray, reward: Reward) -> float:
    """The reward of the last row of `values`, (trials, objectives).

    It is the sum over objectives of how much the row is better than the row before ("difference") or than the mean row ("merit"),
    divided by the objective's range. `signs` is 1 where more is better and -1 where less is. An objective without a range adds nothing.
    """
    extent = _finite_range(values)
    has_range = extent > np.finfo(float).eps * np.abs(values).max(axis=0)
    if not has_range.any():
        return 0.0
    values, extent = values[:, has_range], extent[has_range]
    reference = values[-2] if reward == "difference" else values.mean(axis=0)
    return float((signs[has_range] * (values[-1] - reference) / extent).sum())


def _finite_range(values: np.ndarray) -> np.ndarray:
    """Largest minus smallest of each column; 0 where the column holds an infinity, beside which all other values are equal."""
    is_finite = np.isfinite(values).all(axis=0)
    return np.where(is_finite, np.ptp(np.where(is_finite, values, 0.0), axis=0), 0.0)


class PolicyGradientSampler(BaseSampler):
    """Samples every categorical parameter from its head of the policy; other parameters uniformly.

    The policy is a function of (seed, complete trials in the order of their completion). It is replayed from the study
    and never pickled, so a resumed study has the policy of one that was never interrupted, and what a trial is given
    depends on that policy and the trial's number alone.

    `reward` is "difference", the paper's: better than the trial told before; or "merit": better than the mean of the
    buffer, so that the reward of a point does not depend on the point before it.
    """

    def __init__(self, seed: int, *, reward: Reward = "difference"):
        self._seed = seed
        self._reward: Reward = reward
        self._policy = _Policy(seed, reward, [])
        self._study_name = ""
        self._told: set[int] = set()
        self._last_told: tuple[Any, int] | None = None
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_sampler, (self._seed, self._reward)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._replay(study)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        generator = np.random.default_rng([*stream_of(self._seed, trial), crc32(param_name.encode())])
        if not isinstance(param_distribution, CategoricalDistribution):
            fallback = RandomSampler(seed=int(generator.integers(2**32)))
            return fallback.sample_independent(study, trial, param_name, param_distribution)
        with self._lock:
            probabilities = self._policy.head(param_name, param_distribution).probabilities()
        # Not generator.choice, whose set-up costs ten times this.
        index = int(np.searchsorted(probabilities.cumsum(), generator.random(), side="right"))
        return param_distribution.choices[min(index, len(probabilities) - 1)]

    def mode(self, study: Study) -> dict[str, Any]:
        """The most probable choice of every head that a told trial has used: what the paper's search returns."""
        heads = self._replay(study).heads
        return {name: head.choices[int(head.logits.argmax())] for name, head in heads.items() if head.num_steps}

    def logits(self, study: Study) -> dict[str, np.ndarray]:
        """The logits of every head that a told trial has used, in the order of its choices."""
        return {name: head.logits.copy() for name, head in self._replay(study).heads.items() if head.num_steps}

    def _replay(self, study: Study) -> _Policy:
        """The policy after every complete trial of `study`; one step for each that was told since the last call."""
        with self._lock:
            told = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            news = [trial for trial in told if trial.number not in self._told]
            news.sort(key=_order)
            is_same_study = study.study_name == self._study_name and len(told) == len(self._told) + len(news)
            is_later = not news or self._last_told is None or _order(news[0]) > self._last_told
            if not (is_same_study and is_later):
                # A clock that went back or a trial added from outside: the order decides, not when we saw it.
                self._policy = _Policy(self._seed, self._reward, study.directions)
                self._study_name = study.study_name
                self._told = set()
                self._last_told = None
                news = sorted(told, key=_order)
            for trial in news:
                self._policy.learn(trial)
                self._told.add(trial.number)
                self._last_told = _order(trial)
            return self._policy


def _make_sampler(seed: int, reward: Reward) -> PolicyGradientSampler:
    return PolicyGradientSampler(seed, reward=reward)


def _order(trial: FrozenTrial) -> tuple[Any, int]:
    return trial.datetime_complete, trial.number


class _Policy:
    """The heads and what the rewards need: the last values and the baseline."""

    def __init__(self, seed: int, reward: Reward, directions: list[StudyDirection]):
        self.heads: dict[str, _Head] = {}
        self._seed = seed
        self._reward: Reward = reward
        self._signs = np.array([-1.0 if direction == StudyDirection.MINIMIZE else 1.0 for direction in directions])
        self._buffer: deque[list[float]] = deque(maxlen=BUFFER_SIZE)
        self._baseline = 0.0
        self._baseline_weight = 0.0

    def head(self, name: str, distribution: CategoricalDistribution) -> _Head:
        """The head of a parameter; its first logits depend on its name and not on when it was first met."""
        if name not in self.heads:
            generator = np.random.default_rng([self._seed, crc32(name.encode())])
            self.heads[name] = _Head(distribution.choices, generator)
        return self.heads[name]

    def learn(self, trial: FrozenTrial) -> None:
        """One step of REINFORCE: raise the probability of the trial's choices if its reward exceeds the baseline."""
        self._buffer.append(trial.values)
        advantage = self._advantage(reward_of_last(np.array(self._buffer), self._signs, self._reward))
        for name, distribution in trial.distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                index = int(distribution.to_internal_repr(trial.params[name]))
                self.head(name, distribution).reinforce(index, advantage)

    def _advantage(self, reward: float) -> float:
        self._baseline = BASELINE_MOMENTUM * self._baseline + (1 - BASELINE_MOMENTUM) * reward
        self._baseline_weight = BASELINE_MOMENTUM * self._baseline_weight + (1 - BASELINE_MOMENTUM)
        return reward - self._baseline / self._baseline_weight


class _Head:
    """One categorical: its choices, its logits and Adam's moments of them."""

    def __init__(self, choices: tuple[Any, ...], generator: np.random.Generator):
        self.choices = choices
        self.logits = INITIAL_LOGIT_SCALE * generator.standard_normal(len(choices))
        self.num_steps = 0
        self._mean = np.zeros(len(choices))
        self._square = np.zeros(len(choices))

    def probabilities(self) -> np.ndarray:
        unnormalised = np.exp(self.logits - self.logits.max())
        return unnormalised / unnormalised.sum()

    def reinforce(self, index: int, advantage: float) -> None:
        """One Adam step down the gradient of -log pi(index) * advantage."""
        gradient = advantage * self.probabilities()
        gradient[index] -= advantage
        self.num_steps += 1
        beta1, beta2 = ADAM_BETAS
        self._mean = beta1 * self._mean + (1 - beta1) * gradient
        self._square = beta2 * self._square + (1 - beta2) * gradient**2
        mean = self._mean / (1 - beta1**self.num_steps)
        square = self._square / (1 - beta2**self.num_steps)
        self.logits -= LEARNING_RATE * mean / (np.sqrt(square) + ADAM_EPSILON)

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState

from search.strategies.policy_gradient import PolicyGradientSampler, Reward, reward_of_last
from space.families.as_vit import topology_space

optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = topology_space(img_size=224, proxy_img_size=224, num_classes=1000)
REWARDS: tuple[Reward, ...] = ("difference", "merit")
Objective = Callable[[Mapping[str, Any]], tuple[float, ...]]


def merging_gain(params: Mapping[str, Any]) -> float:
    """To what As-ViT's length distortion is proportional at a fixed width."""
    return params["K2"] * params["K3"] * params["K4"]


def two_scores(params: Mapping[str, Any]) -> tuple[float, float]:
    return 1e-4 * merging_gain(params), 10.0 + params["E1"] - params["K1"] ** 0.5


def new_study(sampler: optuna.samplers.BaseSampler, *directions: str) -> optuna.Study:
    return optuna.create_study(directions=directions, sampler=sampler)


def run(study: optuna.Study, objective: Objective, num_trials: int) -> optuna.Study:
    for _ in range(num_trials):
        trial = study.ask()
        study.tell(trial, objective(SPACE.suggest(trial)))
    return study


def assert_same_policy(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("seed", range(4))
def test_the_policy_finds_the_largest_merging_kernels_in_the_papers_500_steps(seed: int, reward: Reward):
    study = run(new_study(PolicyGradientSampler(seed, reward=reward), "maximize"), lambda params: (merging_gain(params),), 500)
    mode = PolicyGradientSampler(seed, reward=reward).mode(study)
    assert mode.keys() == {axis.name for axis in SPACE.axes}
    assert (mode["K2"], mode["K3"], mode["K4"]) == (4, 4, 4)
    mean_of_uniform = 3.0**3
    assert np.mean([trial.value for trial in study.trials[-100:]]) > 1.5 * mean_of_uniform


def test_steps_equal_those_of_torch():
    study = run(new_study(PolicyGradientSampler(0), "maximize", "minimize"), two_scores, 40)
    heads = {axis.name: axis.choices for axis in SPACE.axes}
    start = new_study(PolicyGradientSampler(0), "maximize", "minimize")
    start.add_trial(study.trials[0])
    # The first reward is 0, so after one trial the logits are still the initial ones.
    logits = {name: torch.tensor(values, requires_grad=True) for name, values in PolicyGradientSampler(0).logits(start).items()}
    optimizer = torch.optim.Adam(logits.values(), lr=0.08)
    numerator = denominator = 0.0
    for step, trial in enumerate(study.trials):
        buffer = np.array([told.values for told in study.trials[max(0, step - 19) : step + 1]])
        extent = buffer.max(axis=0) - buffer.min(axis=0)
        gain = np.array(trial.values) - np.array(study.trials[max(0, step - 1)].values)
        reward = float(np.sum([1, -1] * np.divide(gain, extent, out=np.zeros(2), where=extent > 0)))
        numerator, denominator = 0.9 * numerator + 0.1 * reward, 0.9 * denominator + 0.1
        log_prob = sum(
            torch.distributions.Categorical(logits=logits[name]).log_prob(torch.tensor(heads[name].index(value)))
            for name, value in trial.params.items()
        )
        optimizer.zero_grad()
        (-log_prob * (reward - numerator / denominator)).backward()
        optimizer.step()
    for name, values in PolicyGradientSampler(0).logits(study).items():
        np.testing.assert_allclose(values, logits[name].detach().numpy(), rtol=1e-9)


@pytest.mark.parametrize("reward", REWARDS)
def test_a_policy_replayed_from_scratch_is_the_one_that_learnt_trial_by_trial(reward: Reward):
    sampler = PolicyGradientSampler(3, reward=reward)
    study = new_study(sampler, "maximize", "minimize")
    for batch in range(20):
        asked = [study.ask() for _ in range(4)]
        points = [SPACE.suggest(trial) for trial in asked]
        study.tell(asked[1], state=TrialState.FAIL if batch % 2 else TrialState.PRUNED)
        for index in (3, 0, 2):
            study.tell(asked[index], two_scores(points[index]))
    assert_same_policy(sampler.logits(study), PolicyGradientSampler(3, reward=reward).logits(study))


def test_a_trial_that_turns_up_late_with_an_earlier_time_takes_its_place_in_the_order():
    sampler = PolicyGradientSampler(0)
    study = run(new_study(sampler, "maximize", "minimize"), two_scores, 10)
    early = study.trials[4]
    assert early.datetime_complete is not None
    early.datetime_complete -= timedelta(seconds=60)
    study.add_trial(early)
    run(study, two_scores, 5)
    assert_same_policy(sampler.logits(study), PolicyGradientSampler(0).logits(study))


def test_a_pickled_sampler_carries_no_policy_and_replays_the_same():
    sampler = PolicyGradientSampler(1, reward="merit")
    untouched = len(pickle.dumps(sampler))
    study = run(new_study(sampler, "maximize", "minimize"), two_scores, 30)
    pickled = pickle.dumps(sampler)
    assert len(pickled) == untouched
    assert_same_policy(pickle.loads(pickled).logits(study), sampler.logits(study))


def test_a_sampler_used_on_another_study_starts_anew():
    sampler = PolicyGradientSampler(0)
    run(new_study(sampler, "maximize", "minimize"), two_scores, 20)
    other = run(new_study(sampler, "maximize", "minimize"), two_scores, 5)
    assert_same_policy(sampler.logits(other), PolicyGradientSampler(0).logits(other))


def test_trials_that_are_not_complete_teach_nothing():
    study = new_study(PolicyGradientSampler(0), "maximize")
    for state in (TrialState.FAIL, TrialState.PRUNED):
        trial = study.ask()
        SPACE.suggest(trial)
        study.tell(trial, state=state)
    assert PolicyGradientSampler(0).mode(study) == {}


def policy_after(objective: Objective, *directions: str, reward: Reward) -> Mapping[str, np.ndarray]:
    """The logits after 60 fixed points scored by `objective`."""
    sampled = run(new_study(optuna.samplers.RandomSampler(seed=0), "maximize"), lambda _: (0.0,), 60)
    study = new_study(PolicyGradientSampler(0), *directions)
    for trial in sampled.trials:
        study.enqueue_trial(trial.params)
    return PolicyGradientSampler(0, reward=reward).logits(run(study, objective, 60))


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize(
    ("objective", "directions"),
    [
        (lambda params: (-merging_gain(params),), ["minimize"]),
        (lambda params: (2.0**-40 * merging_gain(params),), ["maximize"]),
        (lambda params: (merging_gain(params), 7.5), ["maximize", "minimize"]),
        (lambda params: (merging_gain(params), float("inf")), ["maximize", "minimize"]),
    ],
    ids=["negated and minimised", "in tiny units", "beside a constant", "beside an infinite one"],
)
def test_the_same_order_of_points_teaches_the_same_policy(objective: Objective, directions: list[str], reward: Reward):
    plain = policy_after(lambda params: (merging_gain(params),), "maximize", reward=reward)
    assert_same_policy(policy_after(objective, *directions, reward=reward), plain)


def test_rewards_of_two_objectives_add_up_in_units_of_their_ranges():
    values = np.array([[1.0, 10.0], [3.0, 40.0], [2.0, 20.0]])
    signs = np.array([1.0, -1.0])
    assert reward_of_last(values, signs, "difference") == pytest.approx(-1 / 2 + 20 / 30)
    assert reward_of_last(values, signs, "merit") == pytest.approx(0 / 2 + (70 / 3 - 20) / 30)


def test_repeating_the_best_point_earns_its_merit_but_no_difference():
    values = np.array([[1.0], [3.0], [3.0]])
    assert reward_of_last(values, np.ones(1), "difference") == 0
    assert reward_of_last(values, np.ones(1), "merit") > 0


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("values", [[[5.0]], [[0.3], [0.1 + 0.2]], [[np.inf], [1.0]], [[0.0], [0.0]]])
def test_without_a_range_there_is_no_reward(values: list[list[float]], reward: Reward):
    assert reward_of_last(np.array(values), np.ones(1), reward) == 0

"""The contract of every registered strategy: Optuna's own, and that a resumed study goes on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase
from optuna.trial import TrialState

from results.records import Metric
from search.strategy import Problem, strategies
from space.search_space import Axis, SearchSpace

optuna.logging.set_verbosity(optuna.logging.WARNING)

GOALS = (Metric("gain", "maximize"), Metric("price", "minimize"))


def no_candidate(params: Mapping[str, Any]) -> Any:
    raise AssertionError("a strategy does not build candidates")


SPACE = SearchSpace(
    name="test",
    axes=(
        Axis(name="mixer", choices=("attention", "pool")),
        Axis(name="num_heads", choices=(2, 4, 8), when=("mixer", "attention")),
        Axis(name="window", choices=(3, 5), when=("mixer", "pool")),
        Axis(name="depth", choices=range(2, 9)),
        Axis(name="bias", choices=(True, False)),
        *(Axis(name=f"E{stage}", choices=(2, 3, 4, 5)) for stage in range(4)),
    ),
    decode=no_candidate,
)


def scores(params: Mapping[str, Any]) -> tuple[float, float]:
    gain = params["depth"] + params.get("num_heads", 0) + sum(params[f"E{stage}"] for stage in range(4))
    return gain, params["depth"] * params["E0"] + params.get("window", 1)


def make(name: str, seed: int) -> BaseSampler:
    return strategies.get(name)(Problem(space=SPACE, goals=GOALS, seed=seed))


def new_study(sampler: BaseSampler) -> optuna.Study:
    return optuna.create_study(directions=[goal.goal for goal in GOALS], sampler=sampler)


def run(study: optuna.Study, num_trials: int) -> optuna.Study:
    for _ in range(num_trials):
        trial = study.ask()
        study.tell(trial, scores(SPACE.suggest(trial)))
    return study


def points(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials]


every_strategy = pytest.mark.parametrize("name", strategies.names())


@pytest.mark.parametrize("strategy_name", strategies.names())
class TestOptunaContract(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self, strategy_name: str) -> Callable[[], BaseSampler]:
        return lambda: make(strategy_name, 0)


@every_strategy
def test_every_strategy_says_in_one_sentence_what_it_does(name: str):
    summary = strategies.summary(name)
    assert summary.endswith(".")
    assert summary == summary.strip()


@every_strategy
def test_equal_seeds_sample_equal_points_and_others_do_not(name: str):
    first = points(run(new_study(make(name, 7)), 20))
    assert points(run(new_study(make(name, 7)), 20)) == first
    assert points(run(new_study(make(name, 8)), 20)) != first


@every_strategy
@pytest.mark.parametrize("num_before", [5, 60])
def test_a_resumed_study_goes_on_as_one_that_never_stopped(name: str, num_before: int):
    # 60 is past NSGA-II's first generation of 50 and the ten random trials TPE starts with.
    whole = run(new_study(make(name, 0)), num_before + 10)
    resumed = run(new_study(make(name, 0)), num_before)
    resumed.sampler = make(name, 0)
    assert points(run(resumed, 10)) == points(whole)


@every_strategy
def test_trials_in_flight_end_in_any_order_and_state_and_stay_in_a_conditional_space(name: str):
    study = new_study(make(name, 0))
    for _ in range(20):
        asked = [study.ask() for _ in range(4)]
        drawn = [SPACE.suggest(trial) for trial in asked]
        study.tell(asked[2], state=TrialState.FAIL)
        study.tell(asked[3], scores(drawn[3]))
        study.tell(asked[1], state=TrialState.PRUNED)
        study.tell(asked[0], scores(drawn[0]))
        for point in drawn:
            SPACE.check(point)
    assert {point["mixer"] for point in points(study)} == {"attention", "pool"}


@every_strategy
def test_a_trial_adopted_half_suggested_is_completed_as_it_would_have_been(name: str):
    study = run(new_study(make(name, 0)), 15)
    lost = study.ask()
    begun = {axis.name: axis.suggest(lost) for axis in SPACE.axes[:1]}
    study.sampler = make(name, 0)
    adopted = optuna.Trial(study, lost._trial_id)
    point = SPACE.suggest(adopted)
    SPACE.check(point)
    assert begun.items() <= point.items()


@every_strategy
def test_an_enqueued_point_is_asked_for_as_it_is(name: str):
    study = run(new_study(make(name, 0)), 12)
    point = {"mixer": "pool", "window": 5, "depth": 8, "bias": False, "E0": 2, "E1": 3, "E2": 4, "E3": 5}
    study.enqueue_trial(point)
    assert SPACE.suggest(study.ask()) == point

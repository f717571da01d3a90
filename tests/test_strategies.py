"""The contract of every registered strategy, with and without a budget: Optuna's own, and that a resumed study goes on as if it
had never stopped."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import REPOSITORY
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.testing.pytest_samplers import BasicSamplerTestCase, MultiObjectiveSamplerTestCase
from optuna.trial import TrialState

from results.records import Metric
from search.budget import Budget
from search.storage import trial_id_of
from search.strategy import Problem, strategies
from space.search_space import Axis, Candidate, SearchSpace
from space.spec import ArchSpec, BlockSpec, Component, StageSpec, digest_of

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


def small_network(params: Mapping[str, Any]) -> Candidate:
    """A network whose number of parameters depends on several axes."""
    width = 8 * params["E0"]
    block = BlockSpec(
        mixer=Component("attention", num_heads=2, head_dim=width // 2), feed_forward=Component("mlp", hidden_dim=width * params["E1"])
    )
    stages = (StageSpec(embed_dim=width, blocks=(block,) * params["depth"]),)
    patch_embed = Component("conv", kernel=8 * params["E2"], stride=16)
    return Candidate(model=ArchSpec(stages=stages, img_size=64, num_classes=10, patch_embed=patch_embed, pooling=Component("mean")))


WITHIN = " within a budget"
BUDGET = Budget(at_most={"params_m": 0.09}, at_least={"params_m": 0.06})
"""About 20 % of the points are within it."""
NUM_TRIALS = 70
"""Trials that a strategy is told to plan for; past NSGA-II's first generation of 50."""


def make(name: str, seed: int) -> BaseSampler:
    if name.endswith(WITHIN):
        space = dataclasses.replace(SPACE, decode=small_network)
        problem = Problem(space=space, goals=GOALS, budget=BUDGET, seed=seed, num_trials=NUM_TRIALS)
        return strategies.get(name.removesuffix(WITHIN))(problem)
    return strategies.get(name)(Problem(space=SPACE, goals=GOALS, seed=seed, num_trials=NUM_TRIALS))


def new_study(sampler: BaseSampler, storage: BaseStorage | None = None) -> optuna.Study:
    return optuna.create_study(storage=storage, directions=[goal.goal for goal in GOALS], sampler=sampler)


def run(study: optuna.Study, num_trials: int) -> optuna.Study:
    for _ in range(num_trials):
        trial = study.ask()
        study.tell(trial, scores(SPACE.suggest(trial)))
    return study


def points(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials]


NAMES = [name + suffix for name in strategies.names() for suffix in ("", WITHIN)]
every_strategy = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("strategy_name", NAMES)
class TestOptunaContract(BasicSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self, strategy_name: str) -> Callable[[], BaseSampler]:
        return lambda: make(strategy_name, 0)


@every_strategy
def test_every_strategy_says_in_one_sentence_what_it_does(name: str):
    summary = strategies.summary(name.removesuffix(WITHIN))
    assert summary.endswith(".")
    assert summary == summary.strip()


@every_strategy
def test_equal_seeds_sample_equal_points_and_others_do_not(name: str):
    first = points(run(new_study(make(name, 7)), 20))
    assert points(run(new_study(make(name, 7)), 20)) == first
    assert points(run(new_study(make(name, 8)), 20)) != first


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("random", "cbe72734640498c9"),
        ("tpe", "5ce31b902f5f54dd"),
        ("nsga2", "b955694dd114c672"),
        ("policy_gradient", "06bf5cd4d8e32f83"),
        ("policy_gradient_merit", "5ae150fb2e54b6ea"),
    ],
)
def test_points_without_a_budget_stay_what_they_were(name: str, digest: str):
    # Digests of points proposed by the code before budgets were told to strategies; 70 is past NSGA-II's first generation.
    assert digest_of(points(run(new_study(make(name, 3)), 70 if name == "nsga2" else 20))) == digest


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
    storage = optuna.storages.InMemoryStorage()
    study = run(new_study(make(name, 0), storage), 15)
    lost = study.ask()
    begun = {axis.name: axis.suggest(lost) for axis in SPACE.axes[:1]}
    study.sampler = make(name, 0)
    adopted = optuna.Trial(study, trial_id_of(study, storage, lost.number))
    point = SPACE.suggest(adopted)
    SPACE.check(point)
    assert begun.items() <= point.items()


@every_strategy
def test_an_enqueued_point_is_asked_for_as_it_is(name: str):
    study = run(new_study(make(name, 0)), 12)
    point = {"mixer": "pool", "window": 5, "depth": 8, "bias": False, "E0": 2, "E1": 3, "E2": 4, "E3": 5}
    study.enqueue_trial(point)
    assert SPACE.suggest(study.ask()) == point


@every_strategy
def test_within_a_budget_every_point_is(name: str):
    if name.endswith(WITHIN):
        assert all(BUDGET.holds(small_network(point)) for point in points(run(new_study(make(name, 0)), 60)))


ASK = """
import sys, optuna
from search.storage import open_storage
from search.strategy import Problem, strategies
from test_strategies import GOALS, SPACE, run
sampler = strategies.get("sobol")(Problem(space=SPACE, goals=GOALS, seed=0))
storage = open_storage("sobol.journal")
directions = [goal.goal for goal in GOALS]
run(optuna.create_study(study_name="s", storage=storage, directions=directions, sampler=sampler, load_if_exists=True), int(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_example_of_a_strategy_passes_the_contract_and_goes_on_in_a_new_process(tmp_path: Path):
    from search.storage import open_storage

    for package in ("space", "results", "workers", "search", "tests"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    block = re.search(r"```python\n# (search/strategies/sobol\.py)\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert block is not None
    (tmp_path / block[1]).write_text(block[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(tmp_path / "tests")])}

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    chosen = "sobol and not example"
    assert re.search(r"^\.+ ", call("-m", "pytest", "tests/test_strategies.py", "-k", chosen, "-p", "no:cacheprovider").stdout)
    call("-c", ASK, "8")
    call("-c", ASK, "8")
    resumed = points(optuna.load_study(study_name="s", storage=open_storage(tmp_path / "sobol.journal")))
    assert len({tuple(point.items()) for point in resumed}) == 16
    # What a Sobol sequence promises of any 16 points that begin it: each quarter of a dimension has four.
    for axis in ("E0", "E1", "E2", "E3"):
        assert sorted(point[axis] for point in resumed) == sorted([2, 3, 4, 5] * 4)

"""Budgets: what they refuse, what they say of a network, and how points are constructed within them."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faulty
import optuna
import pytest
from optuna.samplers import BaseSampler

from results.records import Metric
from search.budget import UNLIMITED, Budget, climb, free_metrics, random_point
from search.storage import trial_id_of
from search.strategies.growth import Growth
from search.strategy import Problem, strategies
from search.studies.smoke import tiny_vit_space
from search.study import RunSettings, SettingsError, studies
from space.families.as_vit import TOPOLOGY_AXES, growth_space, topology_space
from space.families.autoformer import autoformer_space
from space.registry import SpecError
from space.search_space import Axis, Candidate, SearchSpace
from workers.evaluators import costs

optuna.logging.set_verbosity(optuna.logging.WARNING)

GOALS = (Metric("gain", "maximize"), Metric("price", "minimize"))
TINY = tiny_vit_space(img_size=32)
AUTOFORMER = autoformer_space(num_classes=100)
TOPOLOGIES = topology_space(img_size=224, proxy_img_size=128, num_classes=1000)


def gmacs(space: SearchSpace, point: Mapping[str, Any]) -> float:
    return Budget(at_most={"gmacs": 1.0}).values(space.decode(point))["gmacs"]


def window(space: SearchSpace) -> Budget:
    """The 2.5 % of MACs below the median network's."""
    generator = random.Random(0)
    median = sorted(gmacs(space, random_point(space, generator)) for _ in range(401))[200]
    return Budget(at_most={"gmacs": median}, at_least={"gmacs": 0.975 * median})


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"at_most": {"gmac": 1}}, r"unknown metric 'gmac' in --max gmac=1; did you mean 'gmacs'\? known: .*depth, gmacs"),
        ({"at_least": {"val_nll": 2}}, r"--min val_nll=2: val_nll is known only after measuring \(evaluator .*train\); .*params_m"),
        ({"at_most": {"depth": math.nan}}, "--max depth=nan: a finite number"),
        ({"at_most": {"gmacs": 1}, "at_least": {"gmacs": 1.5}}, "--max gmacs=1 is below --min gmacs=1.5"),
    ],
)
def test_bounds_that_cannot_be_are_refused(bounds: dict, words: str):
    with pytest.raises(SpecError, match=words):
        Budget(**bounds)


def test_what_is_free_is_what_free_evaluators_measure():
    assert set(free_metrics()) >= {"params_m", "gmacs", "depth", "closed_form"}
    assert not set(free_metrics()) & {"latency_ms", "val_top1_pct", "length_distortion"}


def test_constraints_have_the_names_that_are_stored_and_say_how_far_beyond_a_bound_a_network_is():
    candidate = TINY.decode({**next(TINY.points()), "depth": 3})
    budget = Budget(at_most={"params_m": 1.0, "depth": 2}, at_least={"depth": 2, "gmacs": 0.0})
    counted = costs.counts(candidate.model)
    assert budget.excess(candidate) == {
        "max_params_m": counted.params / 1e6 - 1.0,
        "max_depth": 1,
        "min_gmacs": 0.0 - counted.macs / 1e9,
        "min_depth": -1,
    }
    assert not budget.holds(candidate)
    assert UNLIMITED.excess(candidate) == {}
    assert budget.upper() == Budget(at_most={"params_m": 1.0, "depth": 2})


def test_a_metric_of_the_proxy_is_that_of_the_proxy():
    candidate = TOPOLOGIES.decode(next(TOPOLOGIES.points()))
    assert candidate.proxy is not None
    of_proxy = costs.length_distortion_closed_form(candidate.proxy, num_angles=1)
    assert of_proxy != costs.length_distortion_closed_form(candidate.model, num_angles=1)
    assert Budget(at_most={"closed_form": 1.0}).values(candidate) == {"closed_form": of_proxy}


def test_a_network_is_counted_once_however_many_bounds_there_are(monkeypatch: pytest.MonkeyPatch):
    counted = []
    count = costs.counts
    monkeypatch.setattr(costs, "counts", lambda model: counted.append(model) or count(model))
    budget = Budget(at_most={"params_m": 1.0, "gmacs": 1.0, "depth": 9}, at_least={"gmacs": 0.0})
    budget.excess(TINY.decode(next(TINY.points())))
    assert len(counted) == 1


def test_the_nearest_network_of_a_small_space_is_exact():
    budget = Budget(at_most={"gmacs": 0.0005}, at_least={"params_m": 0.08})
    nearest = min(TINY.points(), key=lambda point: budget.distance(TINY, point))
    assert budget.distance(TINY, nearest) > 0
    words = f"--max gmacs=0.0005 --min params_m=0.08; the nearest of its 720 has gmacs .*{re.escape(f'({TINY.decode(nearest).label})')}"
    with pytest.raises(SpecError, match=words):
        budget.check_reachable(TINY)


@pytest.mark.parametrize("space", [AUTOFORMER, TOPOLOGIES], ids=lambda space: space.name)
def test_the_smallest_network_of_a_large_space_is_named_and_a_budget_for_it_is_reachable(space: SearchSpace):
    with pytest.raises(SpecError, match="the nearest found, climbing from 16 starts, has gmacs") as error:
        Budget(at_most={"gmacs": 1e-6}).check_reachable(space)
    named = re.search(r"has gmacs ([\d.]+) ", str(error.value))
    assert named is not None
    generator = random.Random(1)
    assert float(named[1]) <= min(gmacs(space, random_point(space, generator)) for _ in range(2000))
    Budget(at_most={"gmacs": 1.001 * float(named[1])}).check_reachable(space)
    window(space).check_reachable(space)


def test_a_lower_bound_above_the_largest_network_names_it():
    largest = max(TINY.points(), key=lambda point: gmacs(TINY, point))
    with pytest.raises(SpecError, match=f"has gmacs {gmacs(TINY, largest):.4g} "):
        Budget(at_least={"gmacs": 1.0}).check_reachable(TINY)
    with pytest.raises(SpecError, match=r"climbing from 16 starts, has depth 14 \(\d+x14 "):
        Budget(at_least={"depth": 15}).check_reachable(AUTOFORMER)


def test_a_metric_without_meaning_in_a_space_is_named():
    with pytest.raises(SpecError, match="--max closed_form=1 has no meaning in space 'smoke/tiny_vit': the closed form holds for As-ViT"):
        Budget(at_most={"closed_form": 1.0}).check_reachable(TINY)


def test_points_without_a_network_are_no_way_to_a_budget():
    def decode(params: Mapping[str, Any]) -> Candidate:
        if params["num_classes"] % 2:
            raise SpecError("odd")
        return faulty.SPACE.decode(params)

    space = dataclasses.replace(faulty.SPACE, decode=decode)
    budget = Budget(at_most={"params_m": 0.2})
    assert budget.distance(space, {"num_classes": 1}) == math.inf
    budget.check_reachable(space)
    point, distance = climb(space, {"num_classes": 99_999}, budget, random.Random(0))
    assert (distance, point["num_classes"] % 2) == (0, 0)


def test_a_long_axis_is_climbed_by_strides_and_axes_that_are_fixed_stay():
    budget = Budget(at_most={"params_m": 0.50001}, at_least={"params_m": 0.5})
    _, distance = climb(faulty.SPACE, {"num_classes": 3}, budget, random.Random(0))
    assert distance == 0
    assert climb(faulty.SPACE, {"num_classes": 3}, budget, random.Random(0), {"num_classes"})[0] == {"num_classes": 3}


def make(name: str, space: SearchSpace, budget: Budget, seed: int = 0) -> BaseSampler:
    return strategies.get(name)(Problem(space=space, goals=GOALS, budget=budget, seed=seed))


def proposals(sampler: BaseSampler, space: SearchSpace, num_trials: int) -> list[dict[str, Any]]:
    """Points scored by random numbers that depend on the point alone."""
    study = optuna.create_study(directions=[goal.goal for goal in GOALS], sampler=sampler)
    for _ in range(num_trials):
        trial = study.ask()
        scores = random.Random(repr(space.suggest(trial)))
        study.tell(trial, (scores.random(), scores.random()))
    return [trial.params for trial in study.trials]


every_strategy = pytest.mark.parametrize("name", strategies.names())


@every_strategy
@pytest.mark.parametrize("space", [AUTOFORMER, TOPOLOGIES], ids=lambda space: space.name)
def test_points_are_constructed_within_a_window_that_few_draws_hit(name: str, space: SearchSpace):
    budget = window(space)
    drawn = proposals(make(name, space, UNLIMITED), space, 100)
    constructed = proposals(make(name, space, budget), space, 100)
    assert sum(budget.distance(space, point) == 0 for point in drawn) < 25
    assert sum(budget.distance(space, point) == 0 for point in constructed) >= 99
    assert len({space.decode(point).model.digest for point in constructed}) > 60
    for point in constructed:
        space.check(point)


@every_strategy
def test_where_the_budget_holds_anyway_points_are_those_without_one(name: str):
    wide = Budget(at_most={"gmacs": 1e3}, at_least={"params_m": 0.0})
    assert proposals(make(name, TOPOLOGIES, wide), TOPOLOGIES, 60) == proposals(make(name, TOPOLOGIES, UNLIMITED), TOPOLOGIES, 60)


@every_strategy
@pytest.mark.parametrize("num_begun", [1, 7])
def test_a_trial_begun_by_a_lost_driver_is_completed_to_the_point_it_would_have_had(name: str, num_begun: int):
    budget = window(TOPOLOGIES)
    whole = proposals(make(name, TOPOLOGIES, budget), TOPOLOGIES, 16)
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, directions=[goal.goal for goal in GOALS], sampler=make(name, TOPOLOGIES, budget))
    for point in whole[:15]:
        trial = study.ask()
        assert TOPOLOGIES.suggest(trial) == point
        scores = random.Random(repr(point))
        study.tell(trial, (scores.random(), scores.random()))
    lost = study.ask()
    for axis in TOPOLOGIES.axes[:num_begun]:
        axis.suggest(lost)
    study.sampler = make(name, TOPOLOGIES, budget)
    assert TOPOLOGIES.suggest(optuna.Trial(study, trial_id_of(study, storage, lost.number))) == whole[15]


@every_strategy
def test_what_was_begun_otherwise_is_kept_and_the_rest_constructed_around_it(name: str):
    budget = window(TOPOLOGIES)
    point = proposals(make(name, TOPOLOGIES, budget), TOPOLOGIES, 1)[0]
    other = next(kernel for kernel in TOPOLOGIES.axes[0].choices if kernel != point["K1"])
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, directions=[goal.goal for goal in GOALS], sampler=make(name, TOPOLOGIES, budget))
    # As another strategy began it.
    study.enqueue_trial({"K1": other})
    begun = study.ask()
    assert TOPOLOGIES.axes[0].suggest(begun) == other
    completed = TOPOLOGIES.suggest(optuna.Trial(study, trial_id_of(study, storage, begun.number)))
    assert completed["K1"] == other
    assert budget.distance(TOPOLOGIES, completed) == 0


def test_where_no_point_can_be_constructed_the_first_draw_is_proposed():
    impossible = Budget(at_most={"gmacs": 1e-6})
    assert proposals(make("random", TINY, impossible), TINY, 10) == proposals(make("random", TINY, UNLIMITED), TINY, 10)


def as_vit(budget: Budget) -> Any:
    return studies.get("as_vit")(RunSettings(study="as_vit", runs=Path("runs"), img_size=64, budget=budget))


def test_as_vit_holds_all_networks_to_upper_bounds_and_its_family_to_all():
    budget = Budget(at_most={"gmacs": 0.3, "params_m": 4.0}, at_least={"params_m": 3.0})
    study = as_vit(budget)
    assert study.phase("topology").budget == budget.upper()
    assert study.phase("growth").budget == budget.upper()
    assert study.notes[0].startswith("--min params_m=3 is for the family")
    assert as_vit(UNLIMITED).phase("growth").budget == Budget(at_most={"params_m": 30.0})
    assert as_vit(UNLIMITED).notes == ()
    with pytest.raises(SettingsError, match="--min params_m=150: growth ends at 30 unless told otherwise"):
        as_vit(Budget(at_least={"params_m": 150}))
    with pytest.raises(
        SpecError, match=r"no network of space 'as_vit/growth' is within --max params_m=3 --max gmacs=0\.01 --min params_m=2\.9"
    ):
        as_vit(Budget(at_most={"params_m": 3, "gmacs": 0.01}, at_least={"params_m": 2.9}))


def grow(reported: Budget) -> tuple[list[float], str]:
    """Sizes of the family, in millions of parameters, and why it ended; scores are those of the width."""
    space = growth_space(img_size=64, proxy_img_size=64, num_classes=10)
    topology = {axis: value for axis, value in next(space.points()).items() if axis in TOPOLOGY_AXES}
    study = optuna.create_study(directions=["maximize"])
    goals = (Metric("width", "maximize"),)
    growth = Growth(space=space, topology=topology, max_params=3_000_000, objectives=goals, reported=reported)
    while batch := growth.next_batch(study):
        for point in batch:
            study.enqueue_trial(dict(point))
            trial = study.ask()
            study.tell(trial, space.suggest(trial)["proxy_embed_dim"])
    sizes = [costs.counts(space.decode(trial.params).model).params / 1e6 for trial in growth.family(study)]
    return sizes, growth.ended


def test_the_family_is_the_grown_networks_within_the_bounds():
    everything, _ = grow(UNLIMITED)
    assert everything[0] < 2.0 < everything[-1]
    assert grow(Budget(at_least={"params_m": 2.0}))[0] == [size for size in everything if size >= 2.0]


def test_growth_says_when_nothing_it_passed_is_within_the_bounds():
    num_networks = len(grow(UNLIMITED)[0])
    sizes, ended = grow(Budget(at_least={"depth": 500}))
    assert sizes == []
    assert ended.endswith(f"; none of the {num_networks} networks on the way is within --min depth=500")


def test_an_axis_of_one_choice_is_no_obstacle():
    space = SearchSpace(
        name="one",
        axes=(Axis(name="K1", choices=(8,)), *(axis for axis in TOPOLOGIES.axes if axis.name != "K1")),
        decode=TOPOLOGIES.decode,
    )
    budget = window(space)
    assert all(budget.distance(space, point) == 0 for point in proposals(make("nsga2", space, budget), space, 60))

"""The strategy `evolution`: its sizes, who has children, and what the children are."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from results.records import Metric
from search.strategies.evolution import Sizes, best_points, evolution
from search.strategies.grid import point_key
from search.strategy import Problem, strategies
from space.search_space import Axis, SearchSpace

optuna.logging.set_verbosity(optuna.logging.WARNING)

BLOCKS = range(6)
SPACE = SearchSpace(
    name="blocks",
    axes=tuple(
        axis
        for block in BLOCKS
        for axis in (
            Axis(name=f"keep{block}", choices=(True, False)),
            Axis(name=f"heads{block}", choices=(6, 5, 4, 3), when=(f"keep{block}", True)),
            Axis(name=f"hidden{block}", choices=tuple(range(7, 0, -1)), when=(f"keep{block}", True)),
        )
    ),
    decode=lambda point: pytest.fail("a strategy does not build candidates"),
)
"""29^6 points; the genes of a dropped block do not exist."""


def value(point: Mapping[str, Any]) -> float:
    """Highest where even blocks are kept with 4 heads and 5 hidden units, and odd ones dropped."""
    found = 0.0
    for block in BLOCKS:
        if block % 2:
            found += not point[f"keep{block}"]
        elif point[f"keep{block}"]:
            found += 3 - abs(point[f"heads{block}"] - 4) - abs(point[f"hidden{block}"] - 5) / 3
    return found


def problem(num_trials: int, seed: int = 0) -> Problem:
    return Problem(space=SPACE, goals=(Metric("value", "maximize"),), seed=seed, num_trials=num_trials)


def searched(strategy: str, num_trials: int, seed: int = 0) -> optuna.Study:
    study = optuna.create_study(direction="maximize", sampler=strategies.get(strategy)(problem(num_trials, seed)))
    for _ in range(num_trials):
        trial = study.ask()
        study.tell(trial, value(SPACE.suggest(trial)))
    return study


@pytest.mark.parametrize(
    ("num_trials", "sizes"), [(None, (500, 75, 150)), (3350, (500, 75, 150)), (10_000, (500, 75, 150)), (335, (50, 8, 16)), (4, (2, 2, 2))]
)
def test_sizes_are_the_published_ones_and_shrink_with_the_trials(num_trials: int | None, sizes: tuple[int, int, int]):
    found = Sizes.of(num_trials)
    assert (found.num_random, found.num_parents, found.num_generation) == sizes


def test_a_generation_begins_where_the_one_before_it_ends():
    sizes = Sizes.of(3350)
    firsts = [sizes.first_of_generation(number) for number in (0, 499, 500, 649, 650, 3349)]
    assert firsts == [0, 0, 500, 500, 650, 3200]


def test_evolution_finds_what_random_draws_do_not():
    best = {name: [searched(name, 200, seed).best_value for seed in range(3)] for name in ("evolution", "random")}
    assert min(best["evolution"]) > max(best["random"])


def test_a_point_of_the_search_is_not_proposed_twice():
    points = [point_key(trial.params) for trial in searched("evolution", 300).trials]
    assert len(set(points)) == len(points)


def test_a_child_has_the_genes_of_two_parents_or_is_mutated_from_one():
    study = searched("evolution", 130)
    sizes = Sizes.of(130)
    crossed, changed = [], []
    for trial in study.trials[sizes.num_random :]:
        told = [each for each in study.trials if each.number < sizes.first_of_generation(trial.number)]
        parents = best_points(told, study.directions, sizes.num_parents)
        if (trial.number - sizes.num_random) % 2:
            crossed.append(any(is_crossed(trial.params, pair) for pair in itertools.permutations(parents, 2)))
        else:
            changed.append(min(share_changed(trial.params, parent) for parent in parents))
    # Where all crossings of parents that have become alike were told before, a mutation takes their place.
    assert all(crossed[:5])
    # A gene is drawn anew with probability .3; genes of a point drawn at random would differ in .7 of the cases.
    assert 0.1 < sum(changed) / len(changed) < 0.4


def share_changed(child: Mapping[str, Any], parent: Mapping[str, Any]) -> float:
    shared = child.keys() & parent.keys()
    return sum(child[name] != parent[name] for name in shared) / len(shared)


def is_crossed(child: Mapping[str, Any], parents: Sequence[Mapping[str, Any]]) -> bool:
    return all(gene in [parent[name] for parent in parents if name in parent] for name, gene in child.items())


def test_trials_in_flight_change_no_child():
    # The parents are those told before the generation began, whatever else is told while it runs.
    one, other = (optuna.create_study(direction="maximize", sampler=evolution(problem(200))) for _ in range(2))
    sizes = Sizes.of(200)
    for study in (one, other):
        for _ in range(sizes.num_random):
            trial = study.ask()
            study.tell(trial, value(SPACE.suggest(trial)))
    asked = [one.ask() for _ in range(4)]
    together = [SPACE.suggest(trial) for trial in asked]
    serial = []
    for _ in range(4):
        trial = other.ask()
        serial.append(SPACE.suggest(trial))
        other.tell(trial, value(serial[-1]))
    assert together == serial


def test_parents_of_two_objectives_are_taken_front_by_front():
    study = optuna.create_study(directions=["maximize", "minimize"])
    axis = optuna.distributions.IntDistribution(0, 9)
    values = [(1, 1), (3, 3), (2, 2), (0, 2), (1, 4), (3, 3)]
    for number, told in enumerate(values):
        study.add_trial(optuna.trial.create_trial(params={"x": number}, distributions={"x": axis}, values=told))
    # The front is (1, 1), (3, 3), (2, 2) and (3, 3) again; (0, 2) is dominated by (1, 1), and (1, 4) by all of the front.
    fronts = [[0, 1, 2, 5], [3], [4]]
    chosen = [point["x"] for point in best_points(study.trials, study.directions, 6)]
    assert sorted(chosen[:4]) == fronts[0]
    assert chosen[4:] == [3, 4]
    assert len(best_points(study.trials, study.directions, 2)) == 2


def test_failed_trials_have_no_children():
    study = optuna.create_study(direction="maximize", sampler=evolution(problem(60)))
    for _ in range(30):
        trial = study.ask()
        SPACE.suggest(trial)
        study.tell(trial, state=TrialState.FAIL)
    assert len({point_key(trial.params) for trial in study.trials}) == 30

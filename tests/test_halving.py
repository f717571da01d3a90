"""Successive halving: who goes on, what it costs, and what resuming finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from conftest import run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from test_loop import run as run_phase

from results.paths import RunPaths
from results.records import Metric
from results.study_results import load
from search.run import main
from search.strategies.halving import Halving, NearestToFront, rung_sizes
from search.strategy import enqueue
from search.studies.tune import TuneOptions
from search.study import RESULT_ATTRIBUTE, RunSettings, studies
from space.registry import SpecError
from workers.evaluate import Job, evaluate
from workers.pool import SerialPool

GOAL = Metric("accuracy", "maximize")
RUNGS = (1, 3, 9)


def halving(num_points: int, goal: Metric = GOAL, **changes: Any) -> Halving:
    return Halving([{"point": number} for number in range(num_points)], goal=goal, **{"rungs": RUNGS, **changes})


def new_study(goal: Metric = GOAL) -> optuna.Study:
    return optuna.create_study(directions=[goal.goal])


def measure(study: optuna.Study, batch: list[Mapping[str, Any]], score: Callable[[int, int], float | str]) -> None:
    """Enqueue, ask and tell a batch; a score that is a word is the kind of failure."""
    for point in batch:
        enqueue(study, point)
    for _ in batch:
        trial = study.ask()
        params = trial.suggest_int("point", 0, 99), trial.suggest_categorical("epochs_trained", RUNGS)
        scored = score(*params)
        if isinstance(scored, str):
            trial.set_user_attr(RESULT_ATTRIBUTE, {"failure": scored})
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, scored)


def run(proposer: Halving, study: optuna.Study, score: Callable[[int, int], float | str]) -> list[list[tuple[int, int]]]:
    """The rounds that were measured, as (point, epochs)."""
    rounds = []
    while batch := proposer.next_batch(study):
        rounds.append([(point["point"], point["epochs_trained"]) for point in batch])
        measure(study, batch, score)
    return rounds


def test_the_best_third_of_each_rung_goes_on_and_the_epochs_saved_are_told():
    study, proposer = new_study(), halving(9)
    rounds = run(proposer, study, lambda point, epochs: float(-abs(point - 4)))
    assert rounds == [[(point, 1) for point in range(9)], [(4, 3), (3, 3), (5, 3)], [(4, 9)]]
    # 9 x 1 + 3 x 2 + 1 x 6 epochs, each point going on from where it stopped, against 9 x 9.
    assert proposer.ended == "21 of 81 epochs trained, 74 % saved; 1 of 9 points went to the end"
    assert [trial.params["point"] for trial in proposer.family(study)] == [4]


def test_a_metric_that_is_minimised_keeps_the_lowest():
    goal = Metric("loss", "minimize")
    rounds = run(halving(3, goal), new_study(goal), lambda point, epochs: float(point))
    assert rounds[1:] == [[(0, 3)], [(0, 9)]]


def test_a_failed_point_takes_no_further_part_and_the_rest_is_halved():
    study, proposer = new_study(), halving(4, rungs=(1, 3))
    rounds = run(proposer, study, lambda point, epochs: "error" if point == 3 else float(point))
    assert rounds == [[(point, 1) for point in range(4)], [(2, 3)]]


def test_when_every_point_fails_halving_ends_and_says_at_which_epoch():
    study, proposer = new_study(), halving(3)
    run(proposer, study, lambda point, epochs: "error")
    assert proposer.ended == "every point had failed by epoch 1"
    assert proposer.family(study) == []


def test_a_timeout_is_tried_again_by_the_next_start_only():
    study = new_study()
    run(halving(3), study, lambda point, epochs: "timeout" if point == 2 else float(point))
    assert halving(3).next_batch(study) == [{"point": 2, "epochs_trained": 1}]


def test_a_round_in_flight_is_waited_for_and_a_waiting_one_is_not_proposed_twice():
    study, proposer = new_study(), halving(3)
    batch = proposer.next_batch(study)
    assert batch is not None
    for point in batch[:2]:
        enqueue(study, point)
    assert halving(3).next_batch(study) == batch[2:]
    enqueue(study, batch[2])
    assert halving(3).next_batch(study) == []


def test_waiting_trials_of_points_that_are_no_longer_given_are_unwanted():
    study = new_study()
    for point in halving(3).next_batch(study) or ():
        enqueue(study, point)
    assert [trial.user_attrs["proposed"]["point"] for trial in halving(2).unwanted(study)] == [2]


@settings(max_examples=50)
@given(num_points=st.integers(1, 20), interrupted_after=st.integers(0, 30), reduction=st.sampled_from([1.5, 2.0, 3.0]))
def test_interrupted_anywhere_it_measures_what_it_would_have_measured(num_points: int, interrupted_after: int, reduction: float):
    score = lambda point, epochs: float((point * 7919) % 23 + epochs)  # noqa: E731
    whole, pieces = new_study(), new_study()
    run(halving(num_points, reduction=reduction), whole, score)
    left = interrupted_after
    proposer = halving(num_points, reduction=reduction)
    while left > 0 and (batch := proposer.next_batch(pieces)):
        measure(pieces, batch[:left], score)
        left -= len(batch)
        proposer = halving(num_points, reduction=reduction)
    run(halving(num_points, reduction=reduction), pieces, score)
    params = [[trial.params for trial in study.trials] for study in (whole, pieces)]
    assert params[0] == params[1]
    assert len(whole.trials) == halving(num_points, reduction=reduction).num_total(new_study())
    assert len(whole.trials) == sum(rung_sizes(num_points, len(RUNGS), reduction))


COSTS = {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0, 5: 6.0}


def nearest(*budgets: float, **changes: Any) -> NearestToFront:
    """The rule over `COSTS`, with a budget for each of these bounds."""
    within = [lambda point, bound=bound: COSTS[point["point"]] <= bound for bound in budgets]
    fields = {"cost": lambda point: COSTS[int(point["point"])], "budgets": within, "goal": GOAL, "reduction": 3.0}
    return NearestToFront(**{**fields, **changes})


def going_on(select: NearestToFront, scores: Sequence[float]) -> list[int]:
    """Of a point for each score, those that reach the second rung."""
    rounds = run(
        halving(len(scores), select.goal, rungs=(1, 3), select=select), new_study(select.goal), lambda point, epochs: scores[point]
    )
    return sorted(point for point, _ in rounds[1])


def test_the_whole_front_goes_on_the_cheapest_point_too_however_low_it_is():
    assert going_on(nearest(6.0), [0.1, 0.05, 0.6, 0.6, 0.9, 0.8]) == [0, 2, 3, 4]
    assert going_on(nearest(6.0, goal=Metric("loss", "minimize")), [0.9, 0.95, 0.4, 0.4, 0.1, 0.2]) == [0, 2, 3, 4]


def test_what_is_least_behind_the_front_fills_the_share_not_what_is_best():
    # Point 1 is behind point 0 by 0.05, points 4 and 5 behind point 3 by 0.1 and more: the better ones are farther from the front.
    scores = [0.30, 0.25, 0.80, 0.90, 0.80, 0.70]
    assert going_on(nearest(6.0), scores) == [0, 2, 3]
    assert going_on(nearest(6.0, reduction=1.5), scores) == [0, 1, 2, 3]
    assert going_on(nearest(6.0, at_least=5), scores) == [0, 1, 2, 3, 4]


def test_the_best_of_every_budget_goes_on_also_behind_the_front():
    falling = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    assert going_on(nearest(6.0), falling) == [0, 1]
    # A budget of something else than the cost: the two dearest.
    dear = [lambda point: COSTS[point["point"]] >= 5.0]
    assert going_on(nearest(budgets=[lambda point: True, *dear]), falling) == [0, 1, 4]


def test_the_total_is_unknown_until_the_rule_has_said_how_many_go_on():
    study, proposer = new_study(), halving(6, rungs=(1, 3), select=nearest(6.0))
    assert proposer.num_total(study) is None
    run(proposer, study, lambda point, epochs: float(-point))
    assert proposer.num_total(study) == 8
    assert proposer.ended == "10 of 18 epochs trained, 44 % saved; 2 of 6 points went to the end"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rungs": (3, 3)}, "each more than the one before"),
        ({"rungs": (0, 3)}, "epochs from 1"),
        ({"rungs": ()}, "rungs are"),
        ({"reduction": 1.0}, "a number above 1"),
    ],
)
def test_what_cannot_be_halved_is_refused(changes: dict[str, Any], words: str):
    with pytest.raises(SpecError, match=words):
        halving(3, **changes)


def test_a_point_given_twice_is_refused():
    with pytest.raises(SpecError, match="given twice"):
        Halving([{"point": 1}, {"point": 1}], rungs=RUNGS, goal=GOAL)


class RecordingPool(SerialPool):
    """Keeps the jobs that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        self.jobs.append(job)
        super().submit(job)


def test_the_winner_of_a_real_tuning_has_the_bits_of_a_training_in_one_piece(tmp_path: Path, one_thread: None):
    options = TuneOptions(recipes=4, epochs=9, batch_size=256)
    (phase,) = studies.get("tune")(RunSettings(study="tune", runs=tmp_path, options=options)).phases
    assert phase.propose is not None
    pool = RecordingPool()
    study, _ = run_phase(phase, tmp_path, pool=pool, proposer=phase.propose({}))
    assert [trial.params["epochs_trained"] for trial in study.trials] == [1, 1, 1, 1, 3, 3, 9]
    last = pool.jobs[-1]
    assert last.continues is not None
    alone = evaluate(dataclasses.replace(last, continues=None, workdir=tmp_path / "alone"))
    told = study.trials[-1].user_attrs["result"]
    assert {name: told[name] for name in alone.values} == alone.values
    halves, whole = (torch.load(folder / "model.pt", weights_only=True)["weights"] for folder in (last.workdir, tmp_path / "alone"))
    assert all(torch.equal(halves[name], whole[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.usefixtures("serial_pool")
def test_a_tuning_by_command_shows_whole_trainings_first_and_the_default_recipe(tmp_path: Path):
    done = run_here(main, "tune", "--recipes", "4", "--epochs", "9", "--batch-size", "256", "--runs", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "successive halving of 4 recipes: 4 to epoch 1, 2 to epoch 3, 1 to epoch 9" in " ".join(done.stdout.split())
    assert "14 of 36 epochs trained, 61 % saved; 1 of 4 points went to the end" in done.stdout
    table = load(RunPaths(tmp_path).mlflow_uri, "tune")
    assert len(table) == 7
    assert table.sort_values("rank").iloc[0]["label"].startswith("9/9 epochs")
    assert "1/9 epochs default recipe" in set(table["label"])


def test_the_total_counts_what_a_start_with_fewer_points_has_trained():
    study, score = new_study(), lambda point, epochs: float(point)
    run(halving(9), study, score)
    total = halving(18).num_total(study)
    run(halving(18), study, score)
    assert len(study.get_trials(states=(TrialState.COMPLETE,))) == total

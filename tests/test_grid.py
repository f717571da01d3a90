"""The grid proposer: every point once, whatever died in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted import InterruptedPool
from optuna.trial import TrialState
from test_loop import make_phase, new_study, run, small_space, states

from search.storage import open_storage
from search.strategies.grid import Grid
from search.strategy import enqueue
from search.study import RESULT_ATTRIBUTE


def points(*numbers: int) -> list[dict[str, int]]:
    return [{"num_classes": number} for number in numbers]


def run_grid(folder: Path, *numbers: int, study: optuna.Study | None = None, **arguments: Any) -> optuna.Study:
    phase = make_phase(strategy=None, num_trials=None, propose=lambda phases: Grid(points(*numbers)))
    return run(phase, folder, study or new_study(), proposer=Grid(points(*numbers)), **arguments)[0]


def measured(study: optuna.Study) -> list[int]:
    return [trial.params["num_classes"] for trial in study.trials if trial.state == TrialState.COMPLETE]


def test_every_point_is_measured_once_and_in_order(tmp_path: Path):
    study = run_grid(tmp_path, 3, 1, 2)
    assert measured(study) == [3, 1, 2]
    run_grid(tmp_path, 3, 1, 2, study=study)
    assert len(study.trials) == 3


def test_a_longer_list_extends_the_study_and_a_shorter_one_leaves_it(tmp_path: Path):
    study = run_grid(tmp_path, 3, 1)
    run_grid(tmp_path, 1, study=study)
    run_grid(tmp_path, 3, 1, 5, study=study)
    assert measured(study) == [3, 1, 5]


def test_a_point_that_was_only_enqueued_or_half_asked_is_not_proposed_again(tmp_path: Path):
    study = new_study()
    for number in (1, 2):
        enqueue(study, {"num_classes": number})
    study.ask()
    assert Grid(points(1, 2, 3)).next_batch(study) == points(3)
    run_grid(tmp_path, 1, 2, 3, study=study)
    assert sorted(measured(study)) == [1, 2, 3]


@pytest.mark.parametrize("storage", ["optuna.journal", "sqlite:///optuna.db"])
def test_after_an_interruption_a_shorter_list_withdraws_what_had_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], storage: str
):
    monkeypatch.chdir(tmp_path)
    opened = open_storage(storage)
    study = optuna.create_study(storage=opened, study_name="s/grid", directions=["maximize"])
    with pytest.raises(KeyboardInterrupt):
        run_grid(tmp_path, *range(1, 21), study=study, pool=InterruptedPool(num_jobs=1), storage=opened)
    assert states(study) == ["COMPLETE", "RUNNING", *["WAITING"] * 18]
    capsys.readouterr()
    run_grid(tmp_path, 1, 5, study=study, storage=opened)
    assert measured(study) == [1, 2, 5]
    assert states(study).count("FAIL") == 17
    said = capsys.readouterr().out
    assert "s/grid: 17 waiting trials were withdrawn, which this command does not ask for" in said
    assert "3/3 done" in said
    assert "failed" not in said
    run_grid(tmp_path, 1, 5, 7, study=study, storage=opened)
    assert measured(study) == [1, 2, 5, 7]
    assert "withdrawn" not in capsys.readouterr().out


def fail(study: optuna.Study, number: int, kind: str) -> None:
    enqueue(study, {"num_classes": number})
    trial = study.ask()
    small_space(9).suggest(trial)
    trial.set_user_attr(RESULT_ATTRIBUTE, {"failure": kind})
    study.tell(trial, state=TrialState.FAIL)


def test_a_failure_that_would_repeat_settles_its_point_and_another_is_tried_again_by_the_next_start(tmp_path: Path):
    study = new_study()
    fail(study, 1, "error")
    fail(study, 2, "lost")
    grid = Grid(points(1, 2))
    assert grid.num_total(study) == 1
    assert grid.next_batch(study) == points(2)
    fail(study, 2, "lost")
    assert grid.next_batch(study) is None
    assert grid.ended == "0 of its 2 points are measured, 2 could not be"
    assert Grid(points(1, 2)).next_batch(study) == points(2)


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(1, 6), unique=True), min_size=1, max_size=4))
def test_the_total_is_what_is_complete_in_the_end(tmp_path_factory, lists: list[list[int]]):
    study, folder = new_study(), tmp_path_factory.mktemp("grid")
    for numbers in lists:
        total = Grid(points(*numbers)).num_total(study)
        run_grid(folder, *numbers, study=study)
        assert states(study) == ["COMPLETE"] * total
    assert sorted(measured(study)) == sorted({number for numbers in lists for number in numbers})

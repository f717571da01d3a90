"""The loop's decisions, with real studies and a pool in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import faulty
import optuna
import pytest
from optuna.trial import TrialState

from results.records import Failure, Outcome
from results.tracking import NullTracker, TrialRecord
from search.loop import MAX_FAILURES_IN_A_ROW, Measuring, PhaseLoop, PhaseStopped
from search.progress import Progress
from search.study import Budget, Phase
from space.search_space import Axis, SearchSpace
from workers.evaluate import Job
from workers.evaluator import Call, evaluators
from workers.pool import Event, Finished, SerialPool


class ListTracker(NullTracker):
    """Remembers what was recorded, in order."""

    def __init__(self) -> None:
        self.recorded: list[tuple[TrialRecord, Outcome]] = []

    def record(self, trial: TrialRecord, outcome: Outcome) -> None:
        self.recorded.append((trial, outcome))


class NoHold:
    def renew(self) -> None: ...

    def release(self) -> None: ...


def small_space(num_points: int) -> SearchSpace:
    return dataclasses.replace(faulty.SPACE, axes=(Axis(name="num_classes", choices=range(1, num_points + 1)),))


def make_phase(settings: faulty.FaultySettings | None = None, **changes) -> Phase:
    fields = {
        "name": "search",
        "space": faulty.SPACE,
        "evaluators": (Call("faulty", settings or faulty.FaultySettings()),),
        "objectives": ("score",),
        "strategy": "random",
        "num_trials": 6,
    }
    return Phase(**{**fields, **changes})


def run(
    phase: Phase, folder: Path, study: optuna.Study | None = None, proposer=None, pool: SerialPool | None = None
) -> tuple[optuna.Study, ListTracker]:
    study = study or optuna.create_study(directions=["maximize"], sampler=optuna.samplers.RandomSampler(seed=0))
    tracker = ListTracker()
    PhaseLoop(
        study_name="s",
        phase=phase,
        study=study,
        measuring=Measuring(seed=0, data="digits", data_fingerprint="digits", workdir=lambda number: folder / str(number)),
        pool=pool or SerialPool(),
        tracker=tracker,
        progress=Progress(),
        hold=NoHold(),
        proposer=proposer,
    ).run()
    return study, tracker


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def test_exactly_the_asked_number_of_trials_is_complete(tmp_path: Path):
    study, tracker = run(make_phase(), tmp_path)
    assert states(study) == ["COMPLETE"] * 6
    assert len(tracker.recorded) == 6
    assert all(trial.user_attrs["result"]["score"] == trial.value for trial in study.trials)


def test_more_trials_are_added_to_a_finished_phase_and_fewer_change_nothing(tmp_path: Path):
    study, _ = run(make_phase(), tmp_path)
    run(make_phase(num_trials=8), tmp_path, study)
    run(make_phase(num_trials=3), tmp_path, study)
    assert len(study.trials) == 8


def test_failed_trials_do_not_count_and_say_why(tmp_path: Path):
    phase = make_phase(faulty.FaultySettings(behaviour="raise", every=2))
    study, tracker = run(phase, tmp_path)
    assert states(study).count("COMPLETE") == 6
    failed = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert failed
    assert {trial.user_attrs["result"]["message"] for trial in failed} == {"ValueError: this model cannot be measured"}
    assert len(tracker.recorded) == len(study.trials)


def test_ten_failures_in_a_row_stop_the_phase_with_the_last_traceback(tmp_path: Path):
    phase = make_phase(faulty.FaultySettings(behaviour="raise"))
    with pytest.raises(PhaseStopped, match="this model cannot be measured"):
        run(phase, tmp_path)
    assert len(list(tmp_path.iterdir())) == MAX_FAILURES_IN_A_ROW


def test_a_value_that_is_not_finite_is_a_failure(tmp_path: Path):
    study, _ = run(make_phase(faulty.FaultySettings(behaviour="nan", every=2)), tmp_path)
    kinds = {trial.user_attrs["result"].get("failure") for trial in study.trials if trial.state == TrialState.FAIL}
    assert kinds == {"non_finite"}


def test_an_equal_candidate_is_not_measured_again(tmp_path: Path):
    log = tmp_path / "log"
    phase = make_phase(faulty.FaultySettings(log=str(log)), space=small_space(3), num_trials=20)
    study, tracker = run(phase, tmp_path / "work")
    assert states(study) == ["COMPLETE"] * 20
    assert log.read_text().count("end") <= 3
    for trial, outcome in tracker.recorded:
        assert outcome.values["score"] == trial.params["num_classes"]
    assert sum(trial.reused_from is not None for trial, _ in tracker.recorded) >= 17


def test_what_an_earlier_run_measured_is_reused_under_the_same_settings_only(tmp_path: Path):
    log = tmp_path / "log"
    one_point = {"space": small_space(1), "num_trials": 1}
    study, _ = run(make_phase(faulty.FaultySettings(log=str(log)), **one_point), tmp_path / "work")
    run(make_phase(faulty.FaultySettings(log=str(log)), **{**one_point, "num_trials": 2}), tmp_path / "work", study)
    assert log.read_text().count("end") == 1
    run(make_phase(faulty.FaultySettings(log=str(log), work_s=0.001), **{**one_point, "num_trials": 3}), tmp_path / "work", study)
    assert log.read_text().count("end") == 2


def test_over_budget_proposals_are_pruned_with_their_constraint(tmp_path: Path):
    half = faulty.classifier(50_000)
    from space.cost import cost

    phase = make_phase(budget=Budget(max_params_m=cost(half).params / 1e6))
    study, tracker = run(phase, tmp_path)
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    assert pruned
    assert all(trial.params["num_classes"] > 50_000 for trial in pruned)
    assert all(trial.constraints["max_params_m"] > 0 for trial in pruned)
    assert len(tracker.recorded) == 6


def test_a_phase_whose_proposals_are_always_rejected_stops_and_says_why(tmp_path: Path):
    with pytest.raises(PhaseStopped, match="over budget"):
        run(make_phase(budget=Budget(max_params_m=1e-9)), tmp_path)


def test_a_running_trial_is_adopted_under_its_number_with_the_parameters_it_had(tmp_path: Path):
    study = optuna.create_study(directions=["maximize"], sampler=optuna.samplers.RandomSampler(seed=0))
    suggested = study.ask().suggest_int("num_classes", 1, 100_000)
    study.ask()
    run(make_phase(num_trials=3), tmp_path, study)
    assert states(study) == ["COMPLETE"] * 3
    assert study.trials[0].params["num_classes"] == suggested


def test_trials_of_a_lost_driver_are_completed_also_when_fewer_are_asked_for_now(tmp_path: Path):
    study, _ = run(make_phase(num_trials=2), tmp_path)
    study.ask()
    run(make_phase(num_trials=1), tmp_path, study)
    assert states(study) == ["COMPLETE"] * 3


class FlakyPool(SerialPool):
    """Has no room now and then, as a cluster whose nodes are taken away and given back."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = 0

    def capacity(self) -> int:
        self._asked += 1
        return 0 if self._asked % 3 == 1 else 1


def test_a_cluster_without_nodes_for_a_while_does_not_end_the_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("search.loop.POLL_S", 0.001)
    study, _ = run(make_phase(), tmp_path, pool=FlakyPool())
    assert states(study) == ["COMPLETE"] * 6


class LosingPool(SerialPool):
    """Loses the first job given to it; holds three at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.submitted: list[int] = []

    def capacity(self) -> int:
        return 3

    def submit(self, job: Job) -> None:
        assert job.key not in [waiting.key for waiting in self._queue], "two equal jobs are in flight"
        self.submitted.append(job.trial)
        super().submit(job)

    def poll(self, timeout_s: float) -> list[Event]:
        if self.submitted == [0]:
            return [Finished(self._queue.popleft().trial, Failure(kind="lost", message="its worker died"))]
        return super().poll(timeout_s)


def test_equal_trials_wait_for_one_another_also_after_the_first_was_lost(tmp_path: Path):
    pool = LosingPool()
    study, _ = run(make_phase(space=small_space(1), num_trials=4), tmp_path, pool=pool)
    assert states(study).count("COMPLETE") == 4
    assert len(pool.submitted) == 2


def test_an_evaluator_that_leaves_a_metric_out_fails_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = dataclasses.replace(Call("faulty").evaluator, function=lambda model, context, settings: {})
    monkeypatch.setitem(evaluators._parts, ("faulty",), broken)
    with pytest.raises(PhaseStopped, match="did not measure score"):
        run(make_phase(), tmp_path)


class TwoRounds:
    """Proposes 1 and 2, then ten times the better of them."""

    ended = "after two rounds"

    def next_batch(self, study: optuna.Study) -> list[Mapping[str, int]] | None:
        best = max((trial.params["num_classes"] for trial in study.trials), default=None)
        return {None: [{"num_classes": 1}, {"num_classes": 2}], 2: [{"num_classes": 20}]}.get(best)

    def family(self, study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
        return study.trials[-1:]


def test_a_proposer_sees_a_whole_round_told_before_it_is_asked_again(tmp_path: Path):
    study, _ = run(make_phase(strategy=None, num_trials=None, propose=lambda phases: TwoRounds()), tmp_path, proposer=TwoRounds())
    assert [trial.params["num_classes"] for trial in study.trials] == [1, 2, 20]
    assert states(study) == ["COMPLETE"] * 3


def test_the_outcome_file_holds_what_was_told(tmp_path: Path):
    import json

    study, _ = run(make_phase(num_trials=1), tmp_path)
    stored = json.loads((tmp_path / "0" / "outcome.json").read_text())
    assert stored["values"] == {"score": study.trials[0].value}
    assert stored["candidate"]["label"] == study.trials[0].user_attrs["result"]["label"]

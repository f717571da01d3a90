"""The loop's decisions, with real studies and a pool in this process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faulty
import optuna
import pytest
from optuna.trial import TrialState

from results.records import Failure, Measurement, Outcome
from results.tracking import NullTracker, TrialRecord
from search.budget import Budget
from search.loop import MAX_FAILURES_IN_A_ROW, PhaseLoop
from search.measuring import Measuring, needed_trials
from search.progress import Progress, Status
from search.strategies.grid import Grid
from search.study import Phase, PhaseStopped, RunSettings, phase_settings
from space.recipe import Recipe
from space.registry import SpecError
from space.search_space import Axis, Candidate, SearchSpace
from workers.evaluate import Job
from workers.evaluator import Call, EarlierTrial, by_todays_names, evaluators
from workers.evaluators.profile import ProfileSettings
from workers.evaluators.train import TrainSettings
from workers.pool import Event, Finished, SerialPool
from workers.resources import Resources

STORAGE = optuna.storages.InMemoryStorage()
"""Of all studies here, each under a name of its own."""


class ListTracker(NullTracker):
    """Remembers what was recorded, in order."""

    def __init__(self) -> None:
        self.recorded: list[tuple[TrialRecord, Outcome]] = []

    def record(self, trial: TrialRecord, outcome: Outcome, artifacts: Path | None = None) -> None:
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


def new_study() -> optuna.Study:
    return optuna.create_study(directions=["maximize"], sampler=optuna.samplers.RandomSampler(seed=0), storage=STORAGE)


def run(phase: Phase, folder: Path, study: optuna.Study | None = None, **arguments: Any) -> tuple[optuna.Study, ListTracker]:
    study, tracker = study or new_study(), ListTracker()
    make_loop(phase, folder, study, tracker, **arguments).run()
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


def test_a_phase_whose_failures_are_data_measures_every_point(tmp_path: Path):
    points = [{"num_classes": number} for number in range(1, MAX_FAILURES_IN_A_ROW + 4)]
    proposing = {"strategy": None, "num_trials": None, "propose": lambda phases: Grid(points)}
    phase = make_phase(faulty.FaultySettings(behaviour="raise"), space=small_space(len(points)), failures_are_data=True, **proposing)
    study, _ = run(phase, tmp_path, proposer=Grid(points))
    assert states(study) == ["FAIL"] * len(points)


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

    phase = make_phase(budget=Budget(at_most={"params_m": cost(half).params / 1e6}))
    study, tracker = run(phase, tmp_path)
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    assert pruned
    assert all(trial.params["num_classes"] > 50_000 for trial in pruned)
    assert all(trial.constraints["max_params_m"] > 0 for trial in pruned)
    assert len(tracker.recorded) == 6


def test_a_study_resumed_under_another_budget_keeps_what_it_has_and_holds_new_trials_to_the_new_bounds(tmp_path: Path):
    study, _ = run(make_phase(), tmp_path)
    before = [trial.params["num_classes"] for trial in study.trials]
    budget = Budget(at_most={"params_m": 0.1})
    run(make_phase(budget=budget, num_trials=8), tmp_path, study)
    complete = [trial.params["num_classes"] for trial in study.get_trials(states=(TrialState.COMPLETE,))]
    assert complete[:6] == before
    assert max(before) > 20_000
    assert len(complete) == 8
    assert all(budget.holds(Candidate(model=faulty.classifier(num_classes))) for num_classes in complete[6:])


def test_a_phase_whose_proposals_are_always_rejected_stops_and_says_why(tmp_path: Path):
    with pytest.raises(PhaseStopped, match=r"outside the budget \(--max params_m=1e-09\)"):
        run(make_phase(budget=Budget(at_most={"params_m": 1e-9})), tmp_path)


def test_a_running_trial_is_adopted_under_its_number_with_the_parameters_it_had(tmp_path: Path):
    study = new_study()
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

    def capacity(self, resources: Resources) -> int:
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

    def capacity(self, resources: Resources) -> int:
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

    def unwanted(self, study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
        return []

    def num_total(self, study: optuna.Study) -> int:
        return 3

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


def report_progress(model, context, settings):
    for share in (0.25, 0.75):
        context.report("progress", share, 0)
    context.report("loss", 2.0, 0)
    (context.workdir / "artifacts").mkdir(parents=True)
    (context.workdir / "artifacts" / "predictions.npz").write_text(context.workdir.name)
    return {"score": 1.0}


class FullTracker(ListTracker):
    """Remembers reports and the folders of files too."""

    def __init__(self) -> None:
        super().__init__()
        self.reported: list[str] = []
        self.folders: dict[int, Path | None] = {}

    def report(self, trial: TrialRecord, name: str, value: float, step: int) -> None:
        self.reported.append(name)

    def record(self, trial: TrialRecord, outcome: Outcome, artifacts: Path | None = None) -> None:
        super().record(trial, outcome)
        self.folders[trial.number] = artifacts


def make_loop(phase: Phase, folder: Path, study: optuna.Study, tracker: NullTracker, **changes) -> PhaseLoop:
    measuring = Measuring(seed=0, data="digits", data_fingerprint="digits", workdir=lambda number: folder / str(number))
    arguments = {"storage": STORAGE, "pool": SerialPool(), "progress": Progress(), "hold": NoHold(), **changes}
    return PhaseLoop(study_name="s", phase=phase, study=study, measuring=measuring, tracker=tracker, **arguments)


def test_the_share_that_is_done_is_shown_and_is_no_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shown = []

    class Listening(Progress):
        def show(self, status: Status, *, final: bool = False) -> None:
            shown.append((status.running, status.running_share, status.total))

    monkeypatch.setitem(evaluators._parts, ("faulty",), dataclasses.replace(Call("faulty").evaluator, function=report_progress))
    tracker = FullTracker()
    study = new_study()

    class SlowPool(SerialPool):
        """Hands out one event at a time."""

        def __init__(self) -> None:
            super().__init__()
            self._events: list[Event] = []

        def poll(self, timeout_s: float) -> list[Event]:
            self._events = self._events or super().poll(timeout_s)
            return [self._events.pop(0)] if self._events else []

    make_loop(make_phase(num_trials=1), tmp_path, study, tracker, progress=Listening(), pool=SlowPool()).run()
    assert list(dict.fromkeys(shown)) == [(0, None, 1), (1, None, 1), (1, 0.25, 1), (1, 0.75, 1)]
    assert shown[-1] == (0, None, 1)
    assert tracker.reported == ["loss"]


def test_files_are_recorded_once_and_repeats_name_the_trial_that_left_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(evaluators._parts, ("faulty",), dataclasses.replace(Call("faulty").evaluator, function=report_progress))
    tracker = FullTracker()
    study = new_study()
    phase = make_phase(space=small_space(1), num_trials=3)
    make_loop(phase, tmp_path, study, tracker).run()
    more = FullTracker()
    make_loop(dataclasses.replace(phase, num_trials=5), tmp_path, study, more).run()
    with_files = {number for number, folder in {**tracker.folders, **more.folders}.items() if folder and folder.is_dir()}
    assert with_files == {0}
    assert [record.reused_from for record, _ in tracker.recorded + more.recorded] == [None, 0, 0, 0, 0]


def test_a_recipe_gives_its_trial_the_seed_and_is_part_of_its_identity(tmp_path: Path):
    space = SearchSpace(
        name="seeds",
        axes=(Axis(name="seed", choices=range(10)),),
        decode=lambda params: Candidate(model=faulty.classifier(3), recipe=Recipe(epochs=1, seed=params["seed"])),
    )
    _, tracker = run(make_phase(space=space, num_trials=10), tmp_path)
    seeds = [record.params["seed"] for record, _ in tracker.recorded]
    assert [outcome.seed for _, outcome in tracker.recorded] == seeds
    assert len({record.recipe_digest for record, _ in tracker.recorded}) == len(set(seeds)) > 1
    assert sum(record.reused_from is None for record, _ in tracker.recorded) == len(set(seeds))


def test_the_best_trial_of_an_earlier_phase_is_the_one_with_files_or_the_phase_says_what_is_missing(tmp_path: Path):
    phase = make_phase(num_trials=4, space=small_space(2))
    empty = optuna.create_study(study_name="s/empty", directions=["maximize"])
    with pytest.raises(PhaseStopped, match="s/empty has no complete trial"):
        needed_trials(phase, empty, lambda number: tmp_path / str(number), "best")
    study, tracker = run(phase, tmp_path)
    (best,) = needed_trials(phase, study, lambda number: tmp_path / str(number), "best")
    first = next(record.number for record, _ in tracker.recorded if record.params["num_classes"] == 2)
    assert best.workdir == tmp_path / str(first)
    assert best.values == {"score": 2.0}
    (best.workdir / "outcome.json").unlink()
    with pytest.raises(PhaseStopped, match="are gone"):
        needed_trials(phase, study, lambda number: tmp_path / str(number), "best")


def test_all_trials_of_an_earlier_phase_are_given_best_first_and_each_measurement_once(tmp_path: Path):
    phase = make_phase(num_trials=30, space=small_space(3))
    study, _ = run(phase, tmp_path)
    found = needed_trials(phase, study, lambda number: tmp_path / str(number), "all")
    assert [trial.values["score"] for trial in found] == [3.0, 2.0, 1.0]
    assert len({trial.key for trial in found}) == 3
    assert all(study.trials[trial.number].params["num_classes"] == trial.values["score"] for trial in found)


def backbones(*keys: str, folder: str = "backbone") -> dict[str, tuple[EarlierTrial, ...]]:
    return {"backbone": tuple(EarlierTrial(number=number, workdir=Path(folder), key=key) for number, key in enumerate(keys))}


def test_what_was_measured_on_another_backbone_is_not_reused(tmp_path: Path):
    phase = make_phase()
    measuring = Measuring(seed=0, data="digits", data_fingerprint="digits", workdir=lambda number: tmp_path)
    candidate = Candidate(model=faulty.classifier(3))
    keys = {
        dataclasses.replace(measuring, earlier=earlier).job(0, candidate, phase.evaluators).key
        for earlier in ({}, backbones("one"), backbones("other"), backbones("one", "other"))
    }
    assert len(keys) == 4
    moved = dataclasses.replace(measuring, earlier=backbones("one", folder="moved"))
    assert moved.job(0, candidate, phase.evaluators).key in keys


def stopping_space(*stops: int) -> SearchSpace:
    """One network, and the point at which its pretended training stops; 0 is the end."""
    return SearchSpace(
        name="faulty/stops",
        axes=(Axis(name="stop", choices=stops),),
        decode=lambda params: Candidate(model=faulty.classifier(3), settings={"faulty": {"every": params["stop"]}}),
    )


def test_settings_of_a_trial_are_part_of_its_identity_its_json_and_what_the_evaluator_is_given(tmp_path: Path):
    space = dataclasses.replace(
        stopping_space(5, 7),
        decode=lambda params: Candidate(model=faulty.classifier(3), settings={"faulty": {"work_s": params["stop"] / 1e3}}),
    )
    _, tracker = run(make_phase(space=space, num_trials=8), tmp_path)
    first = {record.params["stop"]: record.number for record, _ in reversed(tracker.recorded) if record.reused_from is None}
    assert first.keys() == {5, 7}
    assert all(record.reused_from in (None, first[record.params["stop"]]) for record, _ in tracker.recorded)
    stored = [json.loads((tmp_path / str(number) / "outcome.json").read_text()) for number in first.values()]
    assert stored[0]["key"] != stored[1]["key"]
    assert {each["candidate"]["settings"]["faulty"]["work_s"] for each in stored} == {0.005, 0.007}
    # A run-level setting of the same value is the same measurement.
    measuring = Measuring(seed=0, data="digits", data_fingerprint="digits", workdir=lambda number: tmp_path)
    whole = make_phase(faulty.FaultySettings(work_s=0.005))
    assert measuring.job(0, Candidate(model=faulty.classifier(3)), whole.evaluators).key in {each["key"] for each in stored}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"faultyy": {"every": 2}}, "unknown evaluator 'faultyy'"),
        ({"faulty": {"evry": 2}}, "unknown setting 'evry'"),
        ({"faulty": {"every": "two"}}, "every is 'two'; int is expected"),
        ({"faulty": {"behaviour": "sleep"}}, "behaviour is 'sleep'; one of work, raise"),
        ({"resources": {"cpu": 2}}, "unknown field 'cpu'"),
        ({"resources": {"gpus": -1}}, "gpus is -1; allowed: numbers from 0"),
    ],
)
def test_settings_of_a_trial_that_do_not_exist_fail_it_with_the_reason(tmp_path: Path, settings: dict[str, dict[str, Any]], words: str):
    space = dataclasses.replace(stopping_space(1), decode=lambda params: Candidate(model=faulty.classifier(3), settings=settings))
    with pytest.raises(PhaseStopped, match=words):
        run(make_phase(space=space), tmp_path)


def test_a_trial_that_asks_for_what_no_node_has_is_told_unavailable_and_not_waited_for(tmp_path: Path):
    class CpuPool(SerialPool):
        def capacity(self, resources: Resources) -> int:
            return 0 if resources.accelerator_type else 1

    space = dataclasses.replace(
        stopping_space(0, 1),
        decode=lambda params: Candidate(
            model=faulty.classifier(3), settings={"resources": {"gpus": 1, "accelerator_type": "H100"}} if params["stop"] else {}
        ),
    )
    study, tracker = run(make_phase(space=space, num_trials=3), tmp_path, pool=CpuPool())
    unavailable = [outcome for record, outcome in tracker.recorded if record.params["stop"]]
    assert unavailable
    assert all(isinstance(outcome, Failure) and outcome.kind == "unavailable" for outcome in unavailable)
    assert "an accelerator H100, which no node of the cluster has" in unavailable[0].message
    assert states(study).count("COMPLETE") == 3


def test_a_trial_goes_on_from_the_furthest_one_of_the_same_training_also_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given: dict[int, str | None] = {}

    def pretend_to_train(model, context, settings):
        given[settings.every] = context.continues and context.continues.name
        return {"score": 1.0}

    stopping = dataclasses.replace(Call("faulty").evaluator, function=pretend_to_train, continued_by="every")
    monkeypatch.setitem(evaluators._parts, ("faulty",), stopping)
    study = new_study()

    def train_to(*stops: int) -> None:
        space = stopping_space(2, 5, 9, 0)
        grid = Grid([{"stop": stop} for stop in stops])
        run(make_phase(space=space, strategy=None, num_trials=None, propose=lambda phases: grid), tmp_path, study, proposer=grid)

    train_to(5)
    train_to(5, 2, 9)
    train_to(5, 2, 9, 0)
    assert given == {5: None, 2: None, 9: "0", 0: "2"}


def test_two_evaluators_of_a_phase_cannot_give_one_name_to_two_values():
    twice = (Call("profile", ProfileSettings(batch_size=1)), Call("profile", ProfileSettings(batch_size=8)))
    with pytest.raises(SpecError, match=r"latency_ms, latency_iqr_ms, .*memory_mb, .*would be measured twice") as refused:
        make_phase(evaluators=twice, objectives=("latency_ms",))
    assert "'batch_size': 8" in str(refused.value)
    with pytest.raises(SpecError, match="phase 'search': val_top1_pct, test_top1_pct, test_nll would be measured twice"):
        make_phase(evaluators=(Call("train"), Call("linear_probe")), objectives=("val_top1_pct",))


def test_two_evaluators_may_state_the_same_quantity():
    phase = make_phase(evaluators=(Call("cost"), Call("profile", ProfileSettings())), objectives=("latency_ms", "params_m"))
    assert phase.metrics["params_m"].goal == "minimize"


def test_resources_are_a_phases_own(tmp_path: Path):
    run_settings = RunSettings(study="s", runs=tmp_path, gpus=1.0, processes=4)
    free, scored, trained = (make_phase(evaluators=(Call(name),), objectives=(metric,)) for name, metric in RESOURCE_CASES.items())
    assert free.trial_resources(run_settings) == Resources(memory_mb=0)
    assert scored.trial_resources(run_settings).processes == 1
    assert scored.trial_resources(run_settings).gpus == 1.0
    assert trained.trial_resources(run_settings).processes == 4
    assert make_phase(resources=Resources(cpus=2)).trial_resources(run_settings) == Resources(cpus=2)


RESOURCE_CASES = {"cost": "params_m", "robustness": "permutation_auc_pct", "train": "val_top1_pct"}


def test_the_key_of_a_recipe_with_a_moving_average_changed_with_its_meaning_and_no_other(tmp_path: Path):
    measuring = Measuring(seed=0, data="digits", data_fingerprint="digits", workdir=lambda number: tmp_path)
    trained = make_phase(evaluators=(Call("train", TrainSettings()),), objectives=("val_top1_pct",))

    def key(**changes: Any) -> str:
        return measuring.job(0, Candidate(model=faulty.classifier(3), recipe=Recipe(epochs=3, **changes)), trained.evaluators).key

    assert key() == KEY_BEFORE
    assert key(ema_decay=0.9) != KEY_BEFORE_WITH_AVERAGE


KEY_BEFORE = "7568ea54d8ed43e4"
KEY_BEFORE_WITH_AVERAGE = "08a2a38700a1c793"
"""Of the same jobs when a moving average had no warm-up, at commit 3afb312."""


def test_a_renamed_evaluator_is_known_by_its_old_name_and_stored_under_it(tmp_path: Path):
    measuring = Measuring(seed=0, data="digits", data_fingerprint="digits", workdir=lambda number: tmp_path)
    keys = set()
    for name in ("train", "short_train"):
        run_settings = RunSettings(study="s", runs=tmp_path, evaluator_settings={name: {"stop_after": "2"}})
        assert run_settings.call("train").settings.stop_after == 2
        candidate = Candidate(model=faulty.classifier(3), recipe=Recipe(epochs=9), settings={name: {"stop_after": 3}})
        job = measuring.job(0, candidate, (Call(name, TrainSettings()),))
        assert job.calls[0].settings.stop_after == 3
        assert job.calls[0].to_json()["name"] == "short_train"
        keys.add(job.key)
    assert len(keys) == 1
    assert "short_train" not in evaluators.names()


def test_an_outcome_of_an_older_key_is_measured_anew_and_never_taken_from_mlflow(tmp_path: Path):
    class Remembering(ListTracker):
        """MLflow holds a finished run of the lost driver's trial."""

        def finished_outcome(self, phase: str, number: int) -> Outcome | None:
            return Measurement(values={"score": 123.0}, elapsed_s=0.0, device="cpu", versions={}, seed=0)

    def adopt(folder: Path) -> float:
        study, tracker = new_study(), Remembering()
        study.ask().suggest_int("num_classes", 1, 3)
        make_loop(make_phase(space=small_space(3), num_trials=1), folder, study, tracker).run()
        return study.trials[0].value

    assert adopt(tmp_path / "without an outcome file") == 123.0
    older = tmp_path / "older" / "0" / "outcome.json"
    older.parent.mkdir(parents=True)
    older.write_text(
        json.dumps({"key": "older", "reused_from": None, "candidate": {}, "outcome": "Failure", "kind": "lost", "message": ""})
    )
    assert adopt(tmp_path / "older") in (1.0, 2.0, 3.0)


def test_a_stop_at_the_last_epoch_is_the_whole_training(tmp_path: Path):
    measuring = Measuring(seed=0, data="digits", data_fingerprint="digits", workdir=lambda number: tmp_path)

    def job(**settings: Any) -> Job:
        candidate = Candidate(model=faulty.classifier(3), recipe=Recipe(epochs=9), settings={"train": settings} if settings else {})
        return measuring.job(0, candidate, (Call("train", TrainSettings()),))

    assert job(stop_after=9).key == job().key
    assert job(stop_after=3).key != job().key
    assert job(stop_after=9).stop == job().stop


def test_one_number_written_in_two_ways_is_one_key_and_a_setting_given_under_two_names_is_refused():
    call = Call("faulty", faulty.FaultySettings())
    assert call.changed({"work_s": 2}).digest == call.changed({"work_s": 2.0}).digest
    with pytest.raises(SpecError, match=r"train.stop_after is given twice"):
        by_todays_names({"short_train": {"stop_after": 1}, "train": {"stop_after": 2}}, "--set")
    merged = by_todays_names({"short_train": {"stop_after": 1}, "train": {"temperature": 2}}, "--set")
    assert merged == {"train": {"stop_after": 1, "temperature": 2}}


def test_the_device_of_a_phase_is_among_its_settings(tmp_path: Path):
    run_settings = RunSettings(study="s", runs=tmp_path)
    on_gpu = make_phase(resources=Resources(gpus=1, accelerator_type="H100"))
    stored = phase_settings(on_gpu, run_settings, "digits")
    assert (stored["device"], stored["accelerator_type"]) == ("cuda", "H100")
    assert phase_settings(make_phase(), run_settings, "digits")["device"] == "cpu"


@pytest.mark.parametrize("wrong", [{"processes": 1.5}, {"memory_mb": 0.5}, {"processes": 2, "gpus": 0.5}, {"cpus": -1}])
def test_resources_that_cannot_be_are_refused(wrong: dict[str, Any]):
    with pytest.raises(SpecError, match="resources: "):
        Resources(**wrong)

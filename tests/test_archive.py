"""Setting a study aside under a dated name: all of it or none, wherever the driver dies."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import faulty
import optuna
import pytest
from faulty_driver import die_after
from forked import Forked
from optuna.trial import TrialState

import search.archiving
import search.service
from results.mlflow_store import mlflow_client, search_runs
from results.paths import RunPaths
from search.interruption import Interruption
from search.lock import Lease, StudyIsDriven
from search.service import Plan, driving
from search.storage import open_storage
from search.study import Phase, RunSettings, Study, study

pytestmark = pytest.mark.slow

PHASES = ("first", "second")
STEPS = {
    "intent": (search.archiving, "write_json_atomically"),
    "part of a copy": (optuna.storages.JournalStorage, "create_new_trial"),
    "copy": (optuna, "copy_study"),
    "delete": (optuna, "delete_study"),
    "MLflow": (search.archiving, "archive_experiment"),
    "work": (Path, "rename"),
}


@study("free")
def free_study(run: RunSettings) -> Study:
    """Two phases that need no cluster."""

    def phase(name: str) -> Phase:
        return Phase(
            name=name,
            space=faulty.SPACE,
            evaluators=(run.call("cost"),),
            objectives=("params_m",),
            strategy="random",
            num_trials=run.num_trials or 3,
        )

    return Study(phases=tuple(phase(name) for name in PHASES))


def settings(runs: Path, **changes) -> RunSettings:
    return RunSettings(**{"study": "free", "runs": runs, "num_trials": 3, **changes})


def run(settings: RunSettings, *, fresh: bool = False) -> None:
    search.service.run_study(settings, fresh=fresh, max_workers=None, ray_address="local", command="", interruption=Interruption())


def run_fresh_and_die(settings: RunSettings, step: str, count: int) -> None:
    owner, name = STEPS[step]
    setattr(owner, name, die_after(count, getattr(owner, name)))
    run(settings, fresh=True)


def killed(settings: RunSettings, step: str, count: int) -> None:
    """`--fresh` in a process that is killed right after the step was done so many times."""
    ended = Forked(run_fresh_and_die, settings, step, count, folder=settings.runs).wait()
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def optuna_trials(storage: str | Path) -> dict[str, list]:
    """Of every study in the storage: the values of its trials, all complete."""
    opened = open_storage(storage)
    found = {}
    for name in optuna.get_all_study_names(opened):
        trials = optuna.load_study(study_name=name, storage=opened).trials
        assert all(trial.state == TrialState.COMPLETE for trial in trials)
        found[name] = [trial.values[0] for trial in trials]
    return found


def mlflow_trials(runs: Path) -> dict[str, dict[str, list]]:
    """Of every experiment: the values of its trials, by phase."""
    client = mlflow_client(RunPaths(runs).mlflow_uri)
    found = {}
    for experiment in client.search_experiments():
        runs_of = search_runs(client, [experiment.experiment_id], "tags.kind = 'trial'")
        runs_of.sort(key=lambda each: int(each.data.tags["trial"]))
        found[experiment.name] = {
            phase: [each.data.metrics["params_m"] for each in runs_of if each.data.tags["phase"] == phase] for phase in PHASES
        }
    return {name: by_phase for name, by_phase in found.items() if name != "Default"}


def archives(runs: Path) -> list[str]:
    return sorted({name.partition("/")[0] for name in optuna_trials(RunPaths(runs).journal)} - {"free"})


def check_ledgers(runs: Path, num_trials: dict[str, int]) -> None:
    """Optuna, MLflow and the work folder hold exactly these studies, each phase with so many complete trials."""
    in_optuna = optuna_trials(RunPaths(runs).journal)
    assert {name: len(values) for name, values in in_optuna.items()} == {
        f"{name}/{phase}": count for name, count in num_trials.items() for phase in PHASES
    }
    assert mlflow_trials(runs) == {name: {phase: in_optuna[f"{name}/{phase}"] for phase in PHASES} for name in num_trials}
    for name, count in num_trials.items():
        assert {phase: len(list((RunPaths(runs).study_dir(name) / phase).iterdir())) for phase in PHASES} == dict.fromkeys(PHASES, count)
    assert {folder.name for folder in (runs / "work").iterdir()} == set(num_trials)
    assert not list(runs.glob("*.archiving.json"))


@pytest.mark.parametrize(
    ("step", "count"),
    [("intent", 1), ("part of a copy", 2), ("copy", 1), ("delete", 1), ("delete", 2), ("MLflow", 1), ("work", 1)],
)
def test_a_study_whose_archiving_was_killed_is_whole_under_its_dated_name(tmp_path: Path, step: str, count: int):
    runs = tmp_path / "runs"
    run(settings(runs, num_trials=4))
    killed(settings(runs), step, count)
    run(settings(runs))
    (archived,) = archives(runs)
    assert archived.startswith("free@")
    check_ledgers(runs, {"free": 3, archived: 4})


def test_fresh_after_a_killed_fresh_sets_the_study_aside_once(tmp_path: Path):
    runs = tmp_path / "runs"
    run(settings(runs))
    killed(settings(runs), "copy", 1)
    run(settings(runs), fresh=True)
    (archived,) = archives(runs)
    check_ledgers(runs, {"free": 3, archived: 3})


def test_studies_set_aside_within_one_second_get_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = tmp_path / "runs"
    monkeypatch.setattr("time.strftime", lambda *_: "20261121-000000")
    for num_trials in (1, 2, 3):
        run(settings(runs, num_trials=num_trials), fresh=True)
    check_ledgers(runs, {"free@20261121-000000": 1, "free@20261121-000000-2": 2, "free": 3})


def test_a_study_that_others_made_after_ours_was_moved_is_left_alone(tmp_path: Path):
    storage = str(tmp_path / "shared.journal")
    mine = settings(tmp_path / "mine", storage=storage)
    run(mine)
    killed(mine, "MLflow", 1)
    run(settings(tmp_path / "others", storage=storage, num_trials=2))
    before = optuna_trials(storage)
    with driving(Plan(mine), fresh=False):
        pass
    assert optuna_trials(storage) == before
    assert {len(values) for values in before.values()} == {2, 3}
    assert not RunPaths(mine.runs).archiving("free").exists()


def test_an_experiment_deleted_in_mlflow_is_refused_before_anything_is_moved(tmp_path: Path):
    runs = tmp_path / "runs"
    run(settings(runs))
    client = mlflow_client(RunPaths(runs).mlflow_uri)
    experiment = client.get_experiment_by_name("free")
    client.delete_experiment(experiment.experiment_id)
    before = optuna_trials(RunPaths(runs).journal)
    with pytest.raises(ValueError, match="was deleted in MLflow"):
        run(settings(runs), fresh=True)
    assert optuna_trials(RunPaths(runs).journal) == before
    client.restore_experiment(experiment.experiment_id)
    check_ledgers(runs, {"free": 3})


def test_fresh_leaves_a_study_alone_that_another_driver_runs_from_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now, live = [1000.0], []

    def sleep(seconds: float) -> None:
        now[0] += seconds
        for hold in live:
            hold.renew()

    monkeypatch.setattr("search.service.Lease", partial(Lease, clock=lambda: now[0], sleep=sleep))
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    run(settings(tmp_path / "a", storage=storage))
    before = optuna_trials(storage)
    with driving(Plan(settings(tmp_path / "a", storage=storage)), fresh=False) as (hold, _, _):
        live.append(hold)
        with pytest.raises(StudyIsDriven, match=f"process {os.getpid()}"):
            run(settings(tmp_path / "b", storage=storage), fresh=True)
        hold.renew()
    live.clear()
    assert optuna_trials(storage) == before
    run(settings(tmp_path / "b", storage=storage), fresh=True)
    assert len(optuna_trials(storage)) == 2 * len(before)


def test_two_runs_folders_with_one_journal_do_not_drive_a_study_at_once(tmp_path: Path):
    storage = str(tmp_path / "shared.journal")
    with (
        driving(Plan(settings(tmp_path / "a", storage=storage)), fresh=False),
        pytest.raises(StudyIsDriven, match=f"process {os.getpid()}"),
    ):
        run(settings(tmp_path / "b", storage=storage))
    run(settings(tmp_path / "b", storage=storage))


def test_two_storages_with_one_runs_folder_do_not_drive_a_study_at_once(tmp_path: Path):
    with (
        driving(Plan(settings(tmp_path)), fresh=False),
        pytest.raises(StudyIsDriven, match=f"process {os.getpid()}"),
    ):
        run(settings(tmp_path, storage=f"sqlite:///{tmp_path / 'optuna.db'}"))

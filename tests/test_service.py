"""Whole studies through the command line: run, resume, refuse, archive, and drive alone through Optuna."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import optuna
import pytest
from conftest import run_command, run_here, run_pasted
from interrupted import InterruptedPool
from optuna.trial import TrialState

import search
from results.mlflow_store import MlflowTracker, mlflow_client, search_runs
from results.paths import RunPaths
from results.study_results import load
from search.interruption import Interruption
from search.run import main
from search.storage import open_storage
from search.study import RunSettings, SettingsError, open_phase, studies

pytestmark = pytest.mark.slow

SMALL = ["--set", "as_vit.num_repeats=2", "--set", "as_vit.num_angles=3", "--set", "as_vit.ntk_batch_size=4"]
SMOKE = ["smoke", *SMALL]
AS_VIT = ["as_vit", "--img-size", "32", "--max-params-m", "3", *SMALL]


def run_study(folder: Path, *arguments: str):
    done = run_here(main, *arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def optuna_study(folder: Path, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=open_storage(folder / "runs" / "optuna.journal"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which as_vit has run to its end, in a process and on a cluster of its own."""
    folder = tmp_path_factory.mktemp("as_vit")
    done = run_command(*AS_VIT, "--trials", "5", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "output.txt").write_text(done.stdout)
    return folder


def test_topology_and_growth_run_to_the_end_and_agree_in_all_ledgers(finished: Path):
    topology, growth = (optuna_study(finished, f"as_vit/{phase}") for phase in ("topology", "growth"))
    assert len(topology.get_trials(states=(TrialState.COMPLETE,))) == 5
    grown = growth.get_trials(states=(TrialState.COMPLETE,))
    assert grown
    frame = load(RunPaths(finished / "runs").mlflow_uri, "as_vit")
    for study, phase in ((topology, "topology"), (growth, "growth")):
        values = {trial.number: trial.values[0] for trial in study.get_trials(states=(TrialState.COMPLETE,))}
        rows = frame[frame.phase == phase]
        assert {row.trial: row.length_distortion for row in rows.itertuples()}.items() <= values.items()


def test_grown_networks_tell_what_was_scored_from_what_is_reported(finished: Path):
    frame = load(RunPaths(finished / "runs").mlflow_uri, "as_vit")
    growth = frame[frame.phase == "growth"]
    assert (growth.proxy_digest != growth.digest).all()
    described = json.loads(run_here(main, "describe", growth.digest.iloc[0], "--json", cwd=finished).stdout)
    assert described["params"] == round(growth.params_m.iloc[0] * 1e6)
    assert growth.params_m.max() <= 3


def test_growth_starts_from_the_best_topology_and_yields_a_family_of_rising_size(finished: Path):
    from search.studies.as_vit import best_topology
    from space.families.as_vit import TOPOLOGY_AXES

    definition = studies.get("as_vit")(RunSettings(study="as_vit", runs=finished / "runs", img_size=32))
    best = best_topology(optuna_study(finished, "as_vit/topology"), definition.phase("topology").goals)
    grown = optuna_study(finished, "as_vit/growth").get_trials(states=(TrialState.COMPLETE,))
    assert all({axis: trial.params[axis] for axis in TOPOLOGY_AXES} == best.params for trial in grown)
    frame = load(RunPaths(finished / "runs").mlflow_uri, "as_vit")
    family = frame[frame.family_step.notna()].sort_values("family_step")
    assert len(family) >= 2
    assert family.params_m.is_monotonic_increasing


def test_the_leaderboard_is_printed_and_attached_to_the_parent_run(finished: Path):
    output = (finished / "output.txt").read_text()
    assert "length_distortion" in output
    client = mlflow_client(RunPaths(finished / "runs").mlflow_uri)
    experiment = client.get_experiment_by_name("as_vit")
    (parent,) = search_runs(client, [experiment.experiment_id], "tags.kind = 'invocation'")
    assert {artifact.path for artifact in client.list_artifacts(parent.info.run_id)} >= {
        "leaderboard.csv",
        "leaderboard.html",
        "leaderboard.png",
    }
    assert "|" in parent.data.tags["mlflow.note.content"]
    assert parent.info.status == "FINISHED"


@pytest.mark.usefixtures("serial_pool")
def test_running_the_same_command_again_changes_nothing(finished: Path):
    before = [trial.state for trial in optuna_study(finished, "as_vit/growth").trials]
    again = run_study(finished, *AS_VIT, "--trials", "5")
    assert "5/5 done" in again.stdout
    assert [trial.state for trial in optuna_study(finished, "as_vit/growth").trials] == before


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--img-size", "64"], "img_size was 32, now 64"),
        (["--set", "as_vit.num_angles=4"], "settings.num_angles was 3, now 4"),
        (["--seed", "5"], "seed was 0, now 5"),
    ],
)
def test_resuming_with_other_settings_is_refused_with_the_difference(finished: Path, flags: list[str], difference: str):
    refused = run_here(main, *AS_VIT, "--trials", "9", *flags, cwd=finished)
    assert refused.returncode == 2
    assert difference in refused.stderr


def test_resuming_with_another_space_is_refused(finished: Path):
    before = optuna.get_all_study_names(open_storage(finished / "runs" / "optuna.journal"))
    refused = run_here(main, "smoke", "--name", "as_vit", cwd=finished)
    assert refused.returncode == 2
    assert "'as_vit' is a study of 'as_vit', not of 'smoke'" in refused.stderr
    assert optuna.get_all_study_names(open_storage(finished / "runs" / "optuna.journal")) == before


def test_resuming_in_a_space_with_another_choice_is_refused_with_the_axis(tmp_path: Path):
    run = RunSettings(study="smoke", runs=tmp_path)
    (phase,) = studies.get("smoke")(run).phases
    storage = open_storage(tmp_path / "optuna.journal")
    open_phase("smoke/search", phase, run, "digits", storage)
    open_phase("smoke/search", phase, run, "digits", storage)
    axes = (dataclasses.replace(phase.space.axes[0], choices=(32, 48, 80)), *phase.space.axes[1:])
    changed = dataclasses.replace(phase, space=dataclasses.replace(phase.space, axes=axes))
    with pytest.raises(SettingsError, match=re.escape("space.axes.embed_dim.choices[2] was 64, now 80")):
        open_phase("smoke/search", changed, run, "digits", storage)


def test_a_space_with_conditions_on_several_values_can_be_resumed(tmp_path: Path):
    run = RunSettings(study="smoke", runs=tmp_path)
    (phase,) = studies.get("smoke")(run).phases
    axes = (*phase.space.axes[:-1], dataclasses.replace(phase.space.axes[-1], when=("pooling", ("gem", "mean"))))
    conditional = dataclasses.replace(phase, space=dataclasses.replace(phase.space, axes=axes))
    storage = open_storage(tmp_path / "optuna.journal")
    created, resumed = (open_phase("smoke/search", conditional, run, "digits", storage) for _ in range(2))
    assert created.user_attrs == resumed.user_attrs


def test_a_leaderboard_that_cannot_be_made_hides_no_interruption_and_comes_after_the_runs_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def statuses() -> dict[str, str]:
        client = mlflow_client(RunPaths(tmp_path).mlflow_uri)
        runs = search_runs(client, [client.get_experiment_by_name("smoke").experiment_id])
        return {run.data.tags["kind"]: run.info.status for run in runs}

    def attach(tracker: MlflowTracker) -> None:
        assert statuses() == {"trial": "KILLED", "invocation": "KILLED"}
        raise OSError("no space left for the figure")

    monkeypatch.setattr("search.service.attach_leaderboard", attach)
    monkeypatch.setattr("search.service.make_pool", lambda *arguments: InterruptedPool(num_jobs=0))
    settings = RunSettings(study="smoke", runs=tmp_path, num_trials=2)
    with pytest.raises(KeyboardInterrupt):
        search.service.run_study(settings, fresh=False, max_workers=None, ray_address="", command="", interruption=Interruption())
    assert "OSError: no space left for the figure" in capsys.readouterr().out


@pytest.mark.usefixtures("serial_pool")
def test_an_experiment_of_another_study_of_that_name_is_refused(tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_study(tmp_path, *SMOKE, "--trials", "2", "--tracking-uri", uri, "--runs", "a")
    refused = run_here(main, "smoke", "--trials", "3", "--seed", "7", "--tracking-uri", uri, "--runs", "b", cwd=tmp_path)
    assert refused.returncode == 2
    assert "records another study of that name" in refused.stderr
    assert len(load(uri, "smoke")) == 2


@pytest.mark.usefixtures("serial_pool")
def test_every_step_that_may_take_long_is_named_and_the_printed_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    named: list[str] = []
    monkeypatch.setattr("search.progress.waiting", lambda what, say: named.append(what) or contextlib.nullcontext())
    done = run_study(tmp_path, *SMOKE, "--trials", "3", "--runs", "my runs")
    (tmp_path / "elsewhere").mkdir()
    assert [what.split(" at ")[0].partition(" storage")[0] for what in named] == [
        "checking the settings and the data",
        "asking MLflow",
        "opening the Optuna",
        "opening the study in MLflow",
        "starting Ray",
        "ending what still runs",
        "closing the study in MLflow, with its leaderboard as table, page and figures",
    ]
    hints = re.findall(r"^all(?: of it)?: (.*)$", done.stdout, flags=re.MULTILINE)
    assert len(hints) == 2
    for hint in hints:
        shown = run_pasted(hint, cwd=tmp_path / "elsewhere")
        assert shown.returncode == 0, shown.stderr
        assert "3 measured" in shown.stdout


@pytest.mark.usefixtures("serial_pool")
def test_fresh_sets_the_old_study_aside_and_deletes_nothing(tmp_path: Path):
    run_study(tmp_path, *SMOKE, "--trials", "3")
    first = {trial.values[0] for trial in optuna_study(tmp_path, "smoke/search").trials}
    run_study(tmp_path, *SMOKE, "--trials", "2", "--seed", "1", "--fresh")
    names = optuna.get_all_study_names(open_storage(tmp_path / "runs" / "optuna.journal"))
    (archived,) = [name for name in names if name.startswith("smoke@")]
    assert {trial.values[0] for trial in optuna_study(tmp_path, archived).trials} == first
    assert len(optuna_study(tmp_path, "smoke/search").trials) == 2
    uri = RunPaths(tmp_path / "runs").mlflow_uri
    assert len(load(uri, archived.partition("/")[0])) == 3
    assert len(load(uri, "smoke")) == 2


def test_a_study_is_driven_alone_through_optuna(tmp_path: Path):
    settings = {"runs": tmp_path / "runs", "img_size": 32}
    study = search.open_study("smoke/search", **settings)
    study.optimize(search.objective("smoke/search", **settings), n_trials=3)
    loaded = optuna.load_study(study_name="smoke/search", storage=open_storage(tmp_path / "runs" / "optuna.journal"))
    assert [trial.values for trial in loaded.trials] == [trial.values for trial in study.trials]
    assert {"digest", "label", "length_distortion", "params_m"} <= loaded.trials[0].user_attrs["result"].keys()


@pytest.mark.usefixtures("serial_pool")
@pytest.mark.parametrize("strategy", ["random", "tpe", "nsga2", "policy_gradient", "policy_gradient_merit"])
def test_every_strategy_searches_the_smoke_space(tmp_path: Path, strategy: str):
    run_study(tmp_path, *SMOKE, "--trials", "4", "--strategy", strategy, "--max-params-m", "0.12")
    trials = optuna_study(tmp_path, "smoke/search").get_trials(states=(TrialState.COMPLETE,))
    assert len(trials) == 4
    assert all(trial.user_attrs["result"]["params_m"] <= 0.12 for trial in trials)


def test_options_of_a_study_are_settings_in_python_too(tmp_path: Path):
    settings = {"runs": tmp_path / "runs", "factor": ("optimizer",), "level": ("optimizer=lion",), "epochs": 1, "batch_size": 256}
    study = search.open_study("ablations/train", **settings)
    study.enqueue_trial({"factor": "optimizer", "optimizer": "lion", "seed": 0})
    study.optimize(search.objective("ablations/train", **settings), n_trials=1)
    assert study.trials[0].user_attrs["result"]["label"] == "optimizer=lion seed 0"
    with pytest.raises(ValueError, match="unknown setting 'epoch'"):
        search.open_study("ablations/train", runs=tmp_path, epoch=1)


def test_a_phase_that_needs_an_earlier_one_says_so_in_python(tmp_path: Path):
    settings = {"runs": tmp_path / "runs", "linear_probe": True}
    with pytest.raises(SettingsError, match="phase 'probe' needs backbone"):
        search.objective("ablations/probe", **settings)
    search.open_study("ablations/backbone", **settings)
    with pytest.raises(search.service.PhaseStopped, match="ablations/backbone has no complete trial"):
        search.objective("ablations/probe", **settings)

"""The MLflow ledger, on real stores: one run per trial, whatever dies in between."""

from __future__ import annotations

import dataclasses
import json
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from forked import Forked

import results.mlflow_store as mlflow_store
from results.mlflow_store import (
    MlflowTracker,
    archive_experiment,
    check_tracking,
    fetch_artifact,
    find_candidate,
    mlflow_client,
    read_artifact,
    search_runs,
)
from results.paths import RunPaths, without_password
from results.records import Failure, Measurement, Metric
from results.tracking import NullTracker, TrialRecord

OBJECTIVES = {"topology": [Metric("score", "maximize")]}
MEASURED = Measurement(
    values={"score": 0.1 + 0.2, "gmacs": 4.6},
    elapsed_s=1.5,
    device="cpu",
    versions={"torch": "2.13"},
    seed=3,
    num_threads=2,
    warnings=("odd",),
)
FAILED = Failure(kind="out_of_memory", message="needs 9 GB", traceback="Traceback ...\n", elapsed_s=2.0)


def trial(number: int, **changes) -> TrialRecord:
    record = TrialRecord(
        study_name="study",
        phase="topology",
        number=number,
        label=f"net {number}",
        digest=f"{number:016x}",
        params={"depth": 2, "mixer": "softmax"},
        candidate={"label": f"net {number}", "model": {"depth": 2}},
    )
    return dataclasses.replace(record, **changes)


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    found = RunPaths(tmp_path / "a folder")
    mlflow_store._create_sqlite_store(found.root / "mlflow.db")
    return found


def make(paths: RunPaths, **changes) -> MlflowTracker:
    arguments = {"invocation": {"command": "run study", "seed": "3"}, "objectives": OBJECTIVES, **changes}
    return MlflowTracker(paths.mlflow_uri, "study", artifact_root=paths.artifact_root, **arguments)


def runs(paths: RunPaths, kind: str = "trial", study: str = "study"):
    client = mlflow_client(paths.mlflow_uri)
    experiment = client.get_experiment_by_name(study)
    assert experiment is not None
    return search_runs(client, [experiment.experiment_id], f"tags.kind = '{kind}'")


def test_a_finished_trial_is_a_child_run_with_its_metrics_params_and_candidate(paths):
    tracker = make(paths)
    tracker.open(trial(4, proxy_digest="abc", reused_from=1))
    tracker.record(trial(4), MEASURED)
    tracker.close("FINISHED")
    (run,) = runs(paths)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"score": 0.1 + 0.2, "gmacs": 4.6, "elapsed_s": 1.5}
    assert run.data.params == {"depth": "2", "mixer": "softmax"}
    expected = {
        "mlflow.parentRunId": tracker.parent_run_id,
        "digest": f"{4:016x}",
        "phase": "topology",
        "trial": "4",
        "label": "net 4",
        "kind": "trial",
        "proxy_digest": "abc",
        "reused_from": "1",
    }
    assert expected.items() <= run.data.tags.items()
    assert [file.path for file in mlflow_client(paths.mlflow_uri).list_artifacts(run.info.run_id)] == ["candidate.json"]
    (parent,) = runs(paths, "invocation")
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"seed": "3"}
    assert parent.data.tags["command"] == "run study"


@pytest.mark.parametrize("outcome", [MEASURED, FAILED], ids=["measurement", "failure"])
def test_what_was_recorded_is_read_back_by_another_tracker(paths, outcome):
    first = make(paths)
    first.record(trial(0), outcome)
    second = make(paths)
    assert second.finished_outcome("topology", 0) == outcome
    assert second.finished_outcome("growth", 0) is None
    assert second.finished_outcome("topology", 1) is None


@pytest.mark.parametrize("num_params", [60, 250])
@pytest.mark.parametrize("outcome", [MEASURED, FAILED], ids=["measurement", "failure"])
def test_no_parameter_is_lost(paths, num_params, outcome):
    params = {f"kernel_{index}": index for index in range(num_params)}
    make(paths, invocation=params).record(trial(0, params=params), outcome)
    for kind in ("trial", "invocation"):
        (run,) = runs(paths, kind)
        assert run.data.params == {name: str(value) for name, value in params.items()}


def test_a_parameter_that_mlflow_cannot_hold_is_cut_and_kept_whole_as_an_artifact(paths):
    params = {"blocks": "3,4," * 5000, "depth": 2}
    make(paths, invocation=params).record(trial(0, params=params), MEASURED)
    for kind in ("trial", "invocation"):
        (run,) = runs(paths, kind)
        assert run.data.params == {"blocks": ("3,4," * 5000)[:499] + "…", "depth": "2"}
        assert json.loads(read_artifact(mlflow_client(paths.mlflow_uri), run, "params.json") or "") == params


def test_a_failure_has_its_kind_as_tag_and_its_traceback_as_artifact(paths):
    make(paths).record(trial(0), FAILED)
    (run,) = runs(paths)
    assert (run.info.status, run.data.tags["failure_kind"]) == ("FAILED", "out_of_memory")
    assert (paths.artifact_root / run.info.run_id / "artifacts" / "traceback.txt").read_text() == FAILED.traceback


def test_recording_again_changes_nothing(paths):
    tracker = make(paths)
    for recorder in (tracker, tracker, make(paths)):
        recorder.record(trial(0), MEASURED)
        recorder.open(trial(0))
        recorder.record(trial(0), FAILED)
    (run,) = runs(paths)
    assert run.info.status == "FINISHED"
    assert len(mlflow_client(paths.mlflow_uri).get_metric_history(run.info.run_id, "score")) == 1


def test_a_curve_does_not_hide_the_final_value(paths):
    tracker = make(paths)
    tracker.open(trial(0))
    for step in range(3):
        tracker.report(trial(0), "score", step, step)
    tracker.record(trial(0), MEASURED)
    (run,) = runs(paths)
    assert run.data.metrics["score"] == MEASURED.values["score"]
    history = mlflow_client(paths.mlflow_uri).get_metric_history(run.info.run_id, "curve/score")
    assert [(point.step, point.value) for point in history] == [(0, 0), (1, 1), (2, 2)]
    assert tracker.finished_outcome("topology", 0) == MEASURED


class Unread(Mapping[str, str]):
    """A candidate that `stop` interrupts when the tracker reads it: after metrics and files, before the end of the run."""

    def __init__(self, stop: Callable[[], object]):
        self.stop = stop

    def __iter__(self):
        self.stop()
        return iter(("label",))

    def __getitem__(self, key: str) -> str:
        return "net"

    def __len__(self) -> int:
        return 1


def interrupt() -> None:
    raise KeyboardInterrupt


def wait_to_be_killed() -> None:
    print("ready", flush=True)
    signal.pause()


def drive_until_killed(root: Path, moment: str) -> None:
    tracker = make(RunPaths(root))
    tracker.record(trial(0), MEASURED)
    tracker.open(trial(1))
    tracker.open(trial(2))
    if moment == "after the metrics":
        tracker.record(trial(1, candidate=Unread(wait_to_be_killed)), MEASURED)
    wait_to_be_killed()


@pytest.mark.parametrize("moment", ["while running", "after the metrics"])
def test_a_run_left_by_a_killed_driver_is_taken_up(paths, moment):
    driver = Forked(drive_until_killed, paths.root, moment, folder=paths.root)
    while driver.said != "ready\n":
        assert driver.is_running, driver.wait()
        time.sleep(0.05)
    driver.send(signal.SIGKILL)
    driver.wait()
    left = {run.data.tags["trial"]: run for run in runs(paths)}
    assert [left[number].info.status for number in "012"] == ["FINISHED", "RUNNING", "RUNNING"]

    tracker = make(paths)
    assert {run.info.status for run in runs(paths, "invocation")} == {"KILLED", "RUNNING"}
    assert tracker.finished_outcome("topology", 1) is None
    tracker.open(trial(1))
    tracker.record(trial(1), MEASURED)
    tracker.record(trial(3), MEASURED)
    tracker.close("FINISHED")

    now = {run.data.tags["trial"]: run for run in runs(paths)}
    assert len(runs(paths)) == len(now) == 4
    assert {number: run.info.run_id for number, run in now.items() if number in left} == {n: run.info.run_id for n, run in left.items()}
    assert [now[number].info.status for number in "0123"] == ["FINISHED", "FINISHED", "KILLED", "FINISHED"]
    assert now["1"].data.tags["mlflow.parentRunId"] == tracker.parent_run_id
    assert now["1"].data.metrics == now["0"].data.metrics
    assert len(mlflow_client(paths.mlflow_uri).get_metric_history(now["1"].info.run_id, "score")) == 1
    assert {run.info.status for run in runs(paths, "invocation")} == {"KILLED", "FINISHED"}


def test_a_trial_interrupted_by_close_goes_on_in_its_own_run(paths):
    first = make(paths)
    first.open(trial(7))
    first.close("KILLED")
    assert [run.info.status for run in runs(paths)] == ["KILLED"]
    make(paths).record(trial(7), MEASURED)
    assert [run.info.status for run in runs(paths)] == ["FINISHED"]


def test_no_run_is_missed_beyond_a_page(paths, monkeypatch):
    monkeypatch.setattr(mlflow_store, "PAGE_SIZE", 3)
    first = make(paths)
    for number in range(10):
        first.open(trial(number))
    assert len(runs(paths)) == 10
    make(paths).close("FINISHED")
    assert {run.info.status for run in runs(paths)} == {"KILLED"}


def test_numbers_of_any_length_are_found(paths):
    first = make(paths)
    for number in (9, 10, 100):
        first.record(trial(number), MEASURED)
    second = make(paths)
    for number in (100, 10, 9):
        second.record(trial(number), MEASURED)
    assert len(runs(paths)) == 3


def test_a_family_is_marked_and_marked_anew(paths):
    tracker = make(paths)
    for number in range(4):
        tracker.record(trial(number), MEASURED)
    tracker.mark_family("topology", [0, 2])
    tracker.mark_family("topology", [2, 3])
    assert {run.data.tags["trial"]: run.data.tags.get("family_step") for run in runs(paths)} == {"0": None, "1": None, "2": "0", "3": "1"}


def test_long_warnings_and_paths_fit(paths):
    outcome = dataclasses.replace(MEASURED, warnings=("a damaged file",) * 5000)
    tracker = make(paths)
    tracker.record(trial(0, label="x" * 9000), outcome)
    found = tracker.finished_outcome("topology", 0)
    assert isinstance(found, Measurement)
    assert found.values == outcome.values
    assert 0 < len(found.warnings) < 5000


def test_archiving_renames_and_a_fresh_study_starts_empty(paths):
    make(paths).record(trial(0), MEASURED)
    assert archive_experiment(paths.mlflow_uri, "study", "study@2026-11-21")
    assert not archive_experiment(paths.mlflow_uri, "unknown", "x")
    fresh = make(paths)
    assert fresh.finished_outcome("topology", 0) is None
    assert len(runs(paths, study="study@2026-11-21")) == 1
    with pytest.raises(ValueError, match="has an experiment of that name"):
        archive_experiment(paths.mlflow_uri, "study", "study@2026-11-21")


def test_a_candidate_is_found_by_the_beginning_of_its_digest(paths):
    tracker = make(paths)
    for number, digest in enumerate(["abcdef0000000001", "abcdef0000000002", "1234567890abcdef"]):
        tracker.record(trial(number, digest=digest), MEASURED)
    assert find_candidate(paths.mlflow_uri, "1234") == trial(2).candidate
    assert find_candidate(paths.mlflow_uri, "ABCDEF0000000002") == trial(1).candidate
    assert find_candidate(paths.mlflow_uri, "999999") is None
    with pytest.raises(ValueError, match="ambiguous: abcdef0000000001, abcdef0000000002"):
        find_candidate(paths.mlflow_uri, "abcd")
    with pytest.raises(ValueError, match="at least 4 hexadecimal"):
        find_candidate(paths.mlflow_uri, "123")


def test_nothing_is_created_by_looking(tmp_path):
    uri = RunPaths(tmp_path / "runs").mlflow_uri
    check_tracking(uri)
    assert find_candidate(uri, "abcdef12") is None
    assert not archive_experiment(uri, "study", "other")
    assert list(tmp_path.iterdir()) == []


def test_a_store_appears_whole(tmp_path, creates_store):
    path = tmp_path / "runs" / "mlflow.db"
    creates_store(path)
    assert [file.name for file in path.parent.iterdir()] == ["mlflow.db"]
    with sqlite3.connect(path) as database:
        assert database.execute("select count(*) from alembic_version").fetchone() == (1,)


def test_an_unusable_store_or_server_is_named_in_one_line(tmp_path):
    (tmp_path / "text.db").write_text("not a database, but long enough to be looked at" * 10)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        server = f"http://127.0.0.1:{unused.getsockname()[1]}"
    for uri, reason in {
        server: "connection refused",
        f"sqlite:///{tmp_path}/text.db": "file is not a database",
        f"sqlite:///{tmp_path}/text.db/mlflow.db": "not a folder",
        str(tmp_path): "is not supported",
    }.items():
        with pytest.raises(ValueError, match=reason) as caught:
            check_tracking(uri)
        assert "\n" not in str(caught.value)


def test_a_password_is_not_printed():
    assert without_password("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"


def test_a_null_tracker_keeps_nothing():
    tracker = NullTracker()
    tracker.open(trial(0))
    tracker.report(trial(0), "loss", 1.0, 0)
    tracker.record(trial(0), MEASURED)
    tracker.mark_family("topology", [0])
    tracker.close("FINISHED")
    assert tracker.finished_outcome("topology", 0) is None


def files(paths, run) -> dict[str, str]:
    root = paths.artifact_root / run.info.run_id / "artifacts"
    return {str(file.relative_to(root)): file.read_text() for file in root.rglob("*") if file.is_file() and file.name != "candidate.json"}


def leave_files(folder: Path) -> Path:
    (folder / "plots").mkdir(parents=True)
    (folder / "predictions.npz").write_text("numbers")
    (folder / "plots" / "curve.svg").write_text("<svg/>")
    return folder


def test_the_files_of_a_trial_are_artifacts_of_its_run(paths, tmp_path):
    tracker = make(paths)
    tracker.record(trial(0), MEASURED, leave_files(tmp_path / "left"))
    tracker.record(trial(1), MEASURED, tmp_path / "left nothing")
    first, second = sorted(runs(paths), key=lambda run: run.data.tags["trial"])
    assert files(paths, first) == {"predictions.npz": "numbers", "plots/curve.svg": "<svg/>"}
    assert files(paths, second) == {}


def test_files_go_to_a_store_that_is_no_local_folder_too(paths, tmp_path):
    # MLflow itself writes to a folder named with a host; the tracker, which takes the short way to local ones, asks it to.
    location = f"file://127.0.0.1{paths.artifact_root}"
    mlflow_client(paths.mlflow_uri).create_experiment("study", location)
    tracker = make(paths)
    tracker.record(trial(0), MEASURED, leave_files(tmp_path / "left"))
    (run,) = runs(paths)
    assert (run.info.artifact_uri or "").startswith(location)
    assert files(paths, run) == {"predictions.npz": "numbers", "plots/curve.svg": "<svg/>"}
    assert fetch_artifact(mlflow_client(paths.mlflow_uri), run, "predictions.npz", tmp_path)
    assert (tmp_path / "predictions.npz").read_text() == "numbers"
    assert not fetch_artifact(mlflow_client(paths.mlflow_uri), run, "robustness.npz", tmp_path)


def test_a_crash_between_the_files_and_the_end_of_the_run_is_made_good(paths, tmp_path):
    left = leave_files(tmp_path / "left")
    with pytest.raises(KeyboardInterrupt):
        make(paths).record(trial(0, candidate=Unread(interrupt)), MEASURED, left)
    (run,) = runs(paths)
    assert (run.info.status, run.data.metrics["score"]) == ("RUNNING", MEASURED.values["score"])
    assert files(paths, run) == {"predictions.npz": "numbers", "plots/curve.svg": "<svg/>"}
    make(paths).record(trial(0), MEASURED, left)
    (run,) = runs(paths)
    assert run.info.status == "FINISHED"
    assert files(paths, run) == {"predictions.npz": "numbers", "plots/curve.svg": "<svg/>"}


def test_points_arrive_while_the_trial_runs(paths, monkeypatch):
    tracker = make(paths)
    tracker.open(trial(0))
    for name in ("train_loss", "val_top1_pct"):
        tracker.report(trial(0), name, 1.0, 0)
    tracker.flush()
    (run,) = runs(paths)
    assert not run.data.metrics
    monkeypatch.setattr(mlflow_store, "FLUSH_INTERVAL_S", 0.0)
    tracker.flush()
    (run,) = runs(paths)
    assert run.info.status == "RUNNING"
    assert run.data.metrics == {"curve/train_loss": 1.0, "curve/val_top1_pct": 1.0}


def test_a_run_that_was_open_before_learns_whose_measurement_it_was_given(paths):
    first = make(paths)
    first.open(trial(1))
    first.close("KILLED")
    make(paths).record(trial(1, reused_from=0, recipe_digest="abc"), MEASURED)
    (run,) = runs(paths)
    assert {"reused_from": "0", "recipe_digest": "abc"}.items() <= run.data.tags.items()


def test_designs_stand_in_the_parent_run_before_any_trial(paths):
    make(paths, designs={"train": {"name": "ablations"}})
    (parent,) = runs(paths, "invocation")
    stored = read_artifact(mlflow_client(paths.mlflow_uri), parent, "designs.json")
    assert json.loads(stored or "") == {"train": {"name": "ablations"}}
    assert parent.data.tags["designs"] == "train"

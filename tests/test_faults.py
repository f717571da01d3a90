"""Whatever dies, no trial is lost, none is told twice, every run is closed - against real processes."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import faulty
import optuna
import pytest
from conftest import REPOSITORY
from faulty_driver import drive
from forked import Forked
from optuna.trial import FrozenTrial, TrialState

from results import mlflow_store
from results.mlflow_store import mlflow_client, search_runs
from results.paths import RunPaths
from results.records import Failure, Measurement
from search.storage import open_storage
from space.search_space import Candidate
from workers.evaluate import Job
from workers.evaluator import Call
from workers.pool import Finished, RayPool, Reported
from workers.resources import Resources

pytestmark = pytest.mark.slow


def driver(runs: Path, *flags: str, pool: Literal["ray", "serial"], die_at: tuple[str, int] | None = None) -> Forked:
    """A driver of the study `faulty` in a process of its own; with the pool "serial" its trials run there, too."""
    mlflow_store._create_sqlite_store(runs / "mlflow.db")
    paths = {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"}
    return Forked(drive, ["faulty", "--runs", str(runs), *flags], pool, die_at, folder=Path(tempfile.mkdtemp(dir=runs.parent)), env=paths)


def settings_flags(**settings: object) -> list[str]:
    return [word for name, value in settings.items() for word in ("--set", f"faulty.{name}={value}")]


def told(runs: Path) -> list[FrozenTrial]:
    return optuna.load_study(study_name="faulty/search", storage=open_storage(runs / "optuna.journal")).trials


def events(log: Path, event: str) -> Counter[int]:
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(int(line.split()[1]) for line in lines if line.startswith(event))


def check_ledgers(runs: Path, num_complete: int) -> None:
    """Optuna and MLflow agree: so many complete trials, each with one finished run, and nothing left open."""
    trials = told(runs)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * num_complete
    client = mlflow_client(RunPaths(runs).mlflow_uri)
    experiment = client.get_experiment_by_name("faulty")
    recorded = search_runs(client, [experiment.experiment_id])
    assert not [run for run in recorded if run.info.status == "RUNNING"]
    by_trial = {int(run.data.tags["trial"]): run for run in recorded if run.data.tags["kind"] == "trial"}
    assert Counter(run.data.tags["kind"] for run in recorded)["trial"] == num_complete
    assert {number: run.data.metrics["score"] for number, run in by_trial.items()} == {t.number: t.value for t in trials}


def wait_until(condition, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the driver made no progress"
        time.sleep(0.05)


def test_a_driver_killed_twice_goes_on_to_exactly_the_asked_trials(tmp_path: Path):
    runs, log = tmp_path / "runs", tmp_path / "log"
    flags = ["--trials", "24", "--workers", "2", *settings_flags(log=log, work_s=0.15)]
    for threshold in (4, 10):
        killed = driver(runs, *flags, pool="ray")
        wait_until(lambda threshold=threshold: sum(events(log, "end").values()) >= threshold)
        killed.send(signal.SIGKILL)
        assert killed.wait().returncode == -signal.SIGKILL
        done = {trial.number for trial in told(runs) if trial.state.is_finished()}
        started_before = events(log, "start")
    finished = driver(runs, *flags, pool="ray").wait()
    assert finished.returncode == 0, finished.stderr
    check_ledgers(runs, 24)
    assert not [number for number in done if events(log, "start")[number] > started_before[number]]


@pytest.mark.parametrize("write", ["outcome", "mlflow"])
def test_a_driver_killed_between_two_ledgers_repeats_no_measurement(tmp_path: Path, write: str):
    runs, log = tmp_path / "runs", tmp_path / "log"
    flags = ["--trials", "6", *settings_flags(log=log)]
    assert driver(runs, *flags, pool="serial", die_at=(write, 3)).wait().returncode == -signal.SIGKILL
    measured = events(log, "end")
    (in_limbo,) = [trial.number for trial in told(runs) if trial.state == TrialState.RUNNING and measured[trial.number]]
    resumed = driver(runs, *flags, pool="serial").wait()
    assert resumed.returncode == 0, resumed.stderr
    check_ledgers(runs, 6)
    assert events(log, "end")[in_limbo] == measured[in_limbo]


def test_a_lost_outcome_file_is_told_from_the_finished_run(tmp_path: Path):
    runs, log = tmp_path / "runs", tmp_path / "log"
    flags = ["--trials", "4", *settings_flags(log=log)]
    driver(runs, *flags, pool="serial", die_at=("mlflow", 2)).wait()
    before = events(log, "end")
    (limbo,) = [trial.number for trial in told(runs) if trial.state == TrialState.RUNNING and before[trial.number]]
    (RunPaths(runs).workdir("faulty", "search", limbo) / "outcome.json").unlink()
    resumed = driver(runs, *flags, pool="serial").wait()
    assert resumed.returncode == 0, resumed.stderr
    check_ledgers(runs, 4)
    assert events(log, "end")[limbo] == 1


def test_a_torn_journal_is_mended_and_the_run_goes_on(tmp_path: Path):
    runs = tmp_path / "runs"
    assert driver(runs, "--trials", "3", pool="serial").wait().returncode == 0
    journal = runs / "optuna.journal"
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 4, "worker_')
    second = driver(runs, "--trials", "5", pool="serial").wait()
    assert second.returncode == 0, second.stderr
    check_ledgers(runs, 5)


def test_a_second_driver_is_refused_and_told_who_holds_the_study(tmp_path: Path, cluster: Any):
    runs, log = tmp_path / "runs", tmp_path / "log"
    flags = ["--trials", "500", "--ray-address", cluster.address, *settings_flags(log=log, work_s=0.2)]
    first = driver(runs, *flags, pool="ray")
    try:
        wait_until(lambda: sum(events(log, "start").values()) >= 1)
        second = driver(runs, *flags, pool="ray").wait()
        assert second.returncode == 2
        assert f"is being run by process {first.pid}" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        # Ray has a handler of its own for this signal, which must not replace the driver's.
        first.send(signal.SIGTERM)
        stopped = first.wait()
    assert stopped.returncode == 130
    assert "the same command goes on from there" in stopped.stderr


def test_a_study_survives_trials_that_hang(tmp_path: Path, cluster: Any):
    runs = tmp_path / "runs"
    flags = ["--trials", "4", "--time-limit-s", "4", "--ray-address", cluster.address, "--workers", "2"]
    flags += settings_flags(behaviour="hang", every=3)
    done = driver(runs, *flags, pool="ray").wait()
    assert done.returncode == 0, done.stderr
    states = Counter(trial.state for trial in told(runs))
    assert states[TrialState.COMPLETE] == 4
    hung = [trial for trial in told(runs) if trial.state == TrialState.FAIL]
    assert {trial.user_attrs["result"]["failure"] for trial in hung} == {"timeout"}
    assert all(trial.params["num_classes"] % 3 == 0 for trial in hung)
    client = mlflow_client(RunPaths(runs).mlflow_uri)
    failed = search_runs(client, [client.get_experiment_by_name("faulty").experiment_id], "attributes.status = 'FAILED'")
    assert {int(run.data.tags["trial"]) for run in failed} == {trial.number for trial in hung}
    assert {run.data.tags["failure_kind"] for run in failed} == {"timeout"}


def test_a_study_survives_workers_that_are_killed(tmp_path: Path, cluster: Any):
    runs, log = tmp_path / "runs", tmp_path / "log"
    flags = ["--trials", "5", "--ray-address", cluster.address, "--workers", "2"]
    flags += settings_flags(behaviour="die_once", every=2, log=log)
    done = driver(runs, *flags, pool="ray").wait()
    assert done.returncode == 0, done.stderr
    check_ledgers(runs, 5)
    starts = events(log, "start")
    assert {trial.number for trial in told(runs) if starts[trial.number] == 2} == {
        trial.number for trial in told(runs) if trial.params["num_classes"] % 2 == 0
    }


def test_ten_failures_in_a_row_end_the_command_with_the_traceback(tmp_path: Path):
    done = driver(tmp_path / "runs", "--trials", "30", *settings_flags(behaviour="raise"), pool="serial").wait()
    assert done.returncode == 1
    assert "this model cannot be measured" in done.stderr
    assert "misbehave" in done.stderr
    failed = [trial for trial in told(tmp_path / "runs") if trial.state == TrialState.FAIL]
    assert len(failed) == 10


def job(folder: Path, behaviour: faulty.Behaviour, number: int = 0, time_limit_s: float | None = None, until: str = "") -> Job:
    return Job(
        trial=number,
        candidate=Candidate(model=faulty.classifier(number + 1)),
        calls=(Call("faulty", faulty.FaultySettings(behaviour=behaviour, log=str(folder / "log"), until=until)),),
        seed=0,
        data="digits",
        data_fingerprint="digits",
        workdir=folder / str(number),
        time_limit_s=time_limit_s,
    )


def outcomes(pool: RayPool, num_jobs: int, timeout_s: float = 240.0) -> dict[int, Measurement | Failure]:
    found: dict[int, Measurement | Failure] = {}
    deadline = time.monotonic() + timeout_s
    while len(found) < num_jobs:
        assert time.monotonic() < deadline, f"only {found} after {timeout_s} s"
        for event in pool.poll(0.5):
            if isinstance(event, Finished):
                assert event.trial not in found, "a job was reported finished twice"
                found[event.trial] = event.outcome
    assert pool.poll(0) == []
    return found


def test_a_worker_that_dies_is_replaced_and_its_job_done_again(pool: RayPool, tmp_path: Path):
    pool.submit(job(tmp_path, "die_once"))
    assert outcomes(pool, 1)[0].values == {"score": 1.0}
    assert events(tmp_path / "log", "start")[0] == 2


def test_a_job_that_kills_every_worker_is_told_lost(pool: RayPool, tmp_path: Path):
    pool.submit(job(tmp_path, "die_always"))
    lost = outcomes(pool, 1)[0]
    assert isinstance(lost, Failure)
    assert lost.kind == "lost"
    assert events(tmp_path / "log", "start")[0] == 1 + pool.max_losses


def test_a_job_past_its_time_limit_is_cancelled_and_its_slot_is_free_again(pool: RayPool, tmp_path: Path):
    for number in range(pool.capacity(Resources())):
        pool.submit(job(tmp_path, "hang", number, time_limit_s=1.0))
    found = outcomes(pool, pool.capacity(Resources()))
    assert {outcome.kind for outcome in found.values()} == {"timeout"}
    pool.submit(job(tmp_path, "work", 7))
    assert outcomes(pool, 1)[7].values == {"score": 8.0}


def test_exhausted_memory_is_told_and_the_worker_goes_on(pool: RayPool, tmp_path: Path):
    pool.submit(job(tmp_path, "exhaust"))
    failure = outcomes(pool, 1)[0]
    assert isinstance(failure, Failure)
    assert failure.kind == "out_of_memory"
    pool.submit(job(tmp_path, "work", 1))
    assert outcomes(pool, 1)[1].values == {"score": 2.0}


def test_a_process_with_a_poisoned_device_gets_no_second_job(pool: RayPool, tmp_path: Path):
    num_jobs = 4
    for number in range(num_jobs):
        pool.submit(job(tmp_path, "poison_device", number))
        assert outcomes(pool, 1)[number].kind == "error"
    pids = [line.split()[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(set(pids)) == num_jobs


def test_the_death_of_the_mailbox_loses_no_job(pool: RayPool, tmp_path: Path):
    import ray

    pool.submit(job(tmp_path, "work", until=str(tmp_path / "end")))
    wait_until(lambda: events(tmp_path / "log", "start")[0] == 1)
    ray.kill(pool._mailbox, no_restart=False)
    (tmp_path / "end").touch()
    assert outcomes(pool, 1)[0].values == {"score": 1.0}


def test_curves_reach_the_driver_while_the_job_runs(pool: RayPool, tmp_path: Path):
    pool.submit(job(tmp_path, "hang"))
    seen: list = []
    wait_until(lambda: bool(seen.extend(pool.poll(0.2)) or seen))
    assert seen == [Reported(0, "warming_up", 1.0, 0)]


def test_jobs_of_a_node_that_leaves_are_done_on_another(cluster, pool: RayPool, tmp_path: Path):
    node = cluster.add_node(num_cpus=2)
    wait_until(lambda: pool.capacity(Resources()) == 4)
    for number in range(4):
        pool.submit(job(tmp_path, "work", number, until=str(tmp_path / "end")))
    log = tmp_path / "log"
    wait_until(lambda: len(events(log, "start")) == 4)
    cluster.remove_node(node, allow_graceful=False)
    wait_until(lambda: pool.capacity(Resources()) == 2)
    (tmp_path / "end").touch()
    found = outcomes(pool, 4)
    assert {number: outcome.values["score"] for number, outcome in found.items()} == {n: n + 1.0 for n in range(4)}
    assert sum(events(log, "start").values()) >= 5

"""A whole run of a study: check everything, open the ledgers, run the phases, show the leaderboard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage

from results.leaderboard import attach_leaderboard, print_results
from results.paths import RunPaths
from results.tracking import MlflowTracker, archive_experiment, check_tracking
from search.lock import Hold, Lease, LockFile
from search.loop import Measuring, PhaseLoop, PhaseStopped, make_objective
from search.progress import Progress
from search.storage import open_storage
from search.strategy import strategies
from search.study import Phase, RunSettings, Study, open_phase, studies
from space.registry import unknown_name
from workers.data import check_source, fingerprint
from workers.pool import Pool, RayPool, SerialPool

__all__ = ["Interrupted", "PhaseStopped", "objective", "open_study", "run_study"]

LEADERBOARD_ROWS = 10

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Interrupted(RuntimeError):
    """The user stopped the run; the message says how to go on."""


def run_study(settings: RunSettings, *, fresh: bool, max_workers: int | None, ray_address: str, command: str) -> None:
    """Run or resume the study to its end and print its leaderboard.

    Raises ValueError, before any work, for whatever a user can have got wrong; PhaseStopped when the work itself cannot
    go on; Interrupted when the user stops it. What was measured is kept in each case.
    """
    opened = _Opened(settings)
    progress = Progress()
    progress.say(f"results in {opened.paths.root} (Optuna: {opened.storage_location}; MLflow: {opened.tracking_uri})")
    check_tracking(opened.tracking_uri)
    with _driving(opened, fresh) as (hold, phases):
        pool = _make_pool(opened.study, settings, max_workers, ray_address)
        try:
            tracker = MlflowTracker(
                uri=opened.tracking_uri,
                study=settings.study_name,
                artifact_root=opened.artifact_root,
                invocation={"command": command, "seed": str(settings.seed), "data": settings.data},
                objectives={phase.name: list(phase.goals) for phase in opened.study.phases},
            )
            status = "KILLED"
            try:
                for phase in opened.study.phases:
                    PhaseLoop(
                        study_name=settings.study_name,
                        phase=phase,
                        study=phases[phase.name],
                        measuring=opened.measuring(phase),
                        pool=pool,
                        tracker=tracker,
                        progress=progress,
                        hold=hold,
                        proposer=phase.propose(phases) if phase.propose else None,
                    ).run()
                status = "FINISHED"
            except PhaseStopped:
                status = "FAILED"
                raise
            except KeyboardInterrupt:
                raise Interrupted("interrupted; what was measured is kept, and the same command goes on from there") from None
            finally:
                results = attach_leaderboard(tracker)
                tracker.close(status)
        finally:
            pool.shutdown()
    print_results(results, LEADERBOARD_ROWS)
    print(f"all of it: python -m results.leaderboard {settings.study_name}, or MLflow at {opened.tracking_uri}")


def open_study(name: str, **settings: Any) -> optuna.Study:
    """The Optuna study of a phase, `STUDY/PHASE`, created if need be, with the phase's strategy as its sampler.

    `settings` are the fields of `RunSettings`, `runs` among them. Raises ValueError when the study was created with
    other settings.
    """
    opened, phase = _open_for_user(name, settings)
    return open_phase(f"{opened.settings.study_name}/{phase.name}", phase, opened.settings, opened.data_fingerprint, opened.storage())


def objective(name: str, **settings: Any) -> Callable[[optuna.Trial], float | tuple[float, ...]]:
    """The objective of the phase `STUDY/PHASE` for `study.optimize`: measures in this process, without Ray or MLflow."""
    opened, phase = _open_for_user(name, settings)
    return make_objective(phase, opened.measuring(phase))


def _open_for_user(name: str, settings: Mapping[str, Any]) -> tuple[_Opened, Phase]:
    method, _, phase = name.partition("/")
    runs = Path(settings.get("runs", "runs")).expanduser().absolute()
    opened = _Opened(RunSettings(**{**settings, "study": method, "runs": runs}))
    return opened, opened.study.phase(phase)


class _Opened:
    """A study whose settings were all checked, and where its things lie. Nothing is created yet."""

    def __init__(self, settings: RunSettings):
        self.settings = settings
        self.study: Study = studies.get(settings.study)(settings)
        used = {call.name for phase in self.study.phases for call in phase.evaluators}
        for name in settings.evaluator_settings:
            if name not in used:
                raise unknown_name("evaluator", name, used, "--set")
        for phase in self.study.phases:
            if phase.strategy:
                strategies.get(phase.strategy)
            phase.budget.check_reachable(phase.space)
        if any(call.evaluator.uses_data for phase in self.study.phases for call in phase.evaluators):
            check_source(settings.data)
        self.data_fingerprint = fingerprint(settings.data)
        self.paths = RunPaths(settings.runs)
        self.storage_location = settings.storage or str(self.paths.journal)
        self.tracking_uri = settings.tracking_uri or self.paths.mlflow_uri
        self.artifact_root = None if settings.tracking_uri else self.paths.artifact_root

    def storage(self) -> BaseStorage:
        return open_storage(self.storage_location)

    def measuring(self, phase: Phase) -> Measuring:
        settings = self.settings
        return Measuring(
            seed=settings.seed,
            data=settings.data,
            data_fingerprint=self.data_fingerprint,
            workdir=lambda number: self.paths.workdir(settings.study_name, phase.name, number),
            gpus=settings.gpus,
            time_limit_s=settings.time_limit_s,
        )


@contextmanager
def _driving(opened: _Opened, fresh: bool) -> Iterator[tuple[Hold, dict[str, optuna.Study]]]:
    """Hold the study against other drivers, with the Optuna study of every phase open."""
    name = opened.settings.study_name
    on_common_disk = "://" not in opened.storage_location
    hold: Hold | None = LockFile(opened.paths.lock(name), name) if on_common_disk else None
    try:
        storage = opened.storage()
        if fresh:
            _archive(opened, storage)
        phases = {
            phase.name: open_phase(f"{name}/{phase.name}", phase, opened.settings, opened.data_fingerprint, storage)
            for phase in opened.study.phases
        }
        hold = hold or Lease(phases[opened.study.phases[0].name])
        yield hold, phases
    finally:
        if hold is not None:
            hold.release()


def _archive(opened: _Opened, storage: BaseStorage) -> None:
    """Give the study's things a dated name in every ledger, so that the name is free; deletes nothing that was measured."""
    name = opened.settings.study_name
    archived = f"{name}@{time.strftime('%Y%m%d-%H%M%S')}"
    for study_name in optuna.get_all_study_names(storage):
        if study_name.rpartition("/")[0] == name:
            copy = f"{archived}/{study_name.rpartition('/')[2]}"
            optuna.copy_study(from_study_name=study_name, from_storage=storage, to_storage=storage, to_study_name=copy)
            optuna.delete_study(study_name=study_name, storage=storage)
    archive_experiment(opened.tracking_uri, name, archived)
    work = opened.paths.study_dir(name)
    if work.exists():
        work.rename(opened.paths.study_dir(archived))


def _make_pool(study: Study, settings: RunSettings, max_workers: int | None, ray_address: str) -> Pool:
    needs = [call.evaluator for phase in study.phases for call in phase.evaluators]
    if all(need.is_free for need in needs):
        return SerialPool()
    return RayPool(
        address=ray_address,
        cpus=max(need.cpus for need in needs),
        gpus=max(settings.gpus, *(need.gpus for need in needs)),
        memory_mb=max(need.memory_mb for need in needs),
        max_workers=max_workers,
    )

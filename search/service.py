"""A whole run of a study: check everything, open the ledgers, run the phases, show the leaderboard."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage

from results.attachments import attach_leaderboard
from results.columns import terminal_width
from results.mlflow_store import MlflowTracker, check_tracking
from results.mlflow_views import how_to_browse
from results.paths import RunPaths, journal_lock, without_password
from results.text import print_answer, print_effects, print_results
from search.archiving import Archiving
from search.interruption import Interruption
from search.lock import Hold, Lease, LockFile, StudyIsDriven
from search.loop import PhaseLoop
from search.measuring import Measuring, needed_trials
from search.phase_objective import make_objective
from search.preparation import announcements, data_summary, fitted, wrapped
from search.progress import Progress
from search.registration import register
from search.storage import open_storage
from search.strategy import strategies
from search.study import IDENTITY_ATTRIBUTE, Phase, PhaseStopped, RunSettings, SettingsError, Study, open_phase, studies
from space.registry import unknown_name
from workers.data import check_source, fingerprint
from workers.evaluate import subject_of
from workers.evaluator import EarlierTrial
from workers.pool import Pool, PoolError, RayPool, SerialPool

__all__ = ["PhaseStopped", "objective", "open_study", "run_study"]

LEADERBOARD_ROWS = 10
STUDY_NAME = r"[\w.+=-]+"

optuna.logging.set_verbosity(optuna.logging.WARNING)


def run_study(
    settings: RunSettings,
    *,
    fresh: bool,
    max_workers: int | None,
    ray_address: str,
    command: str,
    interruption: Interruption,
    place: str = "",
    as_json: bool = False,
) -> None:
    """Run or resume the study to its end, and print the answer to its question if it has one, else its leaderboard.

    `place` are the flags by which other commands find it. With `as_json` the last line of output is the result as JSON.

    Raises ValueError, before any work, for whatever a user can have got wrong; PhaseStopped when the work itself cannot
    go on. However it ends, what was measured is kept.
    """
    progress = Progress()
    with progress.waiting("checking the settings and the data"):
        plan = Plan(settings, fresh=fresh)
        summary = data_summary(plan.study, plan.settings)
    notes = map(wrapped, plan.study.notes)
    for line in [*([summary] if summary else []), *announcements(plan.study, plan.settings, given=settings), *notes]:
        progress.say(line)
    with progress.waiting(f"asking MLflow at {plan.shown_tracking}"):
        check_tracking(plan.tracking_uri)
    with driving(plan, fresh, progress) as (hold, storage, phases):
        for phase, design in plan.study.designs.items():
            for line in register(phases[phase], design):
                progress.say(line)
        with progress.waiting(f"opening the study in MLflow at {plan.shown_tracking}"):
            tracker = MlflowTracker(
                uri=plan.tracking_uri,
                study_name=settings.study_name,
                study_id=next(iter(phases.values())).user_attrs[IDENTITY_ATTRIBUTE],
                artifact_root=plan.artifact_root,
                invocation={"command": command, **_shown_settings(plan.settings), "data_summary": summary},
                objectives={phase.name: list(phase.goals) for phase in plan.study.phases},
                measured={phase.name: list(phase.metrics) for phase in plan.study.phases},
                designs=plan.designs(),
                question=plan.study.question.to_json() if plan.study.question else None,
            )
        try:
            with _open_pool(plan, max_workers, ray_address, progress) as pool:
                for phase in plan.study.phases:
                    for resources in phase.all_resources(plan.settings):
                        pool.check(resources)
                for phase in plan.study.phases:
                    _run_phase(plan, phase, phases, storage, pool, tracker, progress, hold, interruption)
        except BaseException as error:
            _end_early(tracker, error, progress)
            raise
        with progress.waiting("closing the study in MLflow, with its leaderboard as table, page and figures"):
            tracker.close("FINISHED")
            results = attach_leaderboard(tracker)
    if results.answer:
        print_answer(results)
        print_effects(results, place, width=terminal_width())
    else:
        print_results(results, LEADERBOARD_ROWS, place, width=terminal_width())
    print(f"all of it: python -m results.leaderboard {settings.study_name}{place}")
    for line in how_to_browse(plan.tracking_uri, tracker.view_addresses):
        print(line)
    if as_json:
        print(json.dumps(results.summary))


def _shown_settings(settings: RunSettings) -> dict[str, str]:
    """The settings of a run as the parameters of its parent run in MLflow, without those that say where things are stored."""
    elsewhere = {"runs", "name", "storage", "tracking_uri", "defaults", "budget", "options", "evaluator_settings"}
    plain = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in elsewhere}
    own = {} if settings.options is None else {field.name: getattr(settings.options, field.name) for field in fields(settings.options)}
    chosen = {f"{name}.{key}": text for name, texts in settings.evaluator_settings.items() for key, text in texts.items()}
    shown = {**plain, "budget": str(settings.budget) or None, **own, **chosen}
    return {name: ", ".join(value) if isinstance(value, tuple) else str(value) for name, value in shown.items() if value not in (None, ())}


def _end_early(tracker: MlflowTracker, error: BaseException, progress: Progress) -> None:
    """Close the runs, then show what there is; `error` ended the work, and no failure of this may take its place."""
    try:
        with progress.waiting("closing the study in MLflow, with the leaderboard of what there is"):
            tracker.close("FAILED" if isinstance(error, PhaseStopped) else "KILLED")
            attach_leaderboard(tracker)
    except Exception as another:
        progress.say(f"what there is could not be recorded or shown: {type(another).__name__}: {another}")


def _run_phase(
    plan: Plan,
    phase: Phase,
    phases: Mapping[str, optuna.Study],
    storage: BaseStorage,
    pool: Pool,
    tracker: MlflowTracker,
    progress: Progress,
    hold: Hold,
    interruption: Interruption,
) -> None:
    try:
        PhaseLoop(
            study_name=plan.settings.study_name,
            phase=phase,
            study=phases[phase.name],
            storage=storage,
            measuring=plan.measuring(phase, plan.earlier(phase, phases)),
            pool=pool,
            tracker=tracker,
            progress=progress,
            hold=hold,
            interruption=interruption,
            proposer=phase.propose(phases) if phase.propose else None,
            ranks_trials=phase.name not in plan.study.designs,
        ).run()
    except (SettingsError, StudyIsDriven, PoolError):
        raise
    except ValueError as error:
        # What a user can get wrong was checked before; from here on a ValueError is our own, and wants its traceback.
        raise RuntimeError(f"{plan.settings.study_name}/{phase.name} met an internal error") from error


def open_study(name: str, **settings: Any) -> optuna.Study:
    """The Optuna study of a phase, `STUDY/PHASE`, created if need be, with the phase's strategy as its sampler.

    `settings` are the fields of `RunSettings`, `runs` among them. Raises ValueError when the study was created with
    other settings.
    """
    plan, phase = _open_for_user(name, settings)
    return open_phase(f"{plan.settings.study_name}/{phase.name}", phase, plan.settings, plan.data_fingerprint, plan.storage())


def objective(name: str, **settings: Any) -> Callable[[optuna.Trial], float | tuple[float, ...]]:
    """The objective of the phase `STUDY/PHASE` for `study.optimize`: measures in this process, without Ray or MLflow."""
    plan, phase = _open_for_user(name, settings)
    storage, study_name = plan.storage(), plan.settings.study_name
    try:
        earlier = {need.phase: optuna.load_study(study_name=f"{study_name}/{need.phase}", storage=storage) for need in phase.needs}
    except KeyError as error:
        needed = ", ".join(need.phase for need in phase.needs)
        raise SettingsError(f"phase {phase.name!r} needs {needed}, which {plan.shown_storage} does not hold") from error
    return make_objective(phase, plan.measuring(phase, plan.earlier(phase, earlier)))


def _open_for_user(name: str, settings: Mapping[str, Any]) -> tuple[Plan, Phase]:
    method, _, phase = name.partition("/")
    runs = Path(settings.get("runs", "runs")).expanduser().absolute()
    options = studies.get(method).options
    own = {field.name for field in fields(options)}
    known = own | {field.name for field in fields(RunSettings)} - {"study", "options", "defaults"}
    for setting in settings:
        if setting not in known:
            raise unknown_name("setting", setting, known, f"study {method!r}")
    run = {setting: value for setting, value in settings.items() if setting not in own}
    chosen = options(**{setting: value for setting, value in settings.items() if setting in own})
    plan = Plan(RunSettings(**{**run, "study": method, "runs": runs, "options": chosen}))
    return plan, plan.study.phase(phase)


class Plan:
    """A study whose settings were all checked, and where its things lie. Nothing is created yet but the hashes of its data files."""

    def __init__(self, settings: RunSettings, *, fresh: bool = False):
        if not re.fullmatch(STUDY_NAME, settings.study_name):
            raise SettingsError(f"--name {settings.study_name!r} is no name for a study; allowed: letters, digits and . _ + = -")
        settings = fitted(settings, fresh=fresh)
        self.study: Study = studies.get(settings.study)(settings)
        used = {call.name for phase in self.study.phases for call in phase.evaluators}
        for name in settings.evaluator_settings:
            if name not in used:
                raise unknown_name("evaluator", name, used, "--set")
        for phase in self.study.phases:
            if phase.strategy:
                strategies.get(phase.strategy)
            phase.budget.check_reachable(phase.space)
            example = phase.example
            for call in phase.evaluators:
                call.check(subject_of(call, example), example.recipe, example.weights)
        if settings.weights is not None and not any(phase.example.weights for phase in self.study.phases):
            raise SettingsError(f"--weights {settings.weights} means nothing here: study {settings.study!r} trains no network of yours")
        self.paths = RunPaths(settings.runs)
        self.data_fingerprint = ""
        if any(call.evaluator.uses_data for phase in self.study.phases for call in phase.evaluators):
            settings = replace(settings, data=check_source(settings.data))
            self.data_fingerprint = fingerprint(settings.data, cache=self.paths.data_hashes)
        self.settings = settings
        self.storage_location = settings.storage or str(self.paths.journal)
        self.tracking_uri = settings.tracking_uri or self.paths.mlflow_uri
        self.artifact_root = None if settings.tracking_uri else self.paths.artifact_root

    @property
    def shown_storage(self) -> str:
        return without_password(self.storage_location)

    @property
    def shown_tracking(self) -> str:
        return without_password(self.tracking_uri)

    def storage(self) -> BaseStorage:
        return open_storage(self.storage_location)

    def designs(self) -> dict[str, Any]:
        """The JSON of what will be tested, by phase."""
        return {phase: design.to_json() for phase, design in self.study.designs.items()}

    def earlier(self, phase: Phase, studied: Mapping[str, optuna.Study]) -> dict[str, tuple[EarlierTrial, ...]]:
        """The trials of earlier phases that `phase` needs; raises PhaseStopped if a phase has none."""
        return {
            need.phase: needed_trials(
                self.study.phase(need.phase), studied[need.phase], lambda number, name=need.phase: self.workdir(name, number), need.which
            )
            for need in phase.needs
        }

    def workdir(self, phase: str, number: int) -> Path:
        return self.paths.workdir(self.settings.study_name, phase, number)

    def measuring(self, phase: Phase, earlier: Mapping[str, tuple[EarlierTrial, ...]]) -> Measuring:
        settings = self.settings
        return Measuring(
            seed=settings.seed,
            data=settings.data,
            data_fingerprint=self.data_fingerprint,
            data_cache=self.paths.data_hashes,
            workdir=lambda number: self.workdir(phase.name, number),
            earlier=earlier,
            resources=phase.trial_resources(settings),
            time_limit_s=settings.time_limit_s,
        )


@contextmanager
def driving(plan: Plan, fresh: bool, progress: Progress | None = None) -> Iterator[tuple[Hold, BaseStorage, dict[str, optuna.Study]]]:
    """Hold the study against other drivers, with its storage and the Optuna study of every phase open."""
    name = plan.settings.study_name
    first = f"{name}/{plan.study.phases[0].name}"
    progress = progress or Progress()
    with ExitStack() as stack:
        with progress.waiting(f"opening the Optuna storage {plan.shown_storage}"):

            def held(hold: Hold) -> Hold:
                stack.callback(hold.release)
                return hold

            # The work folder and MLflow's store are in the runs directory; the Optuna storage may be shared by several of those.
            hold = held(LockFile(plan.paths.lock(name), name))
            storage = plan.storage()
            lease: Lease | None = None
            if "://" not in plan.storage_location:
                held(LockFile(journal_lock(Path(plan.storage_location), name), name))
            elif first in optuna.get_all_study_names(storage):
                hold = held(lease := Lease(optuna.load_study(study_name=first, storage=storage), say=progress.say))
            archiving = Archiving(
                name=name,
                first_phase=plan.study.phases[0].name,
                paths=plan.paths,
                tracking_uri=plan.tracking_uri,
                storage=storage,
                hold=hold,
            )
            archiving.finish()
            if fresh:
                archiving.run()
            phases = {
                phase.name: open_phase(f"{name}/{phase.name}", phase, plan.settings, plan.data_fingerprint, storage)
                for phase in plan.study.phases
            }
            if "://" in plan.storage_location and not (lease and lease.is_held()):
                hold = held(Lease(phases[plan.study.phases[0].name], say=progress.say))
        yield hold, storage, phases


@contextmanager
def _open_pool(plan: Plan, max_workers: int | None, ray_address: str, progress: Progress) -> Iterator[Pool]:
    with progress.waiting("starting Ray" if ray_address == "local" else f"joining Ray at {ray_address}"):
        pool = make_pool(plan, max_workers, ray_address)
    try:
        yield pool
    finally:
        with progress.waiting("ending what still runs"):
            pool.close()


def make_pool(plan: Plan, max_workers: int | None, ray_address: str) -> Pool:
    """Where the study runs: in this process if all it measures is free, else on a cluster."""
    if all(call.evaluator.is_free for phase in plan.study.phases for call in phase.evaluators):
        return SerialPool()
    return RayPool(address=ray_address, max_workers=max_workers)

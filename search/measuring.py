"""What the trials of a phase measure and leave: the job of a trial, its outcome file, and what later trials may take from both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from results.records import DETERMINISTIC_FAILURES, Failure, Measurement, Outcome, outcome_from_json, outcome_to_json, write_json_atomically
from search.study import Phase, PhaseStopped
from space.registry import unknown_name
from space.search_space import Candidate
from workers.evaluate import Job, Stop
from workers.evaluator import Call, EarlierTrial, by_todays_names
from workers.resources import RESOURCES, Resources

if TYPE_CHECKING:
    import optuna

OUTCOME_FILE = "outcome.json"


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How the trials of a phase are measured, beside the evaluators: what every job of it shares."""

    seed: int
    data: str
    data_fingerprint: str
    workdir: Callable[[int], Path]
    data_cache: Path | None = None
    earlier: Mapping[str, tuple[EarlierTrial, ...]] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    time_limit_s: float | None = None

    def job(self, number: int, candidate: Candidate, calls: Sequence[Call]) -> Job:
        """The job of a trial; raises SpecError for settings of the candidate that none of the calls has."""
        known = [call.name for call in calls]
        settings = by_todays_names(candidate.settings, "the candidate's settings")
        for name in settings:
            if name not in (*known, RESOURCES):
                raise unknown_name("evaluator", name, [*known, RESOURCES], "the candidate's settings")
        return Job(
            trial=number,
            candidate=candidate,
            calls=tuple(_to_the_end(call.changed(settings.get(call.name, {})), candidate) for call in calls),
            # A recipe has the seed of its training; seeds are then part of a design, not a setting of the run.
            seed=candidate.recipe.seed if candidate.recipe else self.seed,
            data=self.data,
            data_fingerprint=self.data_fingerprint,
            data_cache=self.data_cache,
            workdir=self.workdir(number),
            earlier=self.earlier,
            resources=self.resources.changed(settings.get(RESOURCES, {})),
            time_limit_s=self.time_limit_s,
        )


def _to_the_end(call: Call, candidate: Candidate) -> Call:
    """The call, without a stop that is the end of the training: both are one measurement."""
    name = call.evaluator.continued_by
    if name and candidate.recipe and getattr(call.settings, name) == candidate.recipe.epochs:
        return call.changed({name: 0})
    return call


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The outcome of a trial as its file holds it: `reused_from` is the trial that measured it, if that was another."""

    number: int
    workdir: Path
    key: str
    outcome: Outcome
    reused_from: int | None = None
    stop: Stop | None = None
    """Where in its training the trial stopped; None if it went to its end."""

    @property
    def measured_by(self) -> int:
        return self.number if self.reused_from is None else self.reused_from

    def write(self, candidate: Mapping[str, Any]) -> None:
        """Write the outcome file, whole or not at all; `candidate` is JSON for its readers."""
        identity = {"key": self.key, "reused_from": self.reused_from, "candidate": candidate}
        stop = {"stop": asdict(self.stop)} if self.stop else {}
        write_json_atomically(self.workdir / OUTCOME_FILE, {**identity, **stop, **outcome_to_json(self.outcome)})

    @classmethod
    def of(cls, job: Job, outcome: Outcome, reused_from: int | None) -> Measured:
        stop = job.stop if job.stop and math.isfinite(job.stop.at) else None
        return cls(number=job.trial, workdir=job.workdir, key=job.key, outcome=outcome, reused_from=reused_from, stop=stop)

    @classmethod
    def read(cls, number: int, workdir: Path) -> Measured | None:
        """What the trial's outcome file holds; None if there is none."""
        try:
            data: dict[str, Any] = json.loads((workdir / OUTCOME_FILE).read_text())
        except (OSError, json.JSONDecodeError):
            return None
        key, reused_from, stop = data.pop("key"), data.pop("reused_from"), data.pop("stop", None)
        del data["candidate"]
        outcome = outcome_from_json(data)
        return cls(number=number, workdir=workdir, key=key, outcome=outcome, reused_from=reused_from, stop=Stop(**stop) if stop else None)


class Memory:
    """What the trials of a phase have measured: an equal job is not run again, and a training goes on from where another stopped."""

    def __init__(self, calls: Sequence[Call]):
        self._is_deterministic = all(call.evaluator.is_deterministic for call in calls)
        self._known: dict[str, Measured] = {}
        self._stopped: dict[str, dict[float, Path]] = {}

    def add(self, measured: Measured) -> None:
        outcome = measured.outcome
        is_measurement = isinstance(outcome, Measurement)
        if self._is_deterministic and (is_measurement or outcome.kind in DETERMINISTIC_FAILURES):
            self._known.setdefault(measured.key, measured)
        if measured.stop and is_measurement and measured.reused_from is None:
            self._stopped.setdefault(measured.stop.training, {}).setdefault(measured.stop.at, measured.workdir)

    def of(self, job: Job) -> Measured | None:
        """What an equal job has measured."""
        return self._known.get(job.key)

    def continued_by(self, job: Job) -> Path | None:
        """The files of the trial of the same training that went furthest towards the point where this job stops."""
        if job.stop is None:
            return None
        before = {at: workdir for at, workdir in self._stopped.get(job.stop.training, {}).items() if at < job.stop.at}
        return before[max(before)] if before else None


def needed_trials(
    phase: Phase, study: optuna.Study, workdir: Callable[[int], Path], which: Literal["best", "all"]
) -> tuple[EarlierTrial, ...]:
    """The complete trials of `phase` as a later phase may read them, best in the first objective first, equals by their number.

    A measurement that several trials were told stands there once. Raises PhaseStopped if there is none, or files are gone.
    """
    from optuna.trial import TrialState

    sign = -1 if phase.goals[0].goal == "maximize" else 1
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ranked = sorted(complete, key=lambda trial: (sign * trial.values[0], trial.number))
    if not ranked:
        raise PhaseStopped(f"{study.study_name} has no complete trial, and a later phase needs one")
    needed: dict[int, EarlierTrial] = {}
    for trial in ranked if which == "all" else ranked[:1]:
        stored = Measured.read(trial.number, workdir(trial.number))
        if stored is None or isinstance(stored.outcome, Failure):
            what = "its best trial" if which == "best" else "trial"
            raise PhaseStopped(f"{study.study_name}: the files of {what} {trial.number} are gone from {workdir(trial.number)}")
        number = stored.measured_by
        measured = stored.outcome
        trial = EarlierTrial(number=number, workdir=workdir(number), key=stored.key, values=measured.values, seed=measured.seed)
        needed.setdefault(number, trial)
    return tuple(needed.values())


def result_of(candidate: Candidate, outcome: Outcome) -> dict[str, Any]:
    """What Optuna's record of a trial says of its outcome beside the objectives."""
    identity = {"digest": candidate.model.digest, "label": candidate.label}
    if isinstance(outcome, Failure):
        return {**identity, "failure": outcome.kind, "message": outcome.message}
    return {**identity, **outcome.values}

"""The loop of a phase: ask, screen, submit, record, until the asked number of trials is complete.

ask      a trial adopted from a driver that was lost, else a new one from the strategy
screen   illegal -> FAIL; outside the budget -> PRUNED with its constraint; measured before -> told the same again
submit   to the pool, never more jobs than it has room for
record   outcome.json in the workdir, then MLflow with the trial's files, then Optuna: whatever the order of crashes, the next start can
         tell from the earlier ledger what the later one lacks
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from results.records import DETERMINISTIC_FAILURES, Failure, Measurement, Outcome, outcome_from_json, outcome_to_json, write_json_atomically
from results.tracking import Tracker, TrialRecord
from search.interruption import Interruption
from search.lock import Hold
from search.progress import Progress, Status
from search.storage import trial_id_of
from search.strategy import Proposer, enqueue
from search.study import RESULT_ATTRIBUTE, Phase
from space.registry import SpecError, unknown_name
from space.search_space import Candidate
from workers.evaluate import Job, Stop, evaluate
from workers.evaluator import ARTIFACTS, PROGRESS, EarlierTrial
from workers.pool import Finished, Pool
from workers.resources import RESOURCES, Resources

POLL_S = 0.5
MAX_FAILURES_IN_A_ROW = 10
MAX_REJECTED_IN_A_ROW = 200
OUTCOME_FILE = "outcome.json"
WITHDRAWN = "withdrawn"
"""Stands as the failure of a trial that was enqueued and never begun, because a later start did not ask for it."""


class PhaseStopped(RuntimeError):
    """The phase cannot go on by itself; the message says why. What was measured is kept."""


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

    def job(self, number: int, candidate: Candidate, phase: Phase) -> Job:
        """The job of a trial; raises SpecError for settings of the candidate that no evaluator of the phase has."""
        for name in candidate.settings:
            if name != RESOURCES and name not in (known := [call.name for call in phase.evaluators]):
                raise unknown_name("evaluator", name, [*known, RESOURCES], "the candidate's settings")
        return Job(
            trial=number,
            candidate=candidate,
            calls=tuple(call.changed(candidate.settings.get(call.name, {})) for call in phase.evaluators),
            # A recipe has the seed of its training; seeds are then part of a design, not a setting of the run.
            seed=candidate.recipe.seed if candidate.recipe else self.seed,
            data=self.data,
            data_fingerprint=self.data_fingerprint,
            data_cache=self.data_cache,
            workdir=self.workdir(number),
            earlier=self.earlier,
            resources=self.resources.changed(candidate.settings.get(RESOURCES, {})),
            time_limit_s=self.time_limit_s,
        )


@dataclass
class _Asked:
    """A trial that was asked for and is not told yet."""

    trial: optuna.Trial
    job: Job
    record: TrialRecord


@dataclass(kw_only=True)
class PhaseLoop:
    """Runs one phase of the study called `study_name` to its end; made for one `run()`."""

    study_name: str
    phase: Phase
    study: optuna.Study
    storage: BaseStorage
    measuring: Measuring
    pool: Pool
    tracker: Tracker
    progress: Progress
    hold: Hold
    interruption: Interruption = field(default_factory=Interruption)
    proposer: Proposer | None = None
    _running: dict[int, _Asked] = field(default_factory=dict)
    _followers: dict[str, list[_Asked]] = field(default_factory=dict)
    _adopted: deque[optuna.Trial] = field(default_factory=deque)
    _again: deque[_Asked] = field(default_factory=deque)
    _known: dict[str, tuple[int, Outcome]] = field(default_factory=dict)
    _stopped: dict[str, dict[float, Path]] = field(default_factory=dict)
    _counts: dict[TrialState, int] = field(default_factory=dict)
    _best: dict[str, float] = field(default_factory=dict)
    _shares: dict[int, float] = field(default_factory=dict)
    _head_starts: dict[int, float] = field(default_factory=dict)
    _adopted_numbers: set[int] = field(default_factory=set)
    _total: int | None = None
    _failures_in_a_row: int = 0
    _rejected_in_a_row: int = 0
    _proposals_ended: bool = False
    _waits_for_nodes: bool = False
    _warned: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Run until the phase is complete.

        A trial that a lost driver left running is completed, also when fewer trials are asked for by now. Raises
        PhaseStopped after too many failures or rejected proposals in a row.
        """
        try:
            self._run()
        except BaseException:
            self._show(final=True)
            raise

    def _run(self) -> None:
        self._withdraw()
        self._read_ledger()
        self._total = self.proposer.num_total(self.study) if self.proposer else self.phase.num_trials
        while True:
            self.interruption.check()
            is_satisfied = self._fill()
            if not self._running:
                if is_satisfied:
                    break
                self._wait_for_nodes()
            self._show()
            for event in self.pool.poll(POLL_S):
                if event.trial not in self._running:
                    continue
                if isinstance(event, Finished):
                    self._finish(event.trial, event.outcome)
                elif event.name == PROGRESS:
                    self._note_share(event.trial, event.value)
                else:
                    self.tracker.report(self._running[event.trial].record, event.name, event.value, event.step)
            self.tracker.flush()
            self.hold.renew()
        self._show(final=True)
        if self.proposer is not None:
            self.progress.say(f"{self.study.study_name} has ended: {self.proposer.ended}")
            self.tracker.mark_family(self.phase.name, [trial.number for trial in self.proposer.family(self.study)])

    def _wait_for_nodes(self) -> None:
        """A cluster may be without a fitting node for a while, between one that left and the next that comes."""
        if not self._waits_for_nodes:
            self.progress.say("no node of the cluster has room for a trial; waiting for one")
        self._waits_for_nodes = True
        time.sleep(POLL_S)

    def _withdraw(self) -> None:
        """End the trials that only an earlier start wanted: what it enqueued is not measured when less is asked for now."""
        unwanted = self.proposer.unwanted(self.study) if self.proposer else []
        result = {"failure": WITHDRAWN, "message": "it was enqueued, and a later start did not ask for it"}
        for waiting in unwanted:
            # `tell` refuses a trial that nobody has asked for, and asking for it would make it one that runs.
            trial_id = trial_id_of(self.study, self.storage, waiting.number)
            self.storage.set_trial_user_attr(trial_id, RESULT_ATTRIBUTE, result)
            self.storage.set_trial_state_values(trial_id, TrialState.FAIL)
        if unwanted:
            trials = "trial was" if len(unwanted) == 1 else "trials were"
            self.progress.say(f"{self.study.study_name}: {len(unwanted)} waiting {trials} withdrawn, which this command does not ask for")

    def _read_ledger(self) -> None:
        for told in self.study.get_trials(deepcopy=False):
            if told.state == TrialState.RUNNING:
                self._adopted.append(optuna.Trial(self.study, trial_id_of(self.study, self.storage, told.number)))
                self._adopted_numbers.add(told.number)
            elif told.state.is_finished() and not _is_withdrawn(told):
                self._counts[told.state] = self._counts.get(told.state, 0) + 1
                self._note_best(told.values)
                if stored := _read_outcome(self.measuring.workdir(told.number)):
                    self._remember(stored.key, stored.outcome, told.number if stored.reused_from is None else stored.reused_from)
                    if stored.stop and stored.reused_from is None and isinstance(stored.outcome, Measurement):
                        self._remember_stop(stored.stop, self.measuring.workdir(told.number))

    def _fill(self) -> bool:
        """Ask for and submit trials until the pool is full (False) or nothing more is wanted for now (True)."""
        while len(self._running) < self.pool.capacity(self.measuring.resources):
            self.interruption.check()
            self._show()
            if self._again:
                self._dispatch(self._again.popleft())
            elif self._adopted:
                self._start(self._adopted.popleft(), is_adopted=True)
            elif self._num_in_flight() < 2 * self.pool.capacity(self.measuring.resources) and self._wants_more():
                self._start(self.study.ask(), is_adopted=False)
            else:
                return True
        return False

    def _num_in_flight(self) -> int:
        return len(self._running) + sum(map(len, self._followers.values())) + len(self._again) + len(self._adopted)

    def _wants_more(self) -> bool:
        if self.proposer is None:
            assert self.phase.num_trials is not None
            return self._counts.get(TrialState.COMPLETE, 0) + self._num_in_flight() < self.phase.num_trials
        if self._proposals_ended:
            return False
        if self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return True
        if self._num_in_flight():
            return False
        batch = self.proposer.next_batch(self.study)
        for params in batch or ():
            enqueue(self.study, params)
        self._proposals_ended = not batch
        return not self._proposals_ended

    def _start(self, trial: optuna.Trial, *, is_adopted: bool) -> None:
        try:
            candidate = self.phase.space.decode(self.phase.space.suggest(trial))
            excess = self.phase.budget.excess(candidate)
            asked = self._asked(trial, candidate)
        except SpecError as error:
            self._fail_unrecorded(trial, error)
            return
        is_over_budget = _set_constraints(trial, excess)
        if is_adopted and (outcome := self._outcome_of_lost_driver(asked)) is not None:
            self.tracker.open(asked.record)
            self._tell(asked, outcome)
        elif is_over_budget:
            self._reject(trial)
        else:
            self._rejected_in_a_row = 0
            self._dispatch(asked)

    def _dispatch(self, asked: _Asked) -> None:
        """Measure the trial, unless an equal one was measured or is being measured."""
        if asked.job.key in self._known:
            self._repeat(asked)
        elif any(running.job.key == asked.job.key for running in self._running.values()):
            self._followers.setdefault(asked.job.key, []).append(asked)
        elif asked.job.resources != self.measuring.resources and not self.pool.capacity(asked.job.resources):
            self.tracker.open(asked.record)
            message = f"the trial asks for {asked.job.resources}, which no node of the cluster has"
            self._tell(asked, Failure(kind="unavailable", message=message))
        else:
            self.tracker.open(asked.record)
            self._running[asked.trial.number] = asked
            self.pool.submit(replace(asked.job, continues=self._continued_by(asked.job)))

    def _continued_by(self, job: Job) -> Path | None:
        """The files of the trial of the same training that went furthest towards the point where this job stops."""
        if job.stop is None:
            return None
        before = {at: workdir for at, workdir in self._stopped.get(job.stop.training, {}).items() if at < job.stop.at}
        return before[max(before)] if before else None

    def _remember_stop(self, stop: Stop, workdir: Path) -> None:
        self._stopped.setdefault(stop.training, {}).setdefault(stop.at, workdir)

    def _asked(self, trial: optuna.Trial, candidate: Candidate) -> _Asked:
        record = TrialRecord(
            study_name=self.study_name,
            phase=self.phase.name,
            number=trial.number,
            label=candidate.label,
            digest=candidate.model.digest,
            params=trial.params,
            candidate=candidate.to_json(),
            proxy_digest=candidate.proxy.digest if candidate.proxy else None,
            recipe_digest=candidate.recipe.digest if candidate.recipe else None,
            reused_from=None,
        )
        return _Asked(trial, self.measuring.job(trial.number, candidate, self.phase), record)

    def _finish(self, number: int, outcome: Outcome) -> None:
        asked = self._running.pop(number)
        self._shares.pop(number, None)
        followers = self._followers.pop(asked.job.key, [])
        self._tell(asked, outcome)
        self._again.extend(followers)

    def _repeat(self, asked: _Asked) -> None:
        """Tell a trial what an equal one measured."""
        first, outcome = self._known[asked.job.key]
        asked.record = replace(asked.record, reused_from=first)
        self.tracker.open(asked.record)
        self._tell(asked, outcome)

    def _outcome_of_lost_driver(self, asked: _Asked) -> Outcome | None:
        stored = _read_outcome(asked.job.workdir)
        if stored and stored.key == asked.job.key:
            asked.record = replace(asked.record, reused_from=stored.reused_from)
            return stored.outcome
        return self.tracker.finished_outcome(self.phase.name, asked.trial.number)

    def _tell(self, asked: _Asked, outcome: Outcome) -> None:
        key = asked.job.key
        reused_from = asked.record.reused_from
        stop = asked.job.stop if asked.job.stop and math.isfinite(asked.job.stop.at) else None
        identity = {"key": key, "reused_from": reused_from, "candidate": asked.record.candidate, **({"stop": asdict(stop)} if stop else {})}
        write_json_atomically(asked.job.workdir / OUTCOME_FILE, {**identity, **outcome_to_json(outcome)})
        self.tracker.record(asked.record, outcome, asked.job.workdir / ARTIFACTS)
        self._remember(key, outcome, asked.trial.number if reused_from is None else reused_from)
        asked.trial.set_user_attr(RESULT_ATTRIBUTE, _result(asked.job.candidate, outcome))
        if isinstance(outcome, Measurement):
            if stop and reused_from is None:
                self._remember_stop(stop, asked.job.workdir)
            values = [outcome.values[name] for name in self.phase.objectives]
            self.study.tell(asked.trial, values)
            self._note_best(values)
            self._count(TrialState.COMPLETE)
            self._failures_in_a_row = 0
            for warning in outcome.warnings:
                self._warn_once(warning)
        else:
            self.study.tell(asked.trial, state=TrialState.FAIL)
            self._count(TrialState.FAIL)
            self.progress.say(f"trial {asked.trial.number} failed ({outcome.kind}): {outcome.message}")
            self._stop_after_failures(outcome)

    def _fail_unrecorded(self, trial: optuna.Trial, error: SpecError) -> None:
        trial.set_user_attr(RESULT_ATTRIBUTE, {"failure": "illegal", "message": str(error)})
        self.study.tell(trial, state=TrialState.FAIL)
        self._count(TrialState.FAIL)
        self._stop_after_failures(Failure(kind="illegal", message=str(error)))

    def _stop_after_failures(self, last: Failure) -> None:
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            stopped = f"{self.study.study_name} stopped after {self._failures_in_a_row} failures in a row; the last:"
            raise PhaseStopped(f"{stopped}\n{last.traceback or last.message}")

    def _reject(self, trial: optuna.Trial) -> None:
        self.study.tell(trial, state=TrialState.PRUNED)
        self._count(TrialState.PRUNED)
        self._rejected_in_a_row += 1
        if self._rejected_in_a_row >= MAX_REJECTED_IN_A_ROW:
            raise PhaseStopped(
                f"{self.study.study_name} stopped: {self._rejected_in_a_row} proposals in a row were outside the budget "
                f"({self.phase.budget}); widen it or use another --strategy"
            )

    def _remember(self, key: str, outcome: Outcome, number: int) -> None:
        if not all(call.evaluator.is_deterministic for call in self.phase.evaluators):
            return
        if isinstance(outcome, Measurement) or outcome.kind in DETERMINISTIC_FAILURES:
            self._known.setdefault(key, (number, outcome))

    def _count(self, state: TrialState) -> None:
        self._counts[state] = self._counts.get(state, 0) + 1

    def _note_best(self, values: list[float] | None) -> None:
        for metric, value in zip(self.phase.goals, values or (), strict=False):
            better = max if metric.goal == "maximize" else min
            self._best[metric.name] = better(value, self._best.get(metric.name, value))

    def _note_share(self, number: int, share: float) -> None:
        if number in self._adopted_numbers:
            self._head_starts.setdefault(number, share)
        self._shares[number] = share

    def _warn_once(self, warning: str) -> None:
        if warning not in self._warned:
            self._warned.add(warning)
            self.progress.say(f"warning: {warning}")

    def _show(self, *, final: bool = False) -> None:
        status = Status(
            title=self.study.study_name,
            complete=self._counts.get(TrialState.COMPLETE, 0),
            total=self._total,
            running=len(self._running),
            failed=self._counts.get(TrialState.FAIL, 0),
            pruned=self._counts.get(TrialState.PRUNED, 0),
            best=", ".join(f"{name} {value:.4g}" for name, value in self._best.items()),
            running_share=sum(self._shares.values()) if self._shares else None,
            head_start=sum(self._head_starts.values()),
        )
        self.progress.show(status, final=final)


def make_objective(phase: Phase, measuring: Measuring) -> Callable[[optuna.Trial], float | tuple[float, ...]]:
    """The phase as an objective for `study.optimize`: evaluates in this process, prunes what is outside the budget.

    Raises EvaluationFailed, which `optimize(catch=...)` may be told to survive.
    """

    def objective(trial: optuna.Trial) -> float | tuple[float, ...]:
        candidate = phase.space.decode(phase.space.suggest(trial))
        if _set_constraints(trial, phase.budget.excess(candidate)):
            raise optuna.TrialPruned(f"outside the budget: {phase.budget}")
        outcome = evaluate(measuring.job(trial.number, candidate, phase))
        trial.set_user_attr(RESULT_ATTRIBUTE, _result(candidate, outcome))
        if isinstance(outcome, Failure):
            raise EvaluationFailed(f"{outcome.kind}: {outcome.message}")
        first, *others = (outcome.values[name] for name in phase.objectives)
        return (first, *others) if others else first

    return objective


class EvaluationFailed(RuntimeError):
    """A candidate could not be measured; the message says why."""


def _is_withdrawn(told: optuna.trial.FrozenTrial) -> bool:
    return told.state == TrialState.FAIL and told.user_attrs.get(RESULT_ATTRIBUTE, {}).get("failure") == WITHDRAWN


def _set_constraints(trial: optuna.Trial, excess: Mapping[str, float]) -> bool:
    """Give the trial its constraints, at most 0 where they hold; True if one does not."""
    for name, over in excess.items():
        trial.set_constraint(name, over)
    return any(over > 0 for over in excess.values())


def needed_trials(
    phase: Phase, study: optuna.Study, workdir: Callable[[int], Path], which: Literal["best", "all"]
) -> tuple[EarlierTrial, ...]:
    """The complete trials of `phase` as a later phase may read them, best in the first objective first, equals by their number.

    A measurement that several trials were told stands there once. Raises PhaseStopped if there is none, or files are gone.
    """
    sign = -1 if phase.goals[0].goal == "maximize" else 1
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ranked = sorted(complete, key=lambda trial: (sign * trial.values[0], trial.number))
    if not ranked:
        raise PhaseStopped(f"{study.study_name} has no complete trial, and a later phase needs one")
    needed: dict[int, EarlierTrial] = {}
    for trial in ranked if which == "all" else ranked[:1]:
        stored = _read_outcome(workdir(trial.number))
        if stored is None or isinstance(stored.outcome, Failure):
            what = "its best trial" if which == "best" else "trial"
            raise PhaseStopped(f"{study.study_name}: the files of {what} {trial.number} are gone from {workdir(trial.number)}")
        measured = trial.number if stored.reused_from is None else stored.reused_from
        earlier = EarlierTrial(number=measured, workdir=workdir(measured), key=stored.key, values=stored.outcome.values)
        needed.setdefault(measured, earlier)
    return tuple(needed.values())


def _result(candidate: Candidate, outcome: Outcome) -> dict[str, Any]:
    """What Optuna's record of a trial says of its outcome beside the objectives."""
    identity = {"digest": candidate.model.digest, "label": candidate.label}
    if isinstance(outcome, Failure):
        return {**identity, "failure": outcome.kind, "message": outcome.message}
    return {**identity, **outcome.values}


class _Stored(NamedTuple):
    """What an outcome file holds."""

    key: str
    reused_from: int | None
    stop: Stop | None
    outcome: Outcome


def _read_outcome(workdir: Path) -> _Stored | None:
    try:
        data: Mapping[str, Any] = json.loads((workdir / OUTCOME_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    outcome = outcome_from_json({name: value for name, value in data.items() if name not in ("key", "reused_from", "candidate", "stop")})
    return _Stored(data["key"], data["reused_from"], Stop(**data["stop"]) if data.get("stop") else None, outcome)

"""The loop of a phase: ask, screen, submit, record, until the asked number of trials is complete.

ask      a trial adopted from a driver that was lost, else a new one from the strategy
screen   illegal -> FAIL; outside the budget -> PRUNED with its constraint; measured before -> told the same again
submit   to the pool, never more jobs than it has room for
record   outcome.json in the workdir, then MLflow with the trial's files, then Optuna: whatever the order of crashes, the next start can
         tell from the earlier ledger what the later one lacks
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from results.records import DETERMINISTIC_FAILURES, Failure, Measurement, Outcome
from results.tracking import Tracker, TrialRecord
from search.interruption import Interruption
from search.lock import Hold
from search.measuring import Measured, Measuring, Memory, result_of
from search.phase_objective import set_constraints
from search.progress import Progress, Tally
from search.storage import trial_id_of
from search.strategy import Proposer, enqueue
from search.study import RESULT_ATTRIBUTE, Phase, PhaseStopped
from space.registry import SpecError
from space.search_space import Candidate
from space.spec import digest_of
from workers.evaluate import Job
from workers.evaluator import ARTIFACTS, PROGRESS
from workers.pool import Finished, Pool

POLL_S = 0.5
MAX_FAILURES_IN_A_ROW = 10
MAX_REJECTED_IN_A_ROW = 200
WITHDRAWN = "withdrawn"
"""Stands as the failure of a trial that was enqueued and never begun, because a later start did not ask for it."""


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
    ranks_trials: bool = True
    """Whether the trials compete; in a phase with a design they are single seeds, and none is shown as the best."""

    _running: dict[int, _Asked] = field(default_factory=dict)
    _followers: dict[str, list[_Asked]] = field(default_factory=dict)
    _adopted: deque[optuna.Trial] = field(default_factory=deque)
    _again: deque[_Asked] = field(default_factory=deque)
    _failures_in_a_row: int = 0
    _rejected_in_a_row: int = 0
    _proposals_ended: bool = False
    _waits_for_nodes: bool = False
    _warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._memory = Memory(self.phase.evaluators)
        self._tally = Tally(self.study.study_name, self.phase.goals if self.ranks_trials else ())

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
        self._tally.total = self.proposer.num_total(self.study) if self.proposer else self.phase.num_trials
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
                    self._tally.note_share(event.trial, event.value)
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
                self._tally.note_adopted(told.number)
            elif told.state.is_finished() and not _is_withdrawn(told):
                self._tally.count(told.state.name)
                stored = Measured.read(told.number, self.measuring.workdir(told.number))
                if stored:
                    self._memory.add(stored)
                if told.state == TrialState.COMPLETE and not (stored and stored.reused_from is not None):
                    self._tally.note_measured(told.number, told.values)

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
            return self._tally.complete + self._num_in_flight() < self.phase.num_trials
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
        is_over_budget = set_constraints(trial, excess)
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
        if (known := self._memory.of(asked.job)) is not None:
            self._repeat(asked, known)
        elif any(running.job.key == asked.job.key for running in self._running.values()):
            self._followers.setdefault(asked.job.key, []).append(asked)
        elif asked.job.resources != self.measuring.resources and not self.pool.capacity(asked.job.resources):
            self.tracker.open(asked.record)
            message = f"the trial asks for {asked.job.resources}, which no node of the cluster has"
            self._tell(asked, Failure(kind="unavailable", message=message))
        else:
            self.tracker.open(asked.record)
            self._running[asked.trial.number] = asked
            self.pool.submit(replace(asked.job, continues=self._memory.continued_by(asked.job)))

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
            settings_digest=digest_of(candidate.to_json()["settings"]) if candidate.settings else None,
            weights_digest=digest_of(candidate.weights.identity) if candidate.weights else None,
            reused_from=None,
        )
        return _Asked(trial, self.measuring.job(trial.number, candidate, self.phase.evaluators), record)

    def _finish(self, number: int, outcome: Outcome) -> None:
        asked = self._running.pop(number)
        self._tally.forget_share(number)
        followers = self._followers.pop(asked.job.key, [])
        self._tell(asked, outcome)
        self._again.extend(followers)

    def _repeat(self, asked: _Asked, known: Measured) -> None:
        """Tell a trial what an equal one measured."""
        asked.record = replace(asked.record, reused_from=known.measured_by)
        self.tracker.open(asked.record)
        self._tell(asked, known.outcome)

    def _outcome_of_lost_driver(self, asked: _Asked) -> Outcome | None:
        stored = Measured.read(asked.job.trial, asked.job.workdir)
        if stored is None:
            return self.tracker.finished_outcome(self.phase.name, asked.trial.number)
        if stored.key != asked.job.key:
            # What was measured has another meaning today, and MLflow would give the same without saying so.
            return None
        asked.record = replace(asked.record, reused_from=stored.reused_from)
        return stored.outcome

    def _tell(self, asked: _Asked, outcome: Outcome) -> None:
        measured = Measured.of(asked.job, outcome, asked.record.reused_from)
        measured.write(asked.record.candidate)
        self.tracker.record(asked.record, outcome, asked.job.workdir / ARTIFACTS)
        self._memory.add(measured)
        asked.trial.set_user_attr(RESULT_ATTRIBUTE, result_of(asked.job.candidate, outcome))
        if isinstance(outcome, Measurement):
            values = [outcome.values[name] for name in self.phase.objectives]
            self.study.tell(asked.trial, values)
            self._tally.count("COMPLETE")
            if asked.record.reused_from is None:
                self._tally.note_measured(asked.trial.number, values)
            self._failures_in_a_row = 0
            for warning in outcome.warnings:
                self._warn_once(warning)
        else:
            self.study.tell(asked.trial, state=TrialState.FAIL)
            self._tally.count("FAIL")
            if self._is_data(outcome):
                self._warn_once(f"{outcome.kind}: {outcome.message}")
            else:
                self.progress.say(f"trial {asked.trial.number} failed ({outcome.kind}): {outcome.message}")
            self._stop_after_failures(outcome)

    def _fail_unrecorded(self, trial: optuna.Trial, error: SpecError) -> None:
        trial.set_user_attr(RESULT_ATTRIBUTE, {"failure": "illegal", "message": str(error)})
        self.study.tell(trial, state=TrialState.FAIL)
        self._tally.count("FAIL")
        self._stop_after_failures(Failure(kind="illegal", message=str(error)))

    def _is_data(self, failure: Failure) -> bool:
        return self.phase.failures_are_data and failure.kind in {*DETERMINISTIC_FAILURES, "out_of_memory"}

    def _stop_after_failures(self, last: Failure) -> None:
        if self._is_data(last):
            return
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            stopped = f"{self.study.study_name} stopped after {self._failures_in_a_row} failures in a row; the last:"
            raise PhaseStopped(f"{stopped}\n{last.traceback or last.message}")

    def _reject(self, trial: optuna.Trial) -> None:
        self.study.tell(trial, state=TrialState.PRUNED)
        self._tally.count("PRUNED")
        self._rejected_in_a_row += 1
        if self._rejected_in_a_row >= MAX_REJECTED_IN_A_ROW:
            raise PhaseStopped(
                f"{self.study.study_name} stopped: {self._rejected_in_a_row} proposals in a row were outside the budget "
                f"({self.phase.budget}); widen it or use another --strategy"
            )

    def _warn_once(self, warning: str) -> None:
        if warning not in self._warned:
            self._warned.add(warning)
            self.progress.say(f"warning: {warning}")

    def _show(self, *, final: bool = False) -> None:
        awaits = "" if final else self.pool.awaits()
        # To rank thousands of trials after each of them would take longer than the loop itself.
        if final or self.progress.is_due(self.study.study_name, awaits):
            self.progress.show(self._tally.status(running=len(self._running), awaits=awaits), final=final)


def _is_withdrawn(told: optuna.trial.FrozenTrial) -> bool:
    return told.state == TrialState.FAIL and told.user_attrs.get(RESULT_ATTRIBUTE, {}).get("failure") == WITHDRAWN

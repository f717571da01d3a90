"""The contract of a ledger of trials, the record of a trial, and a ledger that keeps nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from results.records import Outcome

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial as the ledger stores it.

    `params` are Optuna's; `candidate` is its JSON: label, model and, where another network is scored in its place, proxy.
    `digest` names the model that is reported, `proxy_digest` the one that is scored, `recipe_digest` how it was trained, and
    `settings_digest` the evaluator settings that this trial has of its own, `weights_digest` the weights that the network started from.
    `reused_from` is the number of the trial whose measurement this one was given; that one has the artifacts.
    """

    study_name: str
    phase: str
    number: int
    label: str
    digest: str
    params: Mapping[str, Any]
    candidate: Mapping[str, Any]
    proxy_digest: str | None = None
    recipe_digest: str | None = None
    settings_digest: str | None = None
    weights_digest: str | None = None
    reused_from: int | None = None


class Tracker(Protocol):
    """Where the loop records its trials."""

    def open(self, trial: TrialRecord) -> None:
        """The trial starts; if a dead driver left its run open, that run continues."""
        ...

    def report(self, trial: TrialRecord, name: str, value: float, step: int) -> None:
        """Add a point to a curve of a running trial; points are sent together, every few seconds."""
        ...

    def flush(self) -> None:
        """Send the points that have waited long enough; called now and then while trials run."""
        ...

    def record(self, trial: TrialRecord, outcome: Outcome, artifacts: Path | None = None) -> None:
        """The trial has ended; its files are in the folder `artifacts`, if that exists. Recording it again changes nothing."""
        ...

    def finished_outcome(self, phase: str, number: int) -> Outcome | None:
        """The recorded outcome of the trial; None if it has not ended."""
        ...

    def mark_family(self, phase: str, numbers: Sequence[int]) -> None:
        """These trials, in this order, are the networks that the phase yields."""
        ...

    def close(self, status: RunStatus) -> None:
        """The invocation ends, and every run it opened is closed."""
        ...


class NullTracker:
    """Keeps nothing."""

    def open(self, trial: TrialRecord) -> None:
        pass

    def report(self, trial: TrialRecord, name: str, value: float, step: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def record(self, trial: TrialRecord, outcome: Outcome, artifacts: Path | None = None) -> None:
        pass

    def finished_outcome(self, phase: str, number: int) -> Outcome | None:
        return None

    def mark_family(self, phase: str, numbers: Sequence[int]) -> None:
        pass

    def close(self, status: RunStatus) -> None:
        pass


def user_name() -> str | None:
    """The name of the user; None in a container whose user id has no name."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None

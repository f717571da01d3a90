"""A list of points, each measured once: for factorial designs, in which every cell counts, whatever the other cells gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from results.records import DETERMINISTIC_FAILURES
from search.strategy import proposed_point
from search.study import RESULT_ATTRIBUTE
from space.component import Scalar

Point = tuple[tuple[str, Scalar], ...]


class Grid:
    """Proposer of the given `points`, in their order, in one round.

    A point that the study holds already is not proposed again, unless every attempt timed out or lost its worker. One instance proposes a
    point once, so the next start tries those again. A longer list extends the study; a shorter one withdraws the points that it lacks,
    unless they have begun.
    """

    def __init__(self, points: Sequence[Mapping[str, Scalar]]):
        self.ended = ""
        self._points = {_point(params): dict(params) for params in points}
        self._proposed: set[Point] = set()

    def next_batch(self, study: optuna.Study) -> list[Mapping[str, Scalar]] | None:
        """The points not yet in the study; None when there are none."""
        wanted = self._wanted(study)
        self._proposed.update(wanted)
        if wanted:
            return [self._points[point] for point in wanted]
        complete = {_point_of(trial) for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
        num_measured = sum(point in complete for point in self._points)
        lacking = f", {len(self._points) - num_measured} could not be" if num_measured < len(self._points) else ""
        self.ended = f"{num_measured} of its {len(self._points)} points are measured{lacking}"
        return None

    def unwanted(self, study: optuna.Study) -> list[FrozenTrial]:
        """The waiting trials of points that are not in the list."""
        return [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)) if _point_of(trial) not in self._points]

    def num_total(self, study: optuna.Study) -> int:
        """Trials that are complete, in flight or still to be proposed, with those of earlier starts that are not in this list."""
        trials = study.get_trials(deepcopy=False)
        unfinished = sum(trial.state == TrialState.COMPLETE or not trial.state.is_finished() for trial in trials)
        return unfinished + len(self._wanted(study))

    def family(self, study: optuna.Study) -> list[FrozenTrial]:
        """Empty: a grid chooses nothing."""
        return []

    def _wanted(self, study: optuna.Study) -> list[Point]:
        held = {_point_of(trial) for trial in study.get_trials(deepcopy=False) if settles(trial)}
        return [point for point in self._points if point not in held and point not in self._proposed]


def settles(trial: FrozenTrial) -> bool:
    """Whether the trial settles its point, or will: a timeout, a lost worker or a withdrawal leaves it open."""
    if trial.state != TrialState.FAIL:
        return True
    return trial.user_attrs.get(RESULT_ATTRIBUTE, {}).get("failure") in DETERMINISTIC_FAILURES


def _point_of(trial: FrozenTrial) -> Point:
    return _point(proposed_point(trial))


def _point(params: Mapping[str, Scalar]) -> Point:
    return tuple(sorted(params.items()))

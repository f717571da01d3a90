"""The contract of a strategy: an Optuna sampler, or a proposer that works in rounds.

    @strategy("random")
    def random(space: SearchSpace, objectives: tuple[Metric, ...], seed: int) -> BaseSampler: ...

A sampler answers one trial at a time. A proposer is for rules that decide a whole round from the rounds before and end
by themselves; its batches are enqueued as ordinary Optuna trials, and the next batch is asked for when every trial of
the last one is told. Neither is pickled: whatever it has learnt is rebuilt from the told trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from results.records import Metric
from space.component import Scalar
from space.registry import Registry
from space.search_space import SearchSpace

if TYPE_CHECKING:
    import optuna


PROPOSED_ATTRIBUTE = "proposed"


def enqueue(study: optuna.Study, params: Mapping[str, Scalar]) -> None:
    """Enqueue a trial at a proposer's point, which `proposed_point` can read while the trial waits."""
    study.enqueue_trial(dict(params), user_attrs={PROPOSED_ATTRIBUTE: dict(params)})


def proposed_point(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """The point of a trial, also of one that waits or that was half suggested when its driver was lost."""
    return {**trial.user_attrs.get(PROPOSED_ATTRIBUTE, {}), **trial.params}


class Proposer(Protocol):
    """A rule that works in rounds; `ended` says why it has, and is empty until then."""

    ended: str

    def next_batch(self, study: optuna.Study) -> list[Mapping[str, Scalar]] | None:
        """The points of the next round, decided from the told trials of `study`; None when the rule has ended."""
        ...

    def unwanted(self, study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
        """Trials that an earlier start enqueued and that the rule, as it is now, would not propose."""
        ...

    def num_total(self, study: optuna.Study) -> int | None:
        """How many trials of `study` will be complete when the rule ends; None if that cannot be said."""
        ...

    def family(self, study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
        """The trials that the rule has chosen so far, in the order of the rounds: what it yields."""
        ...


MakeSampler = Callable[[SearchSpace, tuple[Metric, ...], int], "optuna.samplers.BaseSampler"]

strategies: Registry[MakeSampler] = Registry("strategy", package="search.strategies")


def strategy(name: str) -> Callable[[Any], Any]:
    """Register a function `(space, objectives, seed) -> sampler` as the strategy `name`."""
    return lambda make: strategies.add((name,), make)

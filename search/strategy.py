"""The contract of a strategy: an Optuna sampler, or a proposer that works in rounds.

    @strategy("random")
    def random(problem: Problem) -> BaseSampler: ...

A sampler answers one trial at a time. A proposer is for rules that decide a whole round from the rounds before and end
by themselves; its batches are enqueued as ordinary Optuna trials, and the next batch is asked for when every trial of
the last one is told.

Neither is pickled. A sampler is made anew at every start of a study, from the same problem, and must go on as if it had
never stopped. So what it proposes may depend on nothing but the problem, the trial's number and the told trials:

- what it has learnt is rebuilt from the told trials;
- what it draws comes from a generator seeded by `stream_of(seed, trial)`. A sampler that draws from one generator after
  another trial, as Optuna's do, would propose its first points again: `SeededByTrial` makes one for every trial;
- its position in a sequence (Sobol, Halton) is the trial's number, not a count of its own.

It constructs its points within the budget; `within_budget` makes any such sampler do so. A point outside the budget that it
proposes all the same is pruned with its constraint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from results.records import Metric
from search.budget import UNLIMITED, Budget
from space.component import Scalar
from space.registry import Registry
from space.search_space import SearchSpace

if TYPE_CHECKING:
    import optuna

ATTEMPT = "vitscale:attempt"
"""Key in a trial's user attributes: how often the same trial was drawn before."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a strategy is told: the space, the objectives with their directions, the budget, and the seed of the run.

    `num_trials` are the trials that are planned, for a strategy whose sizes depend on them; None where nobody says.
    """

    space: SearchSpace
    goals: tuple[Metric, ...]
    budget: Budget = UNLIMITED
    seed: int
    num_trials: int | None = None


def stream_of(seed: int, trial: optuna.trial.FrozenTrial) -> tuple[int, ...]:
    """What seeds the random draws of a trial: other numbers for every trial, and for every new attempt at the same trial."""
    attempt = trial.user_attrs.get(ATTEMPT, 0)
    return (seed, trial.number, attempt) if attempt else (seed, trial.number)


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


MakeSampler = Callable[[Problem], "optuna.samplers.BaseSampler"]

strategies: Registry[MakeSampler] = Registry("strategy", package="search.strategies")


def strategy(name: str) -> Callable[[Any], Any]:
    """Register a function `(problem) -> sampler` as the strategy `name`."""
    return lambda make: strategies.add((name,), make)

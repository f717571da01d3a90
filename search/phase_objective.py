"""A phase as an objective for Optuna's `study.optimize`: what a user who takes over calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import optuna

from results.records import Failure
from search.measuring import Measuring, result_of
from search.study import RESULT_ATTRIBUTE, Phase
from workers.evaluate import evaluate


class EvaluationFailed(RuntimeError):
    """A candidate could not be measured; the message says why."""


def make_objective(phase: Phase, measuring: Measuring) -> Callable[[optuna.Trial], float | tuple[float, ...]]:
    """The phase as an objective for `study.optimize`: evaluates in this process, prunes what is outside the budget.

    Raises EvaluationFailed, which `optimize(catch=...)` may be told to survive.
    """

    def objective(trial: optuna.Trial) -> float | tuple[float, ...]:
        candidate = phase.space.decode(phase.space.suggest(trial))
        if set_constraints(trial, phase.budget.excess(candidate)):
            raise optuna.TrialPruned(f"outside the budget: {phase.budget}")
        outcome = evaluate(measuring.job(trial.number, candidate, phase.evaluators))
        trial.set_user_attr(RESULT_ATTRIBUTE, result_of(candidate, outcome))
        if isinstance(outcome, Failure):
            raise EvaluationFailed(f"{outcome.kind}: {outcome.message}")
        first, *others = (outcome.values[name] for name in phase.objectives)
        return (first, *others) if others else first

    return objective


def set_constraints(trial: optuna.Trial, excess: Mapping[str, float]) -> bool:
    """Give the trial its constraints, at most 0 where they hold; True if one does not."""
    for name, over in excess.items():
        trial.set_constraint(name, over)
    return any(over > 0 for over in excess.values())

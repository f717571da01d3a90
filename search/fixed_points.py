"""Phases whose points are fixed before they begin: designs, tables, grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from search.strategy import Proposer
from search.study import RunSettings, SettingsError
from space.component import Scalar

if TYPE_CHECKING:
    import optuna


def grid(points: Sequence[Mapping[str, Scalar]]) -> Callable[[Mapping[str, optuna.Study]], Proposer]:
    """The `propose` of a phase that measures every one of the `points` once; imports Optuna when it is called."""

    def propose(phases: Mapping[str, optuna.Study]) -> Proposer:
        from search.strategies.grid import Grid

        return Grid(points)

    return propose


def refuse_flags_of_a_search(run: RunSettings, why: str) -> None:
    """Raise SettingsError for a flag that only a search can follow; `why` says what is measured here instead."""
    for name, flag in (("num_trials", "--trials"), ("strategy", "--strategy")):
        if getattr(run, name) is not None:
            raise SettingsError(f"{flag} means nothing here: {why}")
    if not run.budget.is_empty:
        raise SettingsError(f"{run.budget} means nothing here: {why}")

"""As-ViT's auto-scaling: a seed topology grown in depth and width, https://arxiv.org/abs/2202.11921, section 4.

Round by round, one block is added to one of the four stages and the width is scaled by one of a few ratios; every
combination is scored without training on a proxy a quarter as wide, and the best becomes the parent of the next round.
The winners, from the seed on, are the scaled family.

A tie of ranks goes to the better candidate in one objective: as in the released code, the one with the largest relative
range over all candidates of the round, tied or not.

Deviations from the released code: the tie is broken among all tied candidates in the objective's own direction (the code
compares the first two and takes the smaller score, also where larger is better); the range is taken relative to the largest
magnitude (the code divides by the largest score, which may be zero or negative); the seed is measured too, as round 0;
duplicate widths are left out; and growth ends when no candidate fits `max_params` or after `max_rounds`, while the code stops once
80 M parameters are reached.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from results.records import Metric
from search.budget import UNLIMITED, Budget
from search.strategy import proposed_point
from space.component import Scalar
from space.cost import cost
from space.registry import SpecError
from space.search_space import SearchSpace

DEPTH_AXES = ("depth1", "depth2", "depth3", "depth4")
WIDTH_AXIS = "proxy_embed_dim"
GROWING_AXES = frozenset({*DEPTH_AXES, WIDTH_AXIS})
PAPER_RATIOS = (0.05, 0.1, 0.15, 0.2)


@dataclass(frozen=True)
class Size:
    """What grows: blocks per stage and the width of the proxy's first stage."""

    depths: tuple[int, ...]
    proxy_embed_dim: int


START = Size((1, 1, 1, 1), 8)


def grown(parent: Size, ratios: Sequence[float]) -> tuple[Size, ...]:
    """`parent` with one block more in each stage in turn, at each distinct width of `ratios`; its own width may be one of them."""
    widths = dict.fromkeys(round(parent.proxy_embed_dim * (1 + ratio)) for ratio in ratios)
    depths = [tuple(depth + (stage == grows) for stage, depth in enumerate(parent.depths)) for grows in range(len(parent.depths))]
    return tuple(Size(deeper, width) for deeper in depths for width in widths)


def most_trials(rounds: int, *, parent: Size = START, ratios: Sequence[float] = PAPER_RATIOS) -> int:
    """The most candidates that so many rounds after `parent` can have, on the way through the widths on which they are most.

    Only the width decides how many distinct candidates a round has, as long as all of them fit.
    """
    widths, most = {parent.proxy_embed_dim: 0}, 0
    for _ in range(rounds):
        reached: dict[int, int] = {}
        for width, num_before in widths.items():
            sizes = grown(Size(parent.depths, width), ratios)
            for size in sizes:
                reached[size.proxy_embed_dim] = max(reached.get(size.proxy_embed_dim, 0), num_before + len(sizes))
        widths, most = reached, max(reached.values())
    return most


def best_by_ranks(trials: Sequence[FrozenTrial], goals: Sequence[Metric]) -> list[FrozenTrial]:
    """The trials of the smallest sum of dense ranks, cut down to those best in the objective that differs most.

    That objective is the one with the largest range over all of `trials`, relative to its largest magnitude there.
    """
    losses = np.array([[-value if goal.goal == "maximize" else value for value, goal in zip(t.values, goals, strict=True)] for t in trials])
    ranks = sum(np.unique(column, return_inverse=True)[1] for column in losses.T)
    tied = np.flatnonzero(ranks == np.min(ranks))
    magnitude = np.abs(losses).max(axis=0)
    relative_range = np.ptp(losses, axis=0) / np.where(magnitude > 0, magnitude, 1.0)
    decisive = losses[tied, int(relative_range.argmax())]
    return [trials[index] for index in tied[decisive == decisive.min()]]


class Growth:
    """Proposer of As-ViT's auto-scaling of one `topology`, a point on the axes of `space` that do not grow.

    Everything is derived anew from the told trials of that topology, so growth goes on where it stopped, in the middle
    of a round too; trials of other topologies in the same study are not looked at. A failed or pruned candidate takes
    no part in its round; a failed seed still has its children tried, for they need its shape and not its scores.
    `max_params` bounds the real network, not the proxy; `max_rounds` of None is no bound. The family is the winners within `reported`.
    `ended` says why there is no further round, empty until then.
    """

    def __init__(
        self,
        *,
        space: SearchSpace,
        topology: Mapping[str, Scalar],
        max_params: int,
        objectives: Sequence[Metric],
        reported: Budget = UNLIMITED,
        max_rounds: int | None = None,
        start_depths: tuple[int, ...] = START.depths,
        start_proxy_embed_dim: int = START.proxy_embed_dim,
        ratios: Sequence[float] = PAPER_RATIOS,
    ):
        self.ended = ""
        self._space = space
        self._topology = dict(topology)
        self._max_params = max_params
        self._objectives = tuple(objectives)
        self._reported = reported
        self._max_rounds = max_rounds
        self._ratios = tuple(ratios)
        self._start = Size(start_depths, start_proxy_embed_dim)
        space.check(self._point(self._start))
        start_params = cost(space.decode(self._point(self._start)).model).params
        self._num_params_of: dict[Size, int | None] = {self._start: start_params}

    def next_batch(self, study: optuna.Study) -> list[Mapping[str, Scalar]] | None:
        """The points of the round that were not proposed yet, in the first round with the seed; None when growth has ended.

        Empty while the round only waits for trials in flight.
        """
        growing = self._grow(study)
        if growing.ended and not growing.wanted:
            self.ended = growing.ended
            if growing.winners and not self._reported_of(growing):
                self.ended += f"; none of the {len(growing.winners)} networks on the way is within {self._reported}"
            return None
        return [self._point(size) for size in growing.wanted]

    def unwanted(self, study: optuna.Study) -> list[FrozenTrial]:
        """Empty: a round that was begun is measured to its end."""
        return []

    def num_total(self, study: optuna.Study) -> int | None:
        """The most trials there will be, for every round decides which candidates the next one has; None without `max_rounds`."""
        growing = self._grow(study)
        num_complete = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        if growing.ended:
            return num_complete + len(growing.wanted)
        if self._max_rounds is None:
            return None
        ahead = most_trials(self._max_rounds - growing.num_rounds, parent=growing.parent, ratios=self._ratios)
        return num_complete - growing.num_scored + ahead + (self._start not in self._known(study))

    def family(self, study: optuna.Study) -> list[FrozenTrial]:
        """The winners of the finished rounds that are within the reported budget, in order: the seed, then each scaled network."""
        return self._reported_of(self._grow(study))

    def _reported_of(self, growing: _Growing) -> list[FrozenTrial]:
        return [winner for winner in growing.winners if self._reported.holds(self._space.decode(winner.params))]

    def _grow(self, study: optuna.Study) -> _Growing:
        """Follow the told trials round by round, up to the first round that is not told completely."""
        known = self._known(study)
        growing = _Growing()
        parent = self._start
        if not self._fits(parent):
            growing.ended = f"the seed has {self._num_params(parent):,} parameters, more than {self._max_params:,}"
            return growing
        if parent not in known:
            growing.wanted.append(parent)
        elif known[parent].state == TrialState.COMPLETE:
            growing.winners.append(known[parent])
        for round_number in itertools.count(1):
            if self._max_rounds is not None and round_number > self._max_rounds:
                growing.ended = f"{self._max_rounds} rounds are done, and no more are wanted (--rounds)"
                break
            growing.parent, growing.num_rounds = parent, round_number - 1
            sizes = [size for size in grown(parent, self._ratios) if self._fits(size)]
            told = [known[size] for size in sizes if size in known and known[size].state.is_finished()]
            complete = [trial for trial in told if trial.state == TrialState.COMPLETE]
            if not sizes:
                growing.ended = f"no candidate of round {round_number} is in the space and has at most {self._max_params:,} parameters"
                break
            growing.num_scored = len(complete)
            if len(told) < len(sizes):
                growing.wanted += [size for size in sizes if size not in known]
                break
            if not complete:
                growing.ended = f"none of the {len(told)} candidates of round {round_number} could be scored"
                break
            best = best_by_ranks(complete, self._objectives)
            winner = min(best, key=lambda trial: (self._num_params(_size(trial.params)), trial.number))
            growing.winners.append(winner)
            parent = _size(winner.params)
        return growing

    def _known(self, study: optuna.Study) -> dict[Size, FrozenTrial]:
        """By size the trial that counts: the first complete one, else the first finished, else the first in flight."""
        known: dict[Size, FrozenTrial] = {}
        for trial in study.get_trials(deepcopy=False):
            params = proposed_point(trial)
            if any(params.get(axis) != value for axis, value in self._topology.items()) or not params.keys() >= GROWING_AXES:
                continue
            size = _size(params)
            if size not in known or _standing(trial) > _standing(known[size]):
                known[size] = trial
        return known

    def _fits(self, size: Size) -> bool:
        num_params = self._num_params(size)
        return num_params is not None and num_params <= self._max_params

    def _num_params(self, size: Size) -> int | None:
        """Parameters of the real network; None if the space has no such network."""
        if size not in self._num_params_of:
            try:
                self._space.check(self._point(size))
                self._num_params_of[size] = cost(self._space.decode(self._point(size)).model).params
            except SpecError:
                self._num_params_of[size] = None
        return self._num_params_of[size]

    def _point(self, size: Size) -> dict[str, Scalar]:
        return {**self._topology, **dict(zip(DEPTH_AXES, size.depths, strict=True)), WIDTH_AXIS: size.proxy_embed_dim}


@dataclass
class _Growing:
    """How far growth has come: the winners so far, the sizes to ask for next, and why it ended if it has.

    `num_rounds` are finished; `num_scored` candidates of the round after `parent` are.
    """

    winners: list[FrozenTrial] = field(default_factory=list)
    wanted: list[Size] = field(default_factory=list)
    ended: str = ""
    parent: Size = START
    num_rounds: int = 0
    num_scored: int = 0


def _size(params: Mapping[str, Any]) -> Size:
    return Size(tuple(params[axis] for axis in DEPTH_AXES), params[WIDTH_AXIS])


def _standing(trial: FrozenTrial) -> int:
    return 2 if trial.state == TrialState.COMPLETE else int(trial.state.is_finished())

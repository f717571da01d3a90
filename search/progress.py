"""Where a phase or an evaluation stands: the tally of its trials, and the line that shows it.

The line is rewritten on a terminal and repeated, now and then, in a pipe or a job's log. tqdm and rich write it for a terminal alone:
in a log tqdm leaves carriage returns, and rich shows nothing before the end.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import TextIO

import numpy as np

from results.columns import terminal_width
from results.formats import shortened
from results.pareto import front_first_ranks, to_minimize
from results.records import Metric
from results.waiting import repeating, waiting
from space.recipe import Recipe
from workers.evaluator import PROGRESS, Call

REDRAW_S = 0.2
LOG_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Status:
    """Counts of a phase's trials; `total` is None where a proposer decides the end, `best` words for the one that ranks first.

    `awaits` says what all running trials still wait for, before any of them starts.
    `running_share` is the sum over the running trials of the share each has done, None if none has said; `head_start` the
    share that trials resumed in this process had done before it.
    """

    title: str
    complete: int
    total: int | None
    running: int
    awaits: str = ""
    failed: int = 0
    pruned: int = 0
    best: str = ""
    running_share: float | None = None
    head_start: float = 0.0


class Tally:
    """Counts the trials of a phase, finds the one that ranks first, and adds up what the running trials have done.

    Without `goals` no trial is named the best.
    """

    def __init__(self, title: str, goals: Sequence[Metric]):
        self.total: int | None = None
        self._title, self._goals = title, tuple(goals)
        self._counts: Counter[str] = Counter()
        self._measured: dict[int, Sequence[float]] = {}
        self._best = ""
        self._num_compared = 0
        self._shares: dict[int, float] = {}
        self._head_starts: dict[int, float] = {}
        self._adopted: set[int] = set()

    @property
    def complete(self) -> int:
        return self._counts["COMPLETE"]

    def count(self, state: str) -> None:
        """Add a trial that ended in `state`, COMPLETE, FAIL or PRUNED."""
        self._counts[state] += 1

    def note_measured(self, number: int, values: Sequence[float]) -> None:
        """The trial has measured these objectives. One that was told what another measured is not noted: tables show it once."""
        self._measured[number] = values

    def note_adopted(self, number: int) -> None:
        """The trial was begun by an earlier driver: the share it has done when it first reports is none of this one's work."""
        self._adopted.add(number)

    def note_share(self, number: int, share: float) -> None:
        """A running trial has done this share of its work, from 0 to 1."""
        if number in self._adopted:
            self._head_starts.setdefault(number, share)
        self._shares[number] = share

    def forget_share(self, number: int) -> None:
        """The trial no longer runs."""
        self._shares.pop(number, None)

    def status(self, *, running: int, awaits: str = "") -> Status:
        return Status(
            title=self._title,
            complete=self.complete,
            total=self.total,
            running=running,
            awaits=awaits,
            failed=self._counts["FAIL"],
            pruned=self._counts["PRUNED"],
            best=self._first(),
            running_share=sum(self._shares.values()) if self._shares else None,
            head_start=sum(self._head_starts.values()),
        )

    def _first(self) -> str:
        """The trial that ranks first, as leaderboards rank, with its values."""
        if self._goals and len(self._measured) > self._num_compared:
            self._num_compared = len(self._measured)
            numbers = sorted(self._measured)
            values = np.array([self._measured[number] for number in numbers])
            first = numbers[int(front_first_ranks(to_minimize(values, [metric.goal for metric in self._goals])).argmin())]
            named = zip(self._goals, self._measured[first], strict=True)
            self._best = f"trial {first}: " + ", ".join(f"{metric.name} {value:.4g}" for metric, value in named)
        return self._best


class LiveLine:
    """A line that is rewritten on a terminal and repeated in a pipe or a job's log; other lines stand above it."""

    def __init__(self, stream: TextIO, width: Callable[[], int]):
        self._stream, self._width = stream, width
        self.is_terminal = stream.isatty()
        self._reader_has_gone = False
        self._shown = ""

    @property
    def interval_s(self) -> float:
        """The least seconds between two states worth showing."""
        return REDRAW_S if self.is_terminal else LOG_EVERY_S

    def show(self, line: str, *, final: bool = False) -> None:
        """Show `line` in the place of the last one; `final` ends it."""
        if self.is_terminal and (final or line != self._shown):
            # A line that wraps could not be rewritten: clearing reaches its last row alone.
            self._put(f"\r\x1b[K{shortened(line, self._width() - 1)}" + ("\n" if final else ""))
        elif line != self._shown:
            self._put(f"{line}\n")
        self._shown = line

    def say(self, text: str) -> None:
        """A line of its own."""
        self._put(f"\r\x1b[K{text}\n" if self.is_terminal else f"{text}\n")
        self._shown = ""

    def _put(self, text: str) -> None:
        if self._reader_has_gone:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            # `| head` has seen enough; the study has not.
            self._reader_has_gone = True


class Progress:
    """Shows a `Status` that changes; rate and ETA come from the trials, whole and begun, done since this process began the phase."""

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        width: Callable[[], int] = terminal_width,
    ):
        self._line = LiveLine(stream or sys.stdout, width)
        self._clock = clock
        self._title: str | None = None
        self._awaits = ""
        self._shown_at = float("-inf")

    def show(self, status: Status, *, final: bool = False) -> None:
        """Show `status` if it is due; `final` always shows it and ends the line."""
        if not (final or self.is_due(status.title, status.awaits)):
            return
        now = self._clock()
        self._awaits = status.awaits
        if status.title != self._title:
            self._title, self._began_at, self._began_complete = status.title, now, status.complete
        self._line.show(self._text(status, now), final=final)
        self._shown_at = now

    def is_due(self, title: str, awaits: str) -> bool:
        """Whether a status with this title and this that is awaited would be shown now."""
        return (title, awaits) != (self._title, self._awaits) or self._clock() - self._shown_at >= self._line.interval_s

    def say(self, text: str) -> None:
        """A line of its own, above the status."""
        self._line.say(text)

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """While the block runs, say `what` once it takes long."""
        return waiting(what, self.say)

    def _text(self, status: Status, now: float) -> str:
        total = "" if status.total is None else f"/{status.total}"
        share = "" if status.running_share is None else f" ({100 * status.running_share / max(status.running, 1):.0f} %)"
        counts = [f"{status.complete}{total} done", f"{status.running} running{share}"]
        counts += [f"{status.failed} failed"] if status.failed else []
        counts += [f"{status.pruned} outside the budget"] if status.pruned else []
        begun = status.running_share or 0.0
        elapsed, done = now - self._began_at, status.complete - self._began_complete + begun - status.head_start
        pace = []
        if done > 0 and elapsed > 0:
            rate = done / elapsed
            pace.append(_rate(rate))
            if status.total is not None and status.complete < status.total:
                pace.append(f"ETA {_duration((status.total - status.complete - begun) / rate)}")
        awaits = f"waiting for {status.awaits}" if status.awaits else ""
        # The best values last: they are the longest, and a narrow terminal cuts them.
        fields = [", ".join(counts), awaits, *pace, f"{_duration(elapsed)} elapsed", f"best {status.best}" if status.best else ""]
        return _joined(status.title, fields)


class EvaluationProgress:
    """Shows one evaluation as it goes: which evaluator is at work, its epoch and ETA, and what it reports.

    `recipe` says how many epochs there are, where an evaluator trains.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        recipe: Recipe | None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        width: Callable[[], int] = terminal_width,
    ):
        self._line = LiveLine(stream or sys.stderr, width)
        self._clock, self._calls, self._recipe = clock, tuple(calls), recipe
        self._begin("", 0)

    @contextmanager
    def around(self, call: Call) -> Iterator[None]:
        """Show the evaluator while the block runs."""
        place = f"evaluator {self._calls.index(call) + 1} of {len(self._calls)}"
        self._begin(f"{call.name} ({place})", _num_epochs(call, self._recipe))
        self._line.show(self.text())
        try:
            with repeating(repeat(self._line.interval_s), lambda elapsed_s: self._line.show(self.text())):
                yield
        finally:
            self._complete_step()
            self._line.show(self.text(), final=True)

    def report(self, name: str, value: float, step: int) -> None:
        """A point of a curve, or the share that is done."""
        if name == PROGRESS:
            self._share = value
            self._first_share = self._first_share or (self._clock(), value)
        # The points of an epoch come one by one: they are shown once the next is under way.
        if name == PROGRESS or step != self._step:
            self._complete_step()
        if name != PROGRESS:
            self._coming[name] = value
            self._step = step

    def _complete_step(self) -> None:
        if self._coming:
            # New values in place of the old: the thread that shows them may be reading those.
            self._reported = self._step, {**self._reported[1], **self._coming}
            self._coming = {}

    def _begin(self, title: str, num_epochs: int) -> None:
        self._title, self._num_epochs, self._began_at = title, num_epochs, self._clock()
        self._share = 0.0
        self._first_share: tuple[float, float] | None = None
        self._step = 0
        self._reported: tuple[int, dict[str, float]] = (0, {})
        self._coming: dict[str, float] = {}

    def text(self) -> str:
        """The line as it stands."""
        now = self._clock()
        step, reported = self._reported
        epoch = f"epoch {step} of {self._num_epochs}" if self._num_epochs and step else ""
        eta = ""
        if self._first_share is not None and 0 < self._share < 1:
            since, before = self._first_share
            if self._share > before:
                eta = f"ETA {_duration((1 - self._share) * (now - since) / (self._share - before))}"
        values = ", ".join(f"{name} {value:.4g}" for name, value in reported.items())
        return _joined(self._title, [epoch, eta, f"{_duration(now - self._began_at)} elapsed", values])


def _num_epochs(call: Call, recipe: Recipe | None) -> int:
    """Of the training that the evaluator runs; 0 if it runs none."""
    stop = call.evaluator.continued_by
    return getattr(call.settings, stop) or recipe.epochs if stop and recipe else 0


def _joined(title: str, fields: Sequence[str]) -> str:
    return f"{title}  " + " | ".join(field for field in fields if field)


def _rate(per_s: float) -> str:
    for period_s, unit in ((1, "s"), (60, "min")):
        if per_s * period_s >= 1:
            return f"{per_s * period_s:.1f}/{unit}"
    return f"{per_s * 3600:.1f}/h"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

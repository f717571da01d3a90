"""Where a phase stands: the tally of its trials, and the line that shows it, rewritten on a terminal, repeated in a log."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

from results.records import Metric

REDRAW_S = 0.2
LOG_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Status:
    """Counts of a phase's trials; `total` is None where a proposer decides the end, `best` words for the best so far.

    `running_share` is the sum over the running trials of the share each has done, None if none has said; `head_start` the
    share that trials resumed in this process had done before it.
    """

    title: str
    complete: int
    total: int | None
    running: int
    failed: int = 0
    pruned: int = 0
    best: str = ""
    running_share: float | None = None
    head_start: float = 0.0


class Tally:
    """Counts the trials of a phase, keeps its best values, and adds up what the running trials have done."""

    def __init__(self, title: str, goals: Sequence[Metric]):
        self.total: int | None = None
        self._title, self._goals = title, tuple(goals)
        self._counts: Counter[str] = Counter()
        self._best: dict[str, float] = {}
        self._shares: dict[int, float] = {}
        self._head_starts: dict[int, float] = {}
        self._adopted: set[int] = set()

    @property
    def complete(self) -> int:
        return self._counts["COMPLETE"]

    def count(self, state: str, values: Sequence[float] | None = None) -> None:
        """Add a trial that ended in `state`, COMPLETE, FAIL or PRUNED, with the values of its objectives."""
        self._counts[state] += 1
        for metric, value in zip(self._goals, values or (), strict=False):
            better = max if metric.goal == "maximize" else min
            self._best[metric.name] = better(value, self._best.get(metric.name, value))

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

    def status(self, *, running: int) -> Status:
        return Status(
            title=self._title,
            complete=self.complete,
            total=self.total,
            running=running,
            failed=self._counts["FAIL"],
            pruned=self._counts["PRUNED"],
            best=", ".join(f"{name} {value:.4g}" for name, value in self._best.items()),
            running_share=sum(self._shares.values()) if self._shares else None,
            head_start=sum(self._head_starts.values()),
        )


class Progress:
    """Shows a `Status` that changes; rate and ETA come from the trials, whole and begun, done since this process began the phase."""

    def __init__(
        self,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        width: Callable[[], int] = lambda: shutil.get_terminal_size().columns,
    ):
        self._stream = stream or sys.stdout
        self._clock = clock
        self._width = width
        self._is_terminal = self._stream.isatty()
        self._reader_has_gone = False
        self._title: str | None = None
        self._shown_at = float("-inf")
        self._shown = ""

    def show(self, status: Status, *, final: bool = False) -> None:
        """Show `status` if it is due; `final` always shows it and ends the line."""
        now = self._clock()
        if status.title != self._title:
            self._title, self._began_at, self._began_complete = status.title, now, status.complete
            self._shown_at, self._shown = float("-inf"), ""
        interval = REDRAW_S if self._is_terminal else LOG_EVERY_S
        line = self._line(status, now)
        if final or (now - self._shown_at >= interval and line != self._shown):
            self._write(line, final)
            self._shown_at, self._shown = now, line

    def say(self, text: str) -> None:
        """A line of its own, above the status."""
        self._put(f"\r\x1b[K{text}\n" if self._is_terminal else f"{text}\n")

    def _write(self, line: str, final: bool) -> None:
        if self._is_terminal:
            # A line that wraps could not be rewritten: clearing reaches its last row alone.
            self._put(f"\r\x1b[K{cut(line, self._width() - 1)}" + ("\n" if final else ""))
        else:
            self._put(line + "\n")

    def _put(self, text: str) -> None:
        if self._reader_has_gone:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            # `| head` has seen enough; the study has not.
            self._reader_has_gone = True

    def _line(self, status: Status, now: float) -> str:
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
        # The best values last: they are the longest, and a narrow terminal cuts them.
        fields = [", ".join(counts), *pace, f"{_duration(elapsed)} elapsed", f"best {status.best}" if status.best else ""]
        return f"{status.title}  " + " | ".join(field for field in fields if field)


def cut(line: str, width: int) -> str:
    """The line, shortened to so many characters where it is longer."""
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _rate(per_s: float) -> str:
    for period_s, unit in ((1, "s"), (60, "min")):
        if per_s * period_s >= 1:
            return f"{per_s * period_s:.1f}/{unit}"
    return f"{per_s * 3600:.1f}/h"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

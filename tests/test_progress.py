"""What a person sees while a phase runs."""

from __future__ import annotations

import io
import os

import pytest

from search.progress import Progress, Status


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def status(complete: int, **fields) -> Status:
    return Status(**{"title": "as_vit/topology", "complete": complete, "total": 10, "running": 2, **fields})


def test_a_log_gets_a_line_now_and_then_with_rate_and_eta():
    now, stream = [0.0], io.StringIO()
    progress = Progress(stream, lambda: now[0])
    for second in range(25):
        now[0] = float(second)
        progress.show(status(second // 5, best="length_distortion 0.5"))
    lines = stream.getvalue().splitlines()
    assert lines == [
        "as_vit/topology  0/10 done, 2 running | 0:00 elapsed | best length_distortion 0.5",
        "as_vit/topology  2/10 done, 2 running | 12.0/min | ETA 0:40 | 0:10 elapsed | best length_distortion 0.5",
        "as_vit/topology  4/10 done, 2 running | 12.0/min | ETA 0:30 | 0:20 elapsed | best length_distortion 0.5",
    ]


def test_a_terminal_gets_one_line_rewritten():
    now, stream = [0.0], Terminal()
    progress = Progress(stream, lambda: now[0])
    progress.show(status(1, failed=3, pruned=2))
    now[0] = 1.0
    progress.show(status(10, running=0), final=True)
    assert "3 failed, 2 outside the budget" in stream.getvalue()
    assert stream.getvalue().count("\n") == 1


def test_a_reader_that_has_gone_does_not_stop_the_study():
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w")
    os.close(reading)
    progress = Progress(stream, lambda: 0.0)
    progress.say("first")
    progress.show(status(1))
    assert status(1).complete == 1


def test_trials_of_an_earlier_run_do_not_count_into_the_rate():
    now, stream = [0.0], io.StringIO()
    progress = Progress(stream, lambda: now[0])
    progress.show(status(8))
    now[0] = 60.0
    progress.show(status(9))
    assert "1.0/min | ETA 1:00" in stream.getvalue()


def line(progress: Progress, stream: io.StringIO, shown: Status) -> str:
    progress.show(shown, final=True)
    return stream.getvalue().splitlines()[-1]


def test_the_first_trials_have_an_eta_before_any_is_done():
    now, stream = [0.0], io.StringIO()
    progress = Progress(stream, lambda: now[0])
    progress.show(status(0))
    now[0] = 60.0
    shown = line(progress, stream, status(0, running_share=0.5))
    assert shown == "as_vit/topology  0/10 done, 2 running (25 %) | 30.0/h | ETA 19:00 | 1:00 elapsed"


def test_what_a_resumed_trial_had_done_before_does_not_count_into_the_rate():
    now, stream = [0.0], io.StringIO()
    progress = Progress(stream, lambda: now[0])
    progress.show(status(0))
    now[0] = 60.0
    assert "ETA 18:00" in line(progress, stream, status(0, running_share=1.0, head_start=0.5))


@pytest.mark.parametrize("columns", [40, 80])
def test_a_line_never_wraps_on_a_terminal_and_says_what_counts_first(columns: int):
    stream = Terminal()
    progress = Progress(stream, lambda: 0.0, lambda: columns)
    progress.show(status(1, best="length_distortion 0.004512, ntk_condition 121.4, params_m 11.42, gmacs 1.7"), final=True)
    line = stream.getvalue().removeprefix("\r\x1b[K").rstrip("\n")
    assert len(line) == columns - 1
    assert line.startswith("as_vit/topology  1/10 done, 2 running")
    assert line.endswith("…")

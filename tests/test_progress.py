"""What a person sees while a phase runs."""

from __future__ import annotations

import io
import os
import re
import threading

import numpy as np
import pytest

from results.pareto import front_first_ranks
from results.records import Metric
from results.waiting import waiting
from search.progress import EvaluationProgress, Progress, Status, Tally
from space.recipe import Recipe
from workers.evaluator import PROGRESS, Call
from workers.evaluators.train import TrainSettings


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


def test_what_trials_wait_for_is_said_at_once_and_when_it_changes():
    now, stream = [0.0], io.StringIO()
    progress = Progress(stream, lambda: now[0])
    for awaits in ("", "the data", "the data", "workers to start", ""):
        now[0] += 1
        progress.show(status(0, awaits=awaits))
    assert [line.partition(" | ")[2] for line in stream.getvalue().splitlines()] == [
        "0:00 elapsed",
        "waiting for the data | 0:01 elapsed",
        "waiting for workers to start | 0:03 elapsed",
        "0:04 elapsed",
    ]


def test_the_last_line_of_a_phase_is_not_said_twice_in_a_log():
    stream = io.StringIO()
    progress = Progress(stream, lambda: 0.0)
    progress.show(status(10))
    progress.show(status(10), final=True)
    assert len(stream.getvalue().splitlines()) == 1


GOALS = (Metric("accuracy", "maximize"), Metric("gmacs", "minimize"))


def test_the_best_is_one_network_the_one_that_ranks_first_with_its_own_values():
    tally = Tally("s/search", GOALS)
    measured = {0: (90.0, 9.0), 1: (10.0, 1.0), 2: (80.0, 2.0), 3: (70.0, 3.0)}
    for number, values in measured.items():
        tally.count("COMPLETE")
        tally.note_measured(number, values)
    ranks = front_first_ranks(np.array([(-accuracy, gmacs) for accuracy, gmacs in measured.values()]))
    assert ranks.tolist() == [2, 2, 1, 4]
    assert tally.status(running=0).best == "trial 2: accuracy 80, gmacs 2"


def test_single_seeds_of_a_design_have_no_best():
    tally = Tally("ablations/train", ())
    tally.count("COMPLETE")
    tally.note_measured(0, (98.0,))
    assert tally.status(running=0).best == ""


def test_a_long_wait_is_named_with_its_seconds_and_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("results.waiting.LATER_S", (0.0, 60.0))
    said, is_said_twice = [], threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            is_said_twice.set()

    with waiting("starting Ray", say, first_s=0.0):
        assert is_said_twice.wait(60)
    assert all(re.fullmatch(r"starting Ray: \d+ s so far", text) for text in said)


def test_a_short_wait_says_nothing_and_hides_no_error():
    said = []
    with pytest.raises(KeyError), waiting("starting Ray", said.append, first_s=60):
        raise KeyError
    assert said == []


def evaluation(now: list[float], stream: io.StringIO, calls: list[Call]) -> EvaluationProgress:
    return EvaluationProgress(calls, Recipe(epochs=20, seed=0), stream, lambda: now[0])


def test_an_evaluation_shows_evaluators_epochs_what_they_report_and_an_eta():
    now, stream = [0.0], io.StringIO()
    calls = [Call("train", TrainSettings()), Call("cost")]
    progress = evaluation(now, stream, calls)
    with progress.around(calls[0]):
        progress.report(PROGRESS, 0.1, 2)
        now[0] = 30.0
        for name, value in (("train_loss", 1.25), ("val_top1_pct", 71.0)):
            progress.report(name, value, 5)
        progress.report(PROGRESS, 0.4, 8)
    with progress.around(calls[1]):
        pass
    assert stream.getvalue().splitlines() == [
        "train (evaluator 1 of 2)  0:00 elapsed",
        "train (evaluator 1 of 2)  epoch 5 of 20 | ETA 1:00 | 0:30 elapsed | train_loss 1.25, val_top1_pct 71",
        "cost (evaluator 2 of 2)  0:00 elapsed",
    ]


def test_the_values_of_an_epoch_are_shown_together():
    now, stream = [0.0], Terminal()
    progress = evaluation(now, stream, [Call("train", TrainSettings(stop_after=7))])
    with progress.around(Call("train", TrainSettings(stop_after=7))):
        for name, value in (("train_loss", 2.0), ("val_nll", 3.0)):
            progress.report(name, value, 1)
        progress.report("train_loss", 1.0, 2)
        assert progress.text() == "train (evaluator 1 of 1)  epoch 1 of 7 | 0:00 elapsed | train_loss 2, val_nll 3"
    assert stream.getvalue().endswith("\n")
    assert stream.getvalue().count("\n") == 1


def test_an_evaluator_that_fails_leaves_its_line_ended():
    stream = Terminal()
    progress = evaluation([0.0], stream, [Call("cost")])
    with pytest.raises(RuntimeError), progress.around(Call("cost")):
        raise RuntimeError
    assert stream.getvalue().endswith("elapsed\n")

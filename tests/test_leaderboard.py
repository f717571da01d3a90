"""The leaderboard: exact fronts and ranks, and the files and messages a user sees."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import run_here, run_pasted
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import results.page as page
from results.attachments import attach_leaderboard
from results.figures.leaderboard import charts, panels
from results.leaderboard import main
from results.mlflow_store import MlflowTracker, UnreadableStudy, mlflow_client
from results.pareto import front_first_ranks, mean_ranks, pareto_front
from results.paths import RunPaths, default_runs
from results.records import Failure, Measurement, Metric
from results.report import load_report
from results.study_results import load
from results.text import markdown, text_table
from results.tracking import TrialRecord

GOALS = [Metric("length_distortion", "maximize"), Metric("ntk_condition", "minimize")]
costs = st.integers(1, 4).flatmap(lambda k: arrays(float, st.tuples(st.integers(0, 30), st.just(k)), elements=st.integers(0, 6).map(float)))


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a <= b).all() and (a < b).any())


@given(costs)
def test_the_front_is_what_nothing_dominates(points):
    expected = [not any(dominates(other, point) for other in points) for point in points]
    assert pareto_front(points).tolist() == expected


@given(costs)
def test_a_network_ranks_above_those_it_dominates_and_on_the_front_above_all_others(points):
    means, ranks, is_front = mean_ranks(points), front_first_ranks(points), pareto_front(points)
    for i, first in enumerate(points):
        for j, second in enumerate(points):
            if dominates(first, second):
                assert means[i] < means[j]
                assert ranks[i] < ranks[j]
            if is_front[i] and not is_front[j]:
                assert ranks[i] < ranks[j]
            if is_front[i] == is_front[j]:
                assert (ranks[i] < ranks[j]) == (means[i] < means[j])


def test_a_good_compromise_off_the_front_ranks_below_the_extremes_on_it():
    points = np.array([[0.0, 9.0], [1.0, 1.0], [9.0, 0.0], [1.0, 1.5], [8.0, 8.0]])
    assert mean_ranks(points).tolist() == [3, 2.25, 3, 2.75, 4]
    assert front_first_ranks(points).tolist() == [2, 1, 2, 4, 5]


def test_a_missing_value_is_never_on_the_front_and_ranks_last():
    points = np.array([[1.0, np.nan], [2.0, 2.0], [3.0, 1.0]])
    assert pareto_front(points).tolist() == [False, True, True]
    assert mean_ranks(points).tolist() == [3.0, 1.5, 1.5]
    assert pareto_front(np.array([[np.inf, 0.0], [0.0, np.inf], [np.inf, np.inf]])).tolist() == [True, True, False]


def record(phase: str, number: int, **changes) -> TrialRecord:
    fields = {
        "label": f"as_vit:8,2,{number}|<b>",
        "digest": f"{number + 1:06x}{'ab' * 5}",
        "params": {"kernel_0": number},
        "candidate": {"label": "x", "model": {}},
    }
    return TrialRecord(study_name="as_vit", phase=phase, number=number, **{**fields, **changes})


def measured(distortion: float, condition: float, **more: float) -> Measurement:
    values = {"length_distortion": distortion, "length_distortion_stderr": 0.1, "ntk_condition": condition, "gmacs": distortion / 2}
    return Measurement(values={**values, **more}, elapsed_s=2.0, device="cpu", versions={"torch": "2.13.0"}, seed=0)


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory) -> Path:
    """A study of two invocations: 12 topologies, one given again, one failed; and a family of three."""
    root = tmp_path_factory.mktemp("runs")
    arguments = {"invocation": {"command": "run.py as_vit"}, "objectives": {"topology": GOALS, "growth": GOALS}}
    tracker = MlflowTracker(RunPaths(root).mlflow_uri, "as_vit", **arguments)
    for number in range(12):
        depth = 4.0
        tracker.record(record("topology", number), measured(1 + number, 10.0 + (number * 7) % 12, params_m=2.0 + number, depth=depth))
    tracker.record(record("topology", 12), Failure(kind="non_finite", message="nan"))
    tracker.close("KILLED")
    tracker = MlflowTracker(RunPaths(root).mlflow_uri, "as_vit", **arguments)
    again = record("topology", 13, label="as_vit:again", digest=record("topology", 3).digest, reused_from=3)
    tracker.record(again, measured(4, 10.0 + 21 % 12, params_m=5.0, depth=4.0))
    for number in range(3):
        tracker.record(
            record("growth", number, proxy_digest=f"{number:016x}"), measured(2 + number, 50 - number, params_m=5.0 * number + 1)
        )
    tracker.mark_family("growth", [0, 2])
    attach_leaderboard(tracker)
    tracker.close("FINISHED")
    return root


def test_every_measurement_has_one_row_with_its_rank_and_front(runs_dir):
    frame = load(RunPaths(runs_dir).mlflow_uri, "as_vit")
    topology = frame[frame["phase"] == "topology"]
    assert sorted(topology["trial"]) == list(range(12))
    points = np.stack([-topology["length_distortion"], topology["ntk_condition"]], axis=1)
    assert topology["is_front"].tolist() == [not any(dominates(other, point) for other in points) for point in points]
    assert topology["rank"].is_monotonic_increasing
    assert topology["is_front"].is_monotonic_decreasing
    assert topology["rank"].iloc[0] == 1
    assert topology["is_front"].iloc[0]
    growth = frame[frame["phase"] == "growth"]
    assert set(growth["proxy_digest"]) == {f"{number:016x}" for number in range(3)}
    assert growth.set_index("trial")["family_step"].dropna().to_dict() == {0: 0.0, 2: 1.0}


def test_failures_and_repeats_are_counted_apart(runs_dir):
    results = load_report(RunPaths(runs_dir).mlflow_uri, "as_vit").results
    assert results.num_failed == {"topology": {"non_finite": 1}}
    assert results.num_reused == {"topology": 1}
    assert results.phases == ["topology", "growth"]


def test_the_parent_run_carries_table_page_figure_and_description(runs_dir):
    client = mlflow_client(RunPaths(runs_dir).mlflow_uri)
    experiment = client.get_experiment_by_name("as_vit")
    assert experiment is not None
    parents = client.search_runs([experiment.experiment_id], "tags.kind = 'invocation' and attributes.status = 'FINISHED'")
    assert {file.path for file in client.list_artifacts(parents[0].info.run_id)} == {
        f"leaderboard.{kind}" for kind in ("csv", "html", "png")
    }
    assert "| rank | label |" in parents[0].data.tags["mlflow.note.content"]


def test_a_bar_in_a_label_does_not_break_the_description(runs_dir):
    rows = [line for line in markdown(load_report(RunPaths(runs_dir).mlflow_uri, "as_vit")).split("\n") if line.startswith("| ")]
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in rows[:3]]
    assert len(set(cells)) == 1


def test_the_command_prints_a_table_and_writes_its_files(runs_dir, tmp_path):
    files = ["--csv", "out/a.csv", "--html", "a.html", "--png", "a.png"]
    command = [sys.executable, "-m", "results.leaderboard", "as_vit", "--top", "5", *files]
    environment = {**os.environ, "VITSCALE_RUNS": str(runs_dir)}
    environment.pop("COLUMNS", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.split("\n"))) <= 80
    words = " ".join(done.stdout.split())
    assert (
        "12 measured; 4 on the Pareto front; 1 repeat left out; 1 failed (1 non_finite). Networks on the Pareto front rank first" in words
    )
    assert "7 more rows; left out for 80 columns: params_m, depth, trial, elapsed_s" in words
    assert "the family, in the order it grew" in done.stdout
    assert "too few networks (3 of 10)" in done.stdout
    frame = pd.read_csv(tmp_path / "out" / "a.csv")
    assert len(frame) == 15
    assert {"rank", "label", "digest", "phase", "trial", "length_distortion", "gmacs"} <= set(frame.columns)
    assert Image.open(tmp_path / "a.png").width > 1500


@pytest.mark.parametrize("columns", [50, 80])
def test_tables_fit_the_terminal_and_the_printed_command_shows_what_was_left_out(runs_dir, tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    printed = run_here(main, "as_vit", "--top", "2", "--phase", "topology", "--runs", runs_dir, cwd=tmp_path).stdout.splitlines()
    (hint,) = [line.removeprefix("all: ") for line in printed if line.startswith("all: ")]
    assert max(len(line) for line in printed if hint not in line) <= columns
    assert f"left out for {columns} columns: " in " ".join(printed)
    everything = run_pasted(hint, cwd=tmp_path, env={"COLUMNS": str(columns)})
    assert everything.returncode == 0, everything.stderr
    assert "left out for" not in everything.stdout
    (head,) = [line for line in everything.stdout.splitlines() if line.startswith("rank ")]
    names = ["rank", "label", "digest", "length_distortion", "ntk_condition", "gmacs", "params_m", "depth", "trial", "elapsed_s"]
    assert head.split() == names
    assert everything.stdout.count("as_vit:8,2,") == 12


def test_a_label_that_is_shortened_leaves_a_digest_that_can_be_used(tmp_path: Path):
    digest = "0123456789abcdef"
    tracker = MlflowTracker(RunPaths(tmp_path).mlflow_uri, "s", invocation={}, objectives={"train": GOALS})
    tracker.record(record("train", 0, label="|".join(["4,2,3,1"] * 12), digest=digest), measured(1.0, 2.0))
    tracker.close("FINISHED")
    results = load_report(RunPaths(tmp_path).mlflow_uri, "s").results
    _, row, *_ = text_table(results, "train", 5, "", 60).splitlines()
    assert digest[:8] in row
    assert "4,2,3,1|" in row
    assert "…" in row


def test_the_rule_of_the_rank_stands_with_every_table(runs_dir, tmp_path):
    report = load_report(RunPaths(runs_dir).mlflow_uri, "as_vit")
    rule = (
        "Networks on the Pareto front rank first, then the others; within each part the mean of the ranks in length_distortion (maximize)"
    )
    printed = run_here(main, "as_vit", "--runs", runs_dir, cwd=tmp_path).stdout
    for shown in (printed, markdown(report), page.render(report)):
        assert " ".join(shown.split()).count(rule) == 2


def test_the_page_loads_nothing_and_escapes_labels(runs_dir, tmp_path):
    page.write_html(load_report(RunPaths(runs_dir).mlflow_uri, "as_vit"), tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    loaded = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: loaded.extend(value for name, value in attrs if name in ("src", "href"))
    parser.feed(text)
    assert loaded == ["data:,"]
    assert "&lt;b&gt;" in text
    assert "as_vit:8,2,3|<b>" not in text
    assert "run.py as_vit" in text


def test_a_huge_table_is_cut_and_says_so(runs_dir, monkeypatch):
    monkeypatch.setattr(page, "MAX_ROWS", 5)
    text = page.render(load_report(RunPaths(runs_dir).mlflow_uri, "as_vit"))
    assert "the 5 best of 12; the CSV has all" in text


def test_the_line_is_the_best_at_a_cost_only_where_networks_differ_in_cost(tmp_path: Path):
    tracker = MlflowTracker(RunPaths(tmp_path).mlflow_uri, "s", invocation={}, objectives={"search": GOALS, "tune": GOALS[:1]})
    for number in range(3):
        tracker.record(record("search", number), measured(1.0 + number, 2.0))
        tracker.record(record("tune", number), measured(1.0 + number, 2.0, gmacs=1.0))
    search, tune = panels(load_report(RunPaths(tmp_path).mlflow_uri, "s").results)
    assert [panel.cost for panel in search] == ["gmacs", "gmacs"]
    assert [panel.cost for panel in tune] == ["trial"]
    assert "best at this cost" in charts(search)
    assert "best so far" not in charts(search)
    assert "best so far" in charts(tune)
    assert "best at this cost" not in charts(tune)


@pytest.mark.parametrize("phase", ["growth", "grwth"])
def test_one_phase_can_be_asked_for(runs_dir, tmp_path, phase):
    done = run_here(main, "as_vit", "--phase", phase, "--runs", runs_dir, cwd=tmp_path)
    if phase == "growth":
        assert done.returncode == 0
        assert "as_vit/topology" not in done.stdout
    else:
        assert done.returncode == 2
        assert done.stderr == "error: no measurement in a phase 'grwth'; phases: topology, growth\n"


def test_an_unknown_study_is_answered_with_the_nearest(runs_dir, tmp_path):
    done = run_here(main, "as_vitt", "--runs", runs_dir, cwd=tmp_path)
    assert done.returncode == 2
    assert "no study 'as_vitt'" in done.stderr
    assert "did you mean 'as_vit'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_store_is_said_and_not_created(tmp_path):
    done = run_here(main, "as_vit", cwd=tmp_path)
    assert done.returncode == 2
    assert f"no MLflow store at {tmp_path}/runs/mlflow.db" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_study_without_measurements_has_an_empty_leaderboard(runs_dir, tmp_path, capsys):
    uri = RunPaths(runs_dir).mlflow_uri
    tracker = MlflowTracker(uri, "empty", invocation={}, objectives={"topology": GOALS})
    tracker.record(record("topology", 0), Failure(kind="error", message="no"))
    results = attach_leaderboard(tracker).results
    tracker.close("FAILED")
    assert results.phases == []
    assert len(results.frame) == 0
    assert "no finished trial yet (1 failed)" in run_here(main, "empty", "--runs", runs_dir, cwd=tmp_path).stdout


def test_an_unreachable_server_is_one_error():
    with pytest.raises(UnreadableStudy, match="connection refused"):
        load("http://127.0.0.1:9", "as_vit")


def test_the_runs_directory_is_absolute_and_taken_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_runs({}) == tmp_path / "runs"
    assert default_runs({"VITSCALE_RUNS": "/data/runs"}) == Path("/data/runs")
    assert RunPaths(Path("runs")).journal == tmp_path / "runs" / "optuna.journal"


def test_one_network_under_two_recipes_has_two_rows(tmp_path: Path):
    tracker = MlflowTracker(RunPaths(tmp_path).mlflow_uri, "s", invocation={}, objectives={"train": GOALS})
    for number, recipe in enumerate(("aa", "bb", "aa")):
        tracker.record(record("train", number, digest="ab" * 8, recipe_digest=recipe), measured(1.0, 2.0))
    results = load_report(RunPaths(tmp_path).mlflow_uri, "s").results
    assert len(results.frame) == 2
    assert results.num_reused == {"train": 1}

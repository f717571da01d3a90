"""MLflow as a leaderboard: the view of each phase, its address, and what a browser shows there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import is_wider_than_window, overlaps
from conftest import run_here
from mlflow_page import artifact, cells, columns, run_table

from results import browse
from results.attachments import attach_leaderboard
from results.mlflow_store import MlflowTracker, mlflow_client, search_runs
from results.mlflow_views import MAX_METRICS, VIEW_TAG, how_to_browse, leaderboard_view, view_address
from results.paths import RunPaths
from results.records import Failure, Measurement, Metric
from results.tracking import TrialRecord
from search import run

DISTORTION, CONDITION = Metric("length_distortion", "maximize"), Metric("ntk_condition", "minimize")
OBJECTIVES = {"topology": [DISTORTION, CONDITION], "growth": [CONDITION]}
MEASURED = {phase: ["length_distortion", "ntk_condition", "closed_form", "params_m", "gmacs"] for phase in OBJECTIVES}


def record(tracker: MlflowTracker, phase: str, number: int, label: str, distortion: float, condition: float, **changes) -> None:
    trial = TrialRecord(
        study_name=tracker.study_name,
        phase=phase,
        number=number,
        label=label,
        digest=f"{changes.get('reused_from', number) + 1:016x}",
        params={"depth": number},
        candidate={"label": label, "model": {}},
        **changes,
    )
    values = {"length_distortion": distortion, "ntk_condition": condition, "closed_form": 7.0, "params_m": 2.5 + number, "gmacs": 1.25}
    outcome = Measurement(values=values, elapsed_s=1.0, device="cpu", versions={"torch": "2.13"}, seed=0)
    tracker.record(trial, outcome)


def fill(uri: str, study: str) -> dict[str, str]:
    """Record a study of two phases, a failure and a repeat among its trials; the addresses of its views."""
    tracker = MlflowTracker(uri, study, invocation={"seed": "0"}, objectives=OBJECTIVES, measured=MEASURED)
    for number, (label, distortion, condition) in enumerate([("narrow", 0.2, 9.0), ("deep", 0.9, 30.0), ("wide", 0.5, 100.0)]):
        record(tracker, "topology", number, label, distortion, condition)
        record(tracker, "growth", number, f"{label} grown", distortion + 5, condition)
    record(tracker, "topology", 3, "deep", 0.9, 30.0, reused_from=1)
    broken = TrialRecord(study_name=study, phase="topology", number=4, label="broken", digest="b" * 16, params={}, candidate={})
    tracker.record(broken, Failure(kind="non_finite", message="nan"))
    attach_leaderboard(tracker)
    tracker.close("FINISHED")
    return tracker.view_addresses


def parent_run(client, study: str):
    """The only invocation of the study."""
    (parent,) = search_runs(client, [client.get_experiment_by_name(study).experiment_id], "tags.kind = 'invocation'")
    return parent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPaths, dict[str, str]]:
    """A store with one study, and the addresses of its views."""
    paths = RunPaths(tmp_path_factory.mktemp("runs"))
    return paths, fill(paths.mlflow_uri, "as_vit")


@pytest.fixture(scope="module")
def server(store: tuple[RunPaths, dict[str, str]]) -> Iterator[str]:
    """MLflow's own server over the store, on a free port; its URI."""
    paths, _ = store
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", paths.mlflow_uri, "--port", str(port), "--workers", "1"]
    # A table needs none of the processes that run jobs.
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (paths.root / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=paths.root, env=environment, stdout=log, stderr=log)
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], uri: str) -> None:
    while True:
        assert process.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(f"{uri}/health").close()
            return
        except OSError:
            time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("recorded", ["in a file", "through the server"])
def test_a_browser_shows_a_phase_best_first_with_the_columns_that_count(
    browser, store: tuple[RunPaths, dict[str, str]], server: str, recorded: str
):
    if recorded == "in a file":
        addresses = {title: address.replace("http://127.0.0.1:5000", server) for title, address in store[1].items()}
    else:
        addresses = fill(server, "served")
    topology, growth = addresses.values()
    with run_table(browser, topology) as page:
        assert columns(page) == [
            "Run Name",
            "Created",
            "length_distortion",
            "ntk_condition",
            "gmacs",
            "params_m",
            "closed_form",
            "label",
            "Duration",
        ]
        assert cells(page, "attributes.`Run Name`") == ["deep", "wide", "narrow", "broken"]
        assert cells(page, "metrics.`length_distortion`") == ["0.9", "0.5", "0.2", "-"]
        assert cells(page, "metrics.`params_m`") == ["3.5", "4.5", "2.5", "-"]
    with run_table(browser, growth) as page:
        assert cells(page, "attributes.`Run Name`") == ["narrow grown", "deep grown", "wide grown"]
        assert cells(page, "metrics.`ntk_condition`") == ["9", "30", "100"]


@pytest.mark.slow
def test_mlflow_shows_the_page_of_a_study_in_its_frame_for_artifacts(browser, store: tuple[RunPaths, dict[str, str]], server: str):
    client = mlflow_client(store[0].mlflow_uri)
    parent = parent_run(client, "as_vit")
    with artifact(
        browser, f"{server}/#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}/artifacts/leaderboard.html"
    ) as frame:
        assert frame.locator("h1").inner_text() == "as_vit: leaderboard"
        assert not is_wider_than_window(frame)
        assert overlaps(frame) == []


def test_the_parent_run_has_the_values_of_the_network_that_ranks_first(store: tuple[RunPaths, dict[str, str]]):
    paths, _ = store
    parent = parent_run(mlflow_client(paths.mlflow_uri), "as_vit")
    growth = {"ntk_condition": 9.0, "gmacs": 1.25, "params_m": 2.5}
    topology = {"length_distortion": 0.9, "ntk_condition": 30.0, "gmacs": 1.25, "params_m": 3.5}
    assert parent.data.metrics == {
        "num_measured/topology": 3,
        "num_measured/growth": 3,
        **{f"best/growth/{name}": value for name, value in growth.items()},
        **{f"best/topology/{name}": value for name, value in topology.items()},
    }
    labels = {"best/topology/label": "deep", "best/growth/label": "narrow grown"}
    assert {**labels, "best/topology/digest": f"{2:016x}", "best/growth/digest": f"{1:016x}", "seed": "0"} == parent.data.params


@pytest.mark.slow
@pytest.mark.usefixtures("serial_pool")
def test_a_run_ends_with_the_address_of_its_view_and_keeps_its_settings(tmp_path: Path):
    flags = ["--trials", "2", "--max", "params_m=0.3", "--set", "as_vit.num_repeats=2"]
    done = run_here(run.main, "smoke", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    uri = RunPaths(tmp_path / "runs").mlflow_uri
    client = mlflow_client(uri)
    experiment = client.get_experiment_by_name("smoke")
    *_, start, address = done.stdout.splitlines()
    assert f"mlflow server --backend-store-uri {uri} --port 5000" in start
    assert address == f"  smoke/search: {view_address(uri, experiment.experiment_id, 'search')}"
    (parent,) = search_runs(client, [experiment.experiment_id], "tags.kind = 'invocation'")
    settings = {"study": "smoke", "seed": "0", "num_trials": "2", "budget": "--max params_m=0.3", "as_vit.num_repeats": "2"}
    assert settings.items() <= parent.data.params.items()
    columns_shown = json.loads(experiment.tags[f"{VIEW_TAG}search"])["selectedColumns"]
    assert {"metrics.`length_distortion`", "metrics.`gmacs`", "metrics.`params_m`"} <= set(columns_shown)


def test_the_addresses_of_all_studies_of_a_store_are_printed(store: tuple[RunPaths, dict[str, str]]):
    paths, addresses = store
    printed = run_here(browse.main, paths.mlflow_uri, cwd=paths.root)
    assert printed.returncode == 0
    assert set(addresses) == {"as_vit/topology", "as_vit/growth"}
    for title, address in addresses.items():
        assert f"  {title}: {address}\n" in printed.stdout
    assert f"mlflow server --backend-store-uri {paths.mlflow_uri} --port 5000" in printed.stdout


def test_browsing_what_cannot_be_read_says_so_and_creates_nothing(tmp_path: Path):
    empty = run_here(browse.main, RunPaths(tmp_path).mlflow_uri, cwd=tmp_path)
    assert (empty.returncode, list(tmp_path.iterdir())) == (0, [])
    uri = RunPaths(tmp_path).mlflow_uri
    assert empty.stdout == f"no study in {uri} yet; this makes one: search/run.py smoke --tracking-uri {uri}\n"
    assert run_here(browse.main, cwd=tmp_path).stdout.endswith("this makes one: search/run.py smoke\n")
    refused = run_here(browse.main, str(tmp_path), cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "is not supported" in refused.stderr


def test_a_view_is_ordered_by_the_first_objective_in_its_direction():
    for first, ascending in ((DISTORTION, False), (CONDITION, True)):
        view = json.loads(leaderboard_view("topology", [first]))
        assert (view["orderByKey"], view["orderByAsc"]) == (f"metrics.`{first.name}`", ascending)
    assert "orderByKey" not in json.loads(leaderboard_view("topology", []))


def test_many_metrics_leave_room_for_the_objectives_and_costs_before_the_others():
    view = json.loads(leaderboard_view("train", [DISTORTION], [*(f"other_{index}" for index in range(30)), "params_m"]))
    metrics = [column for column in view["selectedColumns"] if column.startswith("metrics.")]
    assert metrics[:3] == ["metrics.`length_distortion`", "metrics.`params_m`", "metrics.`other_0`"]
    assert len(metrics) == MAX_METRICS


def test_an_address_is_that_of_the_server_without_its_credentials():
    end = "/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=leaderboard-topology"
    for uri, host in {
        "https://me:secret@ml.example.org/mlflow/": "https://ml.example.org/mlflow",
        "http://ml:8080": "http://ml:8080",
        "postgresql://me:secret@db/mlflow": "http://127.0.0.1:5000",
    }.items():
        assert view_address(uri, "7", "topology") == host + end


def test_a_server_needs_no_start_and_a_store_is_named_without_its_password():
    assert how_to_browse("http://ml:8080", {"s/p": "A"}) == ["in MLflow:", "  s/p: A"]
    first, second = how_to_browse("postgresql://me:secret@db/mlflow", {"s/p": "A"})
    assert "postgresql://me:***@db/mlflow" in first
    assert second == "  s/p: A"
    assert how_to_browse("databricks", {"s/p": "A"}) == how_to_browse("http://ml:8080", {}) == []

"""The study `profile`: which trials it has, what it refuses, what it answers, and that no trial is measured twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, run_here

from results.answers.profile import answer
from results.formats import timing_marks
from results.records import Metric
from results.study_results import Provenance, StudyResults
from results.text import text_table
from search.run import main
from search.studies.profile import ProfileOptions
from search.study import RunSettings, Study, studies

NETWORKS = 12


def made(run: dict[str, Any] | None = None, **options: Any) -> Study:
    settings = RunSettings(study="profile", runs=Path("runs"), options=ProfileOptions(**options), **(run or {}))
    return studies.get("profile")(settings)


def test_every_network_is_measured_under_every_combination_of_the_settings():
    study = made({"gpus": 1.0}, models="vit_digits,deit_tiny", precision="fp32,bf16", batch_size="1,8", accelerators="H100,A100")
    (phase,) = study.phases
    (rows,) = phase.space.axes
    candidates = [phase.space.decode({"row": row}) for row in rows.choices]
    assert len(candidates) == 2 * 2 * 2 * 2
    assert len({(candidate.model.digest, json.dumps(candidate.settings)) for candidate in candidates}) == 16
    assert candidates[0].settings == {"profile": {"precision": "fp32", "batch_size": 1}, "resources": {"accelerator_type": "H100"}}
    assert candidates[-1].label == "deit_tiny (A100, bf16, eager, batch 8)"
    assert candidates[-1].model.img_size == 224
    run = RunSettings(study="profile", runs=Path("runs"), gpus=1.0)
    assert [resources.accelerator_type for resources in phase.all_resources(run)] == ["", "H100", "A100"]
    assert all(resources.whole_node for resources in phase.all_resources(run))


def test_one_way_to_run_is_named_by_the_network_alone_and_sizes_can_be_given():
    (phase,) = made({"img_size": 32, "num_classes": 7}, models="deit_tiny", wait_s=5.0).phases
    candidate = phase.space.decode({"row": 0})
    assert (candidate.label, candidate.settings) == ("deit_tiny", {})
    assert (candidate.model.img_size, candidate.model.num_classes) == (32, 7)
    assert phase.resources is not None
    assert (phase.resources.whole_node, phase.resources.wait_s) == (True, 5.0)


def test_the_best_batch_is_searched_under_the_same_execution_where_asked():
    (phase,) = made(models="vit_digits", precision="bf16", batch_size="8", throughput=True).phases
    assert [call.name for call in phase.evaluators] == ["profile", "throughput"]
    settings = phase.space.decode({"row": 0}).settings
    assert settings == {"profile": {"precision": "bf16", "batch_size": 8}, "throughput": {"precision": "bf16"}}


REFUSED = {
    "a pattern without a match": (["--models", "timm:vitt_*"], "pattern 'timm:vitt_*' matches no name"),
    "an unknown model": (["--models", "deit_tini"], "did you mean 'deit_tiny'"),
    "nothing that can run": (["--models", "deit_*", "--img-size", "20"], "none of 3 can run"),
    "an unknown precision": (["--models", "vit_digits", "--precision", "fp32,fp8"], "precision is 'fp8'; one of fp32, bf16, fp16"),
    "a batch of nothing": (["--models", "vit_digits", "--batch-size", "0"], "batch_size is 0; allowed: whole numbers from 1"),
    "a batch in words": (["--models", "vit_digits", "--batch-size", "one"], "--batch-size is 'one'; a whole number is expected"),
    "a value twice": (["--models", "vit_digits", "--execution", "eager,eager"], "different values are expected"),
    "a graph on the CPU": (["--models", "vit_digits", "--execution", "cuda_graph"], "the device is 'cpu'; allowed there: eager, compile"),
    "kinds of GPU without one": (["--models", "vit_digits", "--accelerators", "H100"], "kinds of GPU need --gpus"),
    "a negative wait": (["--models", "vit_digits", "--wait-s", "-1"], "--wait-s is -1; at least 0 is expected"),
    "a strategy": (["--models", "vit_digits", "--strategy", "tpe"], "--strategy means nothing here: every network of the list is profiled"),
    "a budget": (["--models", "vit_digits", "--max", "gmacs=1"], "means nothing here: every network of the list is profiled"),
    "images of no use": (["--models", "vit_digits", "--data", "folder:there"], "--data folder:there means nothing here: speed is measured"),
}


@pytest.mark.parametrize(("flags", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_profiled_is_one_line_and_status_2_before_any_work(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["profile", *flags, "--runs", str(tmp_path / "runs")]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "so far" not in line)
    assert words in line
    assert not (tmp_path / "runs").exists()


def results(frame: pd.DataFrame) -> StudyResults:
    provenance = Provenance(
        study_name="profile", tracking_uri="", commands=(), first="", last="", versions={}, devices=("a CPU",), seeds=(0,)
    )
    rows = frame.assign(phase="profile", trial=range(len(frame)), rank=range(1, len(frame) + 1), is_front=False, device="a CPU")
    objectives = {"profile": (Metric("latency_ms", "minimize"),)}
    return StudyResults(frame=rows, objectives=objectives, designed=frozenset(), num_failed={}, num_reused={}, provenance=provenance)


def measured() -> tuple[pd.DataFrame, dict[str, Any]]:
    """Networks whose latency follows their MACs, two of each size, and of those of a size the second is 1.5 times slower."""
    gmacs = np.repeat(2.0 ** np.arange(NETWORKS // 2), 2)
    latency_ms = 10 * gmacs * np.tile([1.0, 1.5], NETWORKS // 2)
    labels = [f"net-{number}" for number in range(NETWORKS)]
    frame = pd.DataFrame(
        {
            "label": labels[::-1],
            "digest": labels[::-1],
            "latency_ms": latency_ms[::-1],
            "latency_to_anchor": latency_ms[::-1] / 40,
            "gmacs": gmacs[::-1] * np.tile([1.01, 1.0], NETWORKS // 2),
            "params_m": np.tile([1.0, 2.0, 3.0], NETWORKS // 3),
            "is_noisy": [1.0] + [0.0] * (NETWORKS - 1),
            "is_alone": [1.0, 0.0] + [1.0] * (NETWORKS - 2),
        }
    )
    asked = [{"label": label, "name": label, "setting": "fp32, eager, batch 1"} for label in [*labels, "failed"]]
    return frame, {"rows": asked}


def test_the_answer_ranks_by_the_ratio_and_says_what_macs_tell():
    frame, parameters = measured()
    found = answer(results(frame), parameters)
    assert list(found.table["name"]) == [f"net-{number}" for number in range(NETWORKS)]
    first = found.summary["agreement"][0]
    assert (first["count"], first["time"], first["n"], first["num_equal_pairs"]) == ("gmacs", "latency_to_anchor", NETWORKS, 6)
    # The pairs of equal MACs are those of 1.01 and 1 times a size, and the one with more is the slower.
    assert first["tau_equal_macs"] == pytest.approx(1.0)
    assert first["tau_low"] <= first["tau"] <= first["tau_high"]
    assert (first["median_factor"], first["largest_factor"]) == (pytest.approx(1.5), pytest.approx(1.5))
    lines = found.text.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[1] for line in lines if line.startswith(("net-10", "net-11"))] == ["!", "~"]
    assert "1 of 13 have no measurement (yet): what failed is in MLflow, with its reason." in lines
    assert "Of the 6 pairs with equal MACs the slower takes 1.50 times as long" in " ".join(lines)
    json.dumps(found.summary)


def test_few_networks_have_times_and_no_agreement():
    frame, parameters = measured()
    found = answer(results(frame.tail(9)), parameters)
    assert found.summary["agreement"] == []
    assert "asked of 10 networks or more" in found.text
    with pytest.raises(ValueError, match="no network is measured so far"):
        answer(results(frame.head(0)), parameters)


def test_a_time_that_is_not_to_be_trusted_has_a_mark_in_every_table():
    frame, _ = measured()
    lines = text_table(results(frame), "profile", NETWORKS, "leaderboard", 80).splitlines()
    assert [line.split()[3].strip("0123456789.") for line in lines[1:4]] == ["~", "!", ""]
    assert "is_noisy" not in lines[0]
    assert any(line.startswith("~ not to be trusted") for line in lines)
    # What was measured before there were marks has none.
    assert timing_marks({"latency_ms": 1.0, "is_noisy": float("nan")}) == ""


SMALLEST = "vit_digits,timm:test_vit,timm:test_vit2,timm:test_convnext"
FLAGS = ["profile", "--models", SMALLEST, "--img-size", "32", "--set", "profile.num_runs=30", "--workers", "1"]


@pytest.mark.slow
def test_a_killed_study_profiles_the_others_and_nothing_twice(tmp_path: Path):
    work = tmp_path / "runs" / "work" / "profile" / "profile"
    command = [sys.executable, str(REPOSITORY / "search" / "run.py"), *FLAGS]
    with open(tmp_path / "out", "w") as out:
        driver = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)
    while not list(work.glob("*/outcome.json")):
        assert driver.poll() is None, (tmp_path / "out").read_text()
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {
        path: path.stat().st_mtime_ns for path in work.glob("*/artifacts/profile.json") if (path.parents[1] / "outcome.json").exists()
    }
    assert before
    done = run_here(main, *FLAGS, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert sorted(row["name"] for row in rows) == sorted(SMALLEST.split(","))
    assert all(row["is_alone"] == 1 for row in rows)
    assert len(list(work.glob("*/artifacts/profile.json"))) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_a_device_that_is_not_there_is_one_line_and_status_2(tmp_path: Path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = run_here(main, *FLAGS, "--gpus", "1", "--accelerators", "H100", cwd=tmp_path)
    assert done.returncode == 2
    (line,) = (line for line in done.stderr.splitlines() if "so far" not in line)
    assert "no node of the cluster has the 1 CPU, 1 GPU" in line

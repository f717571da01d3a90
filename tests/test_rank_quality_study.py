"""The study `rank_quality`: from a table of trained networks to a verdict on scores, and every way a table can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from results.mlflow_store import read_study
from results.report import load_report
from search.run import main
from search.trained_table import read_table
from space.families import autoformer
from space.search_space import Candidate
from workers.evaluators.nsc import spectral_score

SCORES = "params,macs,depth,width,nsc"


def architecture(number: int) -> dict[str, Any]:
    """Different networks of about the same size."""
    depth = 12 + number % 3
    return {
        "hidden_dim": (192, 216, 240)[number // 3 % 3],
        "depth": depth,
        "mlp_ratio": [(3.5, 4.0)[block * number % 2] for block in range(depth)],
        "num_heads": [(3, 4)[(block + number) % 2] for block in range(depth)],
    }


def rows(num: int = 18) -> list[dict[str, Any]]:
    """A table whose target `by_nsc` follows NSC and whose target `none` follows nothing."""
    made = []
    for number in range(num):
        arch = architecture(number)
        score = spectral_score(autoformer.spec(arch, num_classes=10))
        made.append({"id": f"net-{number}", "arch": arch, "targets": {"by_nsc": score, "none": (number * 7) % 11}})
    return made


def written(path: Path, table: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return str(path)


def run(tmp_path: Path, table: str, target: str, *flags: str) -> int:
    return main(["rank_quality", "--table", table, "--target", target, "--runs", str(tmp_path / "runs"), *flags])


def test_a_table_gives_a_verdict_and_a_second_target_measures_nothing_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = written(tmp_path / "table.jsonl", rows())
    assert run(tmp_path, table, "by_nsc", "--scores", SCORES, "--json") == 0
    out = capsys.readouterr().out
    assert " ".join(out.split()).count("18 networks of the table, each scored once") == 1
    assert "\nrank_quality/cost, shape, nsc: 18 networks of the table" in out
    verdict = json.loads(out.splitlines()[-1])
    assert list(verdict) == SCORES.split(",")
    assert verdict["nsc"]["tau"] == pytest.approx(1.0)
    assert verdict["nsc"]["low"] == pytest.approx(1.0)
    assert verdict["params"]["partial_tau"] is None
    assert verdict["nsc"]["regret_at_5"] == 0
    assert set(verdict["nsc"]) == {"tau", "low", "high", "tau_equal_size", "partial_tau", "regret_at_5", "seconds_per_network"}
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    first = load_report(uri, "rank_quality").answer
    assert first is not None
    assert first.text in out
    assert max(map(len, first.text.splitlines())) <= 80
    assert "correction for 1 score: nsc by" in " ".join(first.text.split())

    measured = {run.info.run_id for run in read_study(uri, "rank_quality").trials}
    assert run(tmp_path, table, "none", "--scores", SCORES, "--json") == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {run.info.run_id for run in read_study(uri, "rank_quality").trials} == measured
    assert second["nsc"]["tau"] != verdict["nsc"]["tau"]
    answer = load_report(uri, "rank_quality").answer
    assert answer is not None
    assert dict(answer.summary) == second


def test_a_network_that_stands_in_several_rows_counts_once(tmp_path: Path):
    table = rows(12)
    again = {**table[3], "id": "again", "targets": {"by_nsc": table[3]["targets"]["by_nsc"] + 10.0}}
    networks = read_table(written(tmp_path / "table.jsonl", [*table, again]), "by_nsc", family="autoformer", tracking_uri="")
    assert [network.id for network in networks] == [row["id"] for row in table]
    assert (networks[3].target, networks[3].num_rows) == (table[3]["targets"]["by_nsc"] + 5.0, 2)


def test_more_scores_extend_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = written(tmp_path / "table.jsonl", rows(12))
    assert run(tmp_path, table, "by_nsc", "--scores", "params") == 0
    assert run(tmp_path, table, "by_nsc", "--scores", "nsc,depth,params", "--json") == 0
    assert list(json.loads(capsys.readouterr().out.splitlines()[-1])) == ["nsc", "depth", "params"]
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    phases = [run.data.tags["phase"] for run in read_study(uri, "rank_quality").trials]
    assert {phase: phases.count(phase) for phase in phases} == {"cost": 12, "nsc": 12}


def test_the_networks_of_a_study_are_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = written(tmp_path / "table.jsonl", rows(12))
    assert run(tmp_path, table, "by_nsc", "--name", "first") == 0
    capsys.readouterr()
    assert run(tmp_path, "study:first", "nsc", "--json") == 0
    verdict = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert verdict["nsc"]["tau"] == pytest.approx(1.0)
    assert run(tmp_path, "study:first", "accuracy", "--name", "second") == 2
    assert "unknown target 'accuracy'" in capsys.readouterr().err


def test_all_takes_every_score_that_the_networks_can_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from search.studies import rank_quality
    from search.study import RunSettings

    networks = written(tmp_path / "table.jsonl", rows(10))
    settings = RunSettings(
        study="rank_quality",
        runs=tmp_path,
        options=rank_quality.RankQualityOptions(table=networks, target="by_nsc", scores="all"),
    )
    study = rank_quality.rank_quality(settings)
    assert {"cost", "shape", "nsc", "as_vit"} <= {phase.name for phase in study.phases}
    assert "as_vit_closed_form" not in {phase.name for phase in study.phases}
    assert any("left out: closed_form" in note for note in study.notes)
    candidate = study.phase("as_vit").space.decode({"row": 1})
    assert isinstance(candidate, Candidate)
    assert candidate.label == "net-1"


BROKEN: list[tuple[str, Any, str]] = [
    ("a broken line", '{"id": "x", ', "table.jsonl, line 2 is no JSON"),
    ("no object", "[1, 2]", 'line 2: an object with "id", "targets"'),
    ("no architecture", {"id": "x", "targets": {"by_nsc": 1.0}}, 'line 2 (x): either "arch" or "spec" is expected'),
    ("outside the family", {"id": "x", "arch": {"hidden_dim": 3}, "targets": {"by_nsc": 1.0}}, "line 2 (x): AutoFormer: depth, mlp_ratio"),
    ("no object as architecture", {"id": "x", "arch": 3, "targets": {"by_nsc": 1.0}}, "line 2 (x): arch is 3; an object"),
    ("a target missing", {"id": "x", "arch": architecture(1), "targets": {"none": 1.0}}, "line 2 (x): unknown target 'by_nsc'"),
    ("a target that is text", {"id": "x", "arch": architecture(1), "targets": {"by_nsc": "72"}}, "by_nsc is '72'; a finite number"),
    ("a target that is not finite", {"id": "x", "arch": architecture(1), "targets": {"by_nsc": float("nan")}}, "by_nsc is nan; a finite"),
]


@pytest.mark.parametrize(("row", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_wrong_row_is_named_in_one_line_before_any_work(row: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first, *_ = rows(1)
    text = row if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "table.jsonl"
    path.write_text(f"{json.dumps(first)}\n{text}\n")
    assert run(tmp_path, str(path), "by_nsc") == 2
    told = capsys.readouterr()
    assert message in told.err
    assert len(told.err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--table", "missing.jsonl", "--target", "t"], "missing.jsonl"),
        (["--target", "t"], "--table is missing"),
        (["--table", "{table}"], "--target is missing"),
        (["--table", "{table}", "--target", "constant"], "constant is 1 in all 12 rows"),
        (["--table", "{table}", "--target", "by_nsc", "--family", "swin"], "unknown family 'swin'"),
        (["--table", "{table}", "--target", "by_nsc", "--scores", "nsd"], "unknown score 'nsd'"),
        (["--table", "{table}", "--target", "by_nsc", "--scores", "closed_form"], "--scores closed_form: the closed form holds for As-ViT"),
        (["--table", "{table}", "--target", "by_nsc", "--scores", "meco", "--proxy-img-size", "64"], "--scores meco: meco is 0 here"),
        (["--table", "{table}", "--target", "by_nsc", "--trials", "3"], "--trials means nothing here"),
        (["--table", "{short}", "--target", "by_nsc"], "has 9 networks; at least 10 are needed"),
        (["--table", "study:none", "--target", "by_nsc"], "no MLflow store"),
    ],
)
def test_flags_that_cannot_work_are_one_line(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = rows(12)
    for row in table:
        row["targets"]["constant"] = 1
    path = written(tmp_path / "table.jsonl", table)
    short = written(tmp_path / "short.jsonl", table[:9])
    assert main(["rank_quality", "--runs", str(tmp_path / "runs"), *(flag.format(table=path, short=short) for flag in flags)]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert len(told.err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("serial_pool")
def test_a_study_that_measured_a_network_in_several_ways_is_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    axis = ["--axis", "recipe.lr=1e-4,1e-3", "--recipe", "epochs=1", "--evaluators", "train"]
    assert main(["compose", "--model", "vit_digits", *axis, "--runs", str(tmp_path / "runs")]) == 0
    capsys.readouterr()
    assert run(tmp_path, "study:compose", "val_top1_pct") == 2
    assert "was measured in 2 ways (phase, recipe, weights, settings)" in capsys.readouterr().err

"""The study `benchmark`: from a list of networks to a front and winners, by command, resumed, killed, and refused."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from conftest import REPOSITORY, run_here
from optuna.trial import TrialState
from test_faults import wait_until

from results.answers.benchmark import Finalist, Mean, compare, differences, front_of, shell_lines, winner_within
from results.mlflow_store import read_study
from results.paths import RunPaths
from results.report import load_report
from results.study_results import load, results_of
from search.measuring import OUTCOME_FILE
from search.run import main
from search.storage import open_storage
from space.families.vit import plain_vit
from space.model import build_model
from workers.pool import SerialPool

PHASES = ("profile", "rounds", "finalists")
EPOCHS = 9
WIDTHS = (8, 12, 16, 24)
SMALL = 0.0035
"""Million parameters: the two narrow networks have less."""

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tiny networks for 8 px as spec files, and a folder of weights for two of them and for a wrong one."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "weights").mkdir()
    for width in WIDTHS:
        spec = plain_vit(width, 2, 2, mlp_ratio=2, patch_size=2, img_size=8, num_classes=10)
        (folder / f"w{width}.json").write_text(json.dumps(spec.to_json()))
        if width < WIDTHS[-1]:
            torch.save(build_model(spec, seed=width).state_dict(), folder / "weights" / f"w{width}.pt")
    (folder / "weights" / "w24.pt").symlink_to(folder / "weights" / "w8.pt")
    return folder


@pytest.fixture(scope="module")
def command(folder: Path) -> Iterator[Command]:
    """The study on the tiny networks with more flags, in this process, and the command line itself where FLAGS begin with a command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.service.make_pool", lambda *arguments: SerialPool())

        def run(*flags: str, networks: str = "w8.json,w12.json,w16.json,w24.json") -> subprocess.CompletedProcess[str]:
            return run_here(main, "benchmark", "--models", networks, *study_flags(), *flags, cwd=folder)

        yield run


def study_flags() -> list[str]:
    flags = ["--img-size", "8", "--batch-size", "128", "--epochs", str(EPOCHS), "--seeds", "2", "--cost", "gmacs"]
    return [*flags, "--set", "profile.num_runs=30"]


@pytest.fixture(scope="module")
def done(command: Command) -> subprocess.CompletedProcess[str]:
    finished = command("--max", f"params_m={SMALL}", "--max", "gmacs=1", "--json")
    assert finished.returncode == 0, finished.stderr
    return finished


def in_a_shell(command: str) -> list[str]:
    """The words that a shell makes of the command."""
    return subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True).stdout.splitlines()


def uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'runs' / 'mlflow.db'}"


def run_ids(folder: Path) -> set[str]:
    return {run.info.run_id for run in read_study(uri(folder), "benchmark").trials}


def test_the_answer_names_a_front_and_a_winner_for_each_budget(done: subprocess.CompletedProcess[str], folder: Path):
    summary = json.loads(done.stdout.splitlines()[-1])
    small, any_size = summary["budgets"]
    assert (small["max"], any_size["max"]) == ({"params_m": SMALL}, {"gmacs": 1.0})
    finalists = summary["finalists"]
    assert small["winner"] in ("w8.json", "w12.json")
    best = max(finalists, key=lambda name: finalists[name]["val_top1_pct"]["value"])
    assert finalists[any_size["winner"]]["val_top1_pct"] == finalists[best]["val_top1_pct"]
    assert any_size["winner"] in summary["front"]
    assert {*any_size["told_apart"], *any_size["not_told_apart"]} == set(finalists) - {any_size["winner"]}
    assert set(finalists) | set(summary["stopped"]) == {f"w{width}.json" for width in WIDTHS}
    answer = load_report(uri(folder), "benchmark").answer
    assert answer is not None
    assert answer.text in done.stdout
    assert max(map(len, answer.text.splitlines())) <= 80
    assert json.loads(json.dumps(dict(answer.summary))) == summary


def test_every_accuracy_is_that_of_the_ledger_and_the_first_seed_is_trained_once(done: subprocess.CompletedProcess[str], folder: Path):
    table = load(uri(folder), "benchmark")
    finalists = json.loads(done.stdout.splitlines()[-1])["finalists"]
    for name, told in finalists.items():
        whole = table[table["label"].isin([f"{name} seed 0", f"{name} seed 1"])]
        assert list(whole.sort_values("seed")["phase"]) == ["rounds", "finalists"]
        for metric in ("val_top1_pct", "test_top1_pct"):
            assert told[metric]["value"] == pytest.approx(whole[metric].mean())
            assert told[metric]["low"] <= told[metric]["value"] <= told[metric]["high"]
        assert told["seeds"] == [0, 1]
    assert set(table[table["phase"] == "finalists"]["seed"]) == {1}


def test_the_share_of_saved_epochs_counts_each_epoch_once(done: subprocess.CompletedProcess[str]):
    summary = json.loads(done.stdout.splitlines()[-1])
    trained = 2 * EPOCHS * len(summary["finalists"]) + sum(out["epochs"] for out in summary["stopped"].values())
    whole = 2 * EPOCHS * len(WIDTHS)
    assert summary["epochs_saved_pct"] == pytest.approx(100 * (1 - trained / whole))
    assert f"{trained} of the {whole} epochs" in " ".join(done.stdout.split())


def test_the_printed_command_measures_the_network_again(done: subprocess.CompletedProcess[str], folder: Path):
    summary = json.loads(done.stdout.splitlines()[-1])
    name = summary["budgets"][0]["winner"]
    lines = shell_lines(summary["finalists"][name]["command"])
    assert "\n".join(lines) in done.stdout
    words = in_a_shell("\n".join(lines))
    assert words[0] == "search/run.py"
    again = run_here(main, *words[1:], "--json", cwd=folder)
    assert again.returncode == 0, again.stderr
    table = load(uri(folder), "benchmark")
    (row,) = table[table["label"] == f"{name} seed 0"].to_dict("records")
    measured = json.loads(again.stdout.splitlines()[-1])["values"]
    for metric in ("val_top1_pct", "val_nll", "test_top1_pct", "test_nll", "train_loss"):
        assert measured[metric] == row[metric]


def test_the_same_command_measures_nothing_again_and_more_seeds_extend_it(
    command: Command, done: subprocess.CompletedProcess[str], folder: Path
):
    before = run_ids(folder)
    again = command("--max", f"params_m={SMALL}", "--max", "gmacs=1", "--json")
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert run_ids(folder) == before
    finalists = json.loads(done.stdout.splitlines()[-1])["finalists"]
    more = command("--max", f"params_m={SMALL}", "--max", "gmacs=1", "--seeds", "3", "--json")
    assert run_ids(folder) >= before
    assert len(run_ids(folder)) == len(before) + len(finalists)
    assert all(told["seeds"] == [0, 1, 2] for told in json.loads(more.stdout.splitlines()[-1])["finalists"].values())


def test_a_measured_budget_below_every_network_is_refused_before_any_training(command: Command, folder: Path):
    refused = command("--max", "latency_ms=0.000001", "--name", "fast")
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error")]
    assert "error: --max latency_ms=1e-06: none of 4 networks is within it; the nearest, w" in line
    assert set(load(uri(folder), "fast")["phase"]) == {"profile"}


def test_networks_outside_every_budget_are_not_trained(command: Command, folder: Path):
    done = command("--max", f"params_m={SMALL}", "--name", "small", "--seeds", "1", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["not_trained"] == {"w16.json": "outside every budget", "w24.json": "outside every budget"}
    table = load(uri(folder), "small")
    trained = table[table["phase"] == "rounds"]["label"].str.extract(r"(w\d+)\.json")[0]
    assert set(trained) == {"w8", "w12"}
    assert "finalists" not in set(table["phase"])


def test_trained_networks_are_probed_under_every_seed_without_rounds(command: Command, folder: Path):
    flags = ["--how", "probe", "--weights", "weights", "--name", "probed", "--epochs", "5", "--batch-size", "0"]
    done = command(*flags, "--json", networks="w8.json,w12.json")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert {name: told["seeds"] for name, told in summary["finalists"].items()} == {"w8.json": [0, 1], "w12.json": [0, 1]}
    table = load(uri(folder), "probed")
    assert sorted(table["phase"]) == ["finalists"] * 4 + ["profile"] * 2
    name = summary["budgets"][0]["winner"]
    again = run_here(main, *shlex.split(summary["finalists"][name]["command"])[1:], "--json", cwd=folder)
    assert again.returncode == 0, again.stderr
    (row,) = table[table["label"] == f"{name} seed 0"].to_dict("records")
    assert json.loads(again.stdout.splitlines()[-1])["values"]["test_nll"] == row["test_nll"]


def test_fine_tuning_starts_from_the_file_of_each_network(command: Command, folder: Path):
    done = command(
        "--how", "finetune", "--weights", "weights", "--name", "tuned", "--epochs", "1", "--seeds", "1", networks="w8.json,w12.json"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [run for run in read_study(uri(folder), "tuned").trials if run.data.tags["phase"] == "rounds"]
    assert len({run.data.tags["weights_digest"] for run in runs}) == len(runs) == 2
    assert "^ had not converged, so that more epochs may change its place" in done.stdout


REFUSED: dict[str, tuple[list[str], str]] = {
    "no models": (["--models", ""], "--models is missing"),
    "an unknown network": (["--models", "deit_tini"], "unknown model 'deit_tini'"),
    "a pattern without a match": (["--models", "timm:vitt_*"], "pattern 'timm:vitt_*' matches no name"),
    "an unknown way": (["--how", "distill"], "unknown way 'distill'"),
    "an unknown cost": (["--cost", "latency"], "unknown cost 'latency'"),
    "a budget of an accuracy": (["--max", "val_top1_pct=90"], "unknown cost 'val_top1_pct'"),
    "a malformed budget": (["--max", "latency_ms"], "--max 'latency_ms' is malformed"),
    "a budget of nothing": (["--max", "latency_ms=0"], "--max latency_ms=0; a number above 0 is expected"),
    "parameters below every network": (
        ["--max", "params_m=0.000001"],
        "--max params_m=1e-06: none of 1 network is within it; the nearest, w8",
    ),
    "one of several bounds out of reach": (["--max", "latency_ms=5,gmacs=1e-9"], "--max gmacs=1e-09: none of 1 network is within it"),
    "another budget flag": (["--max-params-m", "3"], "--max params_m=3 means nothing here: every network of --models"),
    "trials": (["--trials", "3"], "--trials means nothing here"),
    "an evaluator of the user's": (["--evaluators", "robustness"], "measures by its own evaluators alone"),
    "a stop of the training": (["--set", "train.stop_after=3"], "--set train.stop_after=3 means nothing here"),
    "too many seeds": (["--seeds", "10001"], "seeds go up to 9999"),
    "weights without a use": (["--weights", "weights"], "means nothing with --how train"),
    "no weights": (["--how", "finetune"], "--how finetune needs --weights DIR"),
    "no file of the network": (["--how", "probe", "--weights", "weights", "--models", "vit_digits"], "and there is no vit_digits with"),
    "weights of another architecture": (["--how", "probe", "--weights", "weights", "--models", "w24.json"], "are of another architecture"),
    "a rate for a probe": (["--how", "probe", "--weights", "weights", "--lr", "0.1"], "--lr 0.1 means nothing with --how probe"),
    "a bound given twice": (["--max", "gmacs=1,gmacs=2"], "--max gmacs=1,gmacs=2 bounds a metric twice"),
    "data that is not there": (["--data", "folder:nowhere"], "nowhere"),
}


@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_one_line_before_any_work(flags: list[str], message: str, folder: Path, tmp_path: Path):
    refused = run_here(main, "benchmark", "--models", "w8.json", "--img-size", "8", "--runs", tmp_path / "runs", *flags, cwd=folder)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def finalist(name: str, gmacs: float, rates: tuple[float, ...], **changes: Any) -> Finalist:
    """A network that recognises the first share of 200 test images under each seed."""
    correct = {seed: 100.0 * (np.arange(200) < 200 * rate) for seed, rate in enumerate(rates)}
    mean = Mean(100 * float(np.mean(rates)))
    fields = {"digest": name, "costs": {"gmacs": gmacs}, "val": mean, "test": mean, "seeds": tuple(correct), "correct": correct}
    return Finalist(**{"name": name, **fields, "loss_fall": 0.0, "marks": "", **changes})


def test_the_winner_is_told_from_what_is_worse_under_every_seed_and_not_from_what_is_alike():
    best, alike, worse = finalist("best", 3, (0.90, 0.92, 0.91)), finalist("alike", 1, (0.91, 0.90, 0.91)), finalist("worse", 2, (0.5,) * 3)
    won = winner_within({}, [worse, alike, best], "gmacs")
    assert won is not None
    assert won.finalist is best
    assert {one.name: one.is_told_apart for one in won.others} == {"alike": False, "worse": True}
    within = winner_within({"gmacs": 2.0}, [worse, alike, best], "gmacs")
    assert within is not None
    assert within.finalist is alike
    assert winner_within({"gmacs": 0.5}, [worse, alike, best], "gmacs") is None


def test_more_comparisons_make_wider_intervals():
    rates = ((0.80, 0.84, 0.86), (0.81, 0.79, 0.83))
    best, other = finalist("best", 1, (0.9, 0.93, 0.91)), finalist("other", 1, rates[0])
    (alone,) = differences(best, [other])
    among, _ = differences(best, [other, finalist("third", 1, rates[1])])
    assert among.value == alone.value
    assert among.low < alone.low < alone.high < among.high


def test_the_front_holds_what_nothing_cheaper_reaches():
    networks = [finalist("cheap", 1, (0.8,)), finalist("behind", 2, (0.7,)), finalist("best", 3, (0.9,))]
    assert [one.is_front for one in front_of(networks, "gmacs")] == [True, False, True]


def test_a_network_whose_loss_still_fell_is_not_converged():
    converged = finalist("still", 1, (0.8,))
    assert converged.is_converged
    assert not replace(converged, loss_fall=0.2).is_converged
    assert replace(converged, loss_fall=float("nan")).is_converged


def test_nothing_is_answered_before_a_network_is_trained_to_the_end(done: subprocess.CompletedProcess[str], folder: Path):
    results = results_of(read_study(uri(folder), "benchmark"))
    parameters = {"cost": "gmacs", "seeds": [7], "networks": {"w8.json": {"digest": "", "epochs": EPOCHS, "command": ""}}, "budgets": [{}]}
    with pytest.raises(ValueError, match="no network has been measured to the end"):
        compare(results, parameters)


QUOTED = "'vit_resnas/digits:24,4x96,-,2x64|48,3x192,2x160,4x96|96,2x256,-,3x192'"


@pytest.mark.parametrize(
    "command",
    [
        "search/run.py list",
        "x --a 1 --b " + ",".join(f"field{number}=value" for number in range(30)),
        f"search/run.py evaluate {QUOTED} --recipe a=1,b=2",
    ],
)
def test_a_command_in_lines_is_the_command(command: str):
    lines = shell_lines(command)
    assert max(map(len, lines)) <= 80 or QUOTED in command
    assert in_a_shell("\n".join(lines)) == shlex.split(command)


@pytest.mark.slow
def test_killed_in_each_phase_it_measures_nothing_twice(folder: Path, tmp_path: Path):
    runs = tmp_path / "runs"
    command = [sys.executable, str(REPOSITORY / "search" / "run.py"), "benchmark", "--models", "w8.json,w12.json,w16.json"]
    command += [*study_flags(), "--max", "gmacs=1", "--workers", "1", "--runs", str(runs)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def trials(phase: str) -> list[optuna.trial.FrozenTrial]:
        try:
            return optuna.load_study(study_name=f"benchmark/{phase}", storage=open_storage(runs / "optuna.journal")).trials
        except (KeyError, OSError):
            return []

    def told() -> dict[Path, int]:
        """When the outcome of each finished trial was written."""
        finished = [(phase, trial.number) for phase in PHASES for trial in trials(phase) if trial.state.is_finished()]
        files = [RunPaths(runs).workdir("benchmark", *trial) / OUTCOME_FILE for trial in finished]
        return {file: file.stat().st_mtime_ns for file in files}

    written: dict[Path, int] = {}
    for phase in PHASES:
        process = start()
        wait_until(lambda phase=phase: any(trial.state.is_finished() for trial in trials(phase)))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert any(not trial.state.is_finished() for trial in trials(phase))
        assert written.items() <= told().items()
        written = told()
    process = start()
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert written.items() <= told().items()
    for phase in PHASES:
        points = [tuple(sorted(trial.params.items())) for trial in trials(phase)]
        assert [trial.state for trial in trials(phase)] == [TrialState.COMPLETE] * len(set(points))
    assert "With gmacs <= 1: " in out

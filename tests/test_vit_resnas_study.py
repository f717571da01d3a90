"""The study `vit_resnas`: a tiny supernet trained, searched and retrained on digits, resumed after a kill, and every wrong flag."""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import run_here
from faulty_driver import drive
from forked import Forked
from supernets import resnas

from results.mlflow_store import read_study
from results.paths import RunPaths
from results.report import StudyReport, load_report
from search.budget import Budget
from search.run import main
from search.studies.vit_resnas import LEAST_SHARE, VitResnasOptions, evenly_scaled, gmacs, random_points, spread_points, vit_resnas
from search.study import RunSettings
from space import catalog
from space.cost import cost
from space.model import build_model
from workers.checkpoints import save_model
from workers.data import load_dataset
from workers.evaluators.supernet import load_supernet
from workers.inference import predict, top1_pct
from workers.pool import SerialPool

SPACE = resnas(img_size=8)
"""Two stages for 8 pixels, 656,100 subnets of 24 to 123 kMAC."""
FLAGS = ["--epochs", "2", "--retrain-epochs", "1", "--batch-size", "128", "--trials", "10", "--finalists", "3", "--top", "1"]
FLAGS += ["--random", "1", "--seeds", "1", "--trust", "12", "--set", "inherited.num_images=60"]
NUM_TRIALS = {"supernet": 1, "evolution": 10, "finalists": 3, "retrain": 3, "trust": 12, "trust_inherited": 12, "trust_nsc": 12}


def space_file(folder: Path) -> Path:
    path = folder / "space.json"
    path.write_text(json.dumps(SPACE.to_json()))
    return path


def report_of(folder: Path) -> StudyReport:
    return load_report(f"sqlite:///{folder / 'runs' / 'mlflow.db'}", "vit_resnas")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A folder in which the whole chain has run in this process, with its output."""
    folder = tmp_path_factory.mktemp("vit_resnas")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.service.make_pool", lambda *arguments: SerialPool())
        done = run_here(main, "vit_resnas", "--space", space_file(folder), *FLAGS, "--runs", folder / "runs", "--json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "output.txt").write_text(done.stdout)
    return folder


def measurements(folder: Path) -> dict[tuple[str, int], tuple[str, dict[str, float]]]:
    """By phase and trial: the network, and what was measured but the time it took."""
    results = report_of(folder).results
    names = [name for phase in results.phases for name in results.metric_names(phase)]
    rows = results.frame.to_dict("records")
    return {(row["phase"], row["trial"]): (row["digest"], {name: row[name] for name in names if row[name] == row[name]}) for row in rows}


def test_every_phase_measures_what_it_should_and_nothing_twice(finished: Path):
    runs = read_study(f"sqlite:///{finished / 'runs' / 'mlflow.db'}", "vit_resnas").trials
    phases = [run.data.tags["phase"] for run in runs]
    assert {phase: phases.count(phase) for phase in NUM_TRIALS} == NUM_TRIALS
    measured = [(run.data.tags["phase"], run.data.tags["digest"]) for run in runs if "reused_from" not in run.data.tags]
    assert len(set(measured)) == len(measured)


def test_the_answer_begins_with_trust_and_goes_on_with_searched_hand_made_and_random(finished: Path):
    lines = (finished / "output.txt").read_text().splitlines()
    trust, table, effects = (
        next(number for number, line in enumerate(lines) if line.startswith(start))
        for start in ("How far the supernet can be trusted", "Searched, hand-made and random", "vit_resnas/retrain, effects")
    )
    assert trust < table < effects
    assert [line.split()[0] for line in lines[table + 2 : table + 5]] == ["hand_made", "searched", "random"]
    assert max(map(len, lines[trust : table + 5])) <= 80
    answer = json.loads(lines[-1])
    assert list(answer["trust"])[:3] == ["inherited_top1_pct", "gmacs", "params_m"]
    assert answer["trust"]["gmacs"]["given_macs"] is None
    assert -1 <= answer["trust"]["inherited_top1_pct"]["given_macs"]["tau"] <= 1
    assert {row["network"] for row in answer["networks"]} == {"hand_made", "searched", "random"}


def test_the_searched_subnets_are_within_the_window_and_the_best_of_them_is_retrained(finished: Path):
    results = report_of(finished).results
    made = gmacs(SPACE.subnet(evenly_scaled(SPACE, None)))
    for phase in ("evolution", "finalists", "retrain"):
        macs = results.phase(phase)["gmacs"]
        assert macs.between(LEAST_SHARE * made, made).all()
    best = results.phase("finalists").iloc[0]
    searched = results.phase("retrain")
    assert best["digest"] in set(searched["digest"])
    found = results.phase("evolution").set_index("digest")["inherited_top1_pct"]
    assert found[list(results.phase("finalists")["digest"])].min() == found.nlargest(3).min()


def test_inherited_accuracy_is_that_of_the_subnet_cut_out_of_the_supernet(finished: Path):
    results = report_of(finished).results
    best = results.phase("finalists").iloc[0]
    supernet = load_supernet(RunPaths(finished / "runs").workdir("vit_resnas", "supernet", 0))
    subnet = SPACE.subnet(json_values(best["params"]))
    dataset = load_dataset("digits", img_size=8)
    logits = predict(supernet.extract(subnet), dataset, dataset.val, device="cpu")
    top1 = top1_pct(logits, dataset.labels[dataset.val])
    assert best["inherited_top1_pct"] == pytest.approx(top1, abs=1e-9)
    assert best["inherited_top1_pct_stderr"] == pytest.approx((top1 * (100 - top1) / len(dataset.val)) ** 0.5)
    # The search saw 60 images, and the same for every subnet.
    shares = results.phase("evolution")["inherited_top1_pct"] * 60 / 100
    assert (abs(shares - shares.round()) < 1e-6).all()


def json_values(params: str) -> dict[str, bool | int]:
    """The parameters of a run, which MLflow keeps as text."""
    return {name: text == "True" if name.startswith("keep") else int(text) for name, text in json.loads(params).items()}


def test_another_budget_takes_the_supernet_of_an_earlier_study(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("search.service.make_pool", lambda *arguments: SerialPool())
    weights = RunPaths(finished / "runs").workdir("vit_resnas", "supernet", 0) / "model.pt"
    flags = [
        "--weights",
        weights,
        "--max",
        "gmacs=0.00004",
        "--trials",
        "4",
        "--finalists",
        "2",
        "--top",
        "1",
        "--random",
        "1",
        "--inherit",
    ]
    flags += ["--seeds", "1", "--retrain-epochs", "1", "--objectives", "inherited_top1_pct,params_m", "--strategy", "nsga2"]
    done = run_here(main, "vit_resnas", "--space", space_file(tmp_path), *flags, "--runs", tmp_path / "runs", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "How far the supernet can be trusted is not measured" in " ".join(done.stdout.split())
    results = report_of(tmp_path).results
    assert results.phases == ["evolution", "finalists", "retrain"]
    assert results.phase("evolution")["gmacs"].max() <= 0.00004
    assert [metric.name for metric in results.objectives["finalists"]] == ["inherited_top1_pct", "params_m"]


def test_the_hand_made_network_is_scaled_evenly_and_fills_its_budget():
    space = catalog.supernet_space("vit_resnas/cifar")
    for max_gmacs in (0.012, 0.018, 0.03):
        subnet = space.subnet(evenly_scaled(space, max_gmacs))
        assert LEAST_SHARE * max_gmacs <= gmacs(subnet) <= max_gmacs
        for stage in subnet.arch.stages:
            assert len(set(stage.blocks)) == 1
    smallest = gmacs(space.subnet(space.smallest_point))
    assert evenly_scaled(space, smallest) == space.smallest_point


def test_networks_for_trust_go_from_the_smallest_to_the_largest():
    space = catalog.supernet_space("vit_resnas/cifar")
    macs = [cost(space.subnet(point)).macs for point in spread_points(space, 12, seed=0)]
    least, most = space.macs_range
    assert (macs[0], macs[-1]) == (least, most)
    steps = [later - earlier for earlier, later in pairwise(macs)]
    assert min(steps) > 0.6 * (most - least) / 11
    assert spread_points(space, 12, seed=1)[1:-1] != spread_points(space, 12, seed=0)[1:-1]


def test_random_networks_are_within_the_budget_and_a_longer_list_begins_with_a_shorter_one():
    space = catalog.supernet_space("vit_resnas/cifar").search_space()
    budget = Budget(at_most={"gmacs": 0.018}, at_least={"gmacs": 0.975 * 0.018})
    drawn = random_points(space, budget, 4, seed=0)
    assert all(budget.holds(space.decode(point)) for point in drawn)
    assert random_points(space, budget, 2, seed=0) == drawn[:2]
    assert len({space.decode(point).model.digest for point in drawn}) == 4


def test_what_is_tested_is_searched_against_hand_made_first():
    options = VitResnasOptions(top=2, random=2)
    design = vit_resnas(RunSettings(study="vit_resnas", runs=Path(), options=options)).designs["retrain"]
    assert [contrast.text for contrast in design.contrasts if contrast.is_primary] == ["searched - hand_made"]
    assert len(design.contrasts) == 2 * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--space", "vit_resnas/tine"], "unknown supernet space 'vit_resnas/tine'; did you mean"),
        (["--space", "{odd}"], "residual_spatial_reduction"),
        (["--max", "gmacs=0.0001"], "no network of space 'vit_resnas/digits' is within --max gmacs=0.0001"),
        (["--min", "gmacs=0.0070", "--max", "gmacs=0.0030"], "--max gmacs=0.003 is below --min gmacs=0.007"),
        (["--hand-made", "vit_resnas:176,3x704|352,axb|704,8x2560"], "ViT-ResNAS string: block 1 of stage 2 is 'axb'"),
        (["--hand-made", "vit_resnas/digits:24,9x48,-,2x48|48,2x96,-,2x96|96,2x192,-,2x192"], "stage 1: num_heads is 9; allowed: 4"),
        (["--hand-made", "vit_digits", "--inherit"], "--inherit: the hand-made network vit_digits is no subnet"),
        (["--weights", "{other}"], "is the supernet of another space: "),
        (["--weights", "{network}"], "model.pt holds a network and no supernet"),
        (["--trust", "5"], "--trust is 5; 0 or at least 12 is expected"),
        (["--top", "11"], "--top is 11; at most 10 is expected"),
        (["--top", "3", "--finalists", "2"], "--top 3 of --finalists 2"),
        (["--mixing", "mixpup"], "unknown mixing 'mixpup' in --mixing; did you mean 'mixup'"),
        (["--sampling", "all"], "sampling is 'all'; one of stratified, iid, sandwich, macs is expected"),
        (["--architectures", "1", "--sampling", "sandwich"], "sampling 'sandwich' with 1 subnets"),
        (["--architectures", "65"], "65 subnets a step need an image each"),
        (["--set", "supernet.num_subnets=3"], "--set supernet.num_subnets means nothing here: --architectures says it"),
        (["--proxy-img-size", "64"], "--proxy-img-size means nothing here"),
        (["--seed", "9999"], "seeds go up to 9999"),
        (["--set", "inherited.num_images=-1"], "num_images is -1; allowed: whole numbers from 0"),
    ],
)
def test_flags_that_cannot_work_are_one_line(flags: list[str], message: str, tmp_path: Path, wrong: dict[str, Path]):
    given = [flag.format(**wrong) for flag in flags]
    space = [] if "--space" in flags or "--weights" not in flags else ["--space", str(wrong["space"])]
    done = run_here(main, "vit_resnas", *given, *space, "--runs", tmp_path / "runs", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs" / "optuna.journal").exists()


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files that a user may name by mistake, and the space that they are not of."""
    folder = tmp_path_factory.mktemp("wrong")
    other = SPACE.to_json()
    other["name"] = "another"
    network = build_model(SPACE.largest, seed=0)
    for name, more in (("other", {"space": json.dumps(other)}), ("network", {})):
        save_model(folder / name / "model.pt", network, SPACE.largest, **more)
    odd = SPACE.to_json()
    odd["stages"][1]["widths"] = [20, 8]
    (folder / "odd.json").write_text(json.dumps(odd))
    files = {"other": folder / "other" / "model.pt", "network": folder / "network" / "model.pt"}
    return {**files, "odd": folder / "odd.json", "space": space_file(folder)}


@pytest.mark.slow
def test_killed_in_each_phase_it_ends_as_one_that_never_stopped(finished: Path, tmp_path: Path):
    """Killed in the training of the supernet, then after so many measurements of each later phase."""
    arguments = [
        "vit_resnas",
        "--space",
        space_file(tmp_path),
        *FLAGS,
        "--runs",
        tmp_path / "runs",
        "--set",
        "supernet.checkpoint_every_s=0",
    ]

    def run(die_at: tuple[str, int] | None) -> int:
        return Forked(drive, list(map(str, arguments)), "serial", die_at, folder=tmp_path).wait().returncode

    # The supernet's outcome and 5 of the search; 5 more and 2 finalists; the last and 1 retrained; 2 more and 4 for trust.
    for die_at in (("checkpoint", 2), ("outcome", 6), ("outcome", 7), ("outcome", 2), ("mlflow", 6)):
        assert run(die_at) == -signal.SIGKILL
    assert run(None) == 0
    assert measurements(tmp_path) == measurements(finished)
    runs = read_study(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}", "vit_resnas").trials
    done = [(run.data.tags["phase"], run.data.tags["trial"]) for run in runs if run.info.status == "FINISHED"]
    assert len(set(done)) == len(done)

"""Networks fit the data that is given: their classes, what is said before the work, what it is bounded by, and how the winner is used."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import REPOSITORY, run_here
from PIL import Image

import search
from results.mlflow_store import mlflow_client, search_runs
from results.paths import RunPaths
from results.records import Metric
from results.study_results import load
from search.budget import Budget
from search.preparation import announcements, data_summary, fitted
from search.run import main
from search.storage import open_storage
from search.strategies.growth import Growth
from search.study import RunSettings, SettingsError, open_phase, phase_settings, studies
from space import catalog
from space.cost import cost
from space.families.as_vit import TOPOLOGY_AXES, growth_space
from space.model import resized
from space.recipe import Recipe
from space.spec import digest_of
from workers.data import count_classes, load_dataset, summarize

TINY = ["--recipe", "epochs=1,batch_size=16,warmup_epochs=0", "--evaluators", "train"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images in three class folders, and a damaged one."""
    root = tmp_path_factory.mktemp("shapes")
    generator = np.random.default_rng(0)
    for name in ("circle", "line", "square"):
        (root / name).mkdir()
        for number in range(10):
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name / f"{number}.png")
    (root / "line" / "bad.png").write_bytes(b"no image")
    return root


def settings(study: str, runs: Path, **changes: Any) -> RunSettings:
    return fitted(RunSettings(study=study, runs=runs, **changes), fresh=False)


@pytest.mark.parametrize(("study", "objectives"), [("as_vit", ""), ("as_vit", "nsc"), ("smoke", ""), ("tune", ""), ("ablations", "")])
def test_every_study_takes_the_classes_of_its_networks_from_the_data(study: str, objectives: str, tmp_path: Path, shapes: Path):
    run = settings(study, tmp_path, data=f"folder:{shapes}", **({"objectives": objectives} if objectives else {}))
    examples = [phase.example for phase in studies.get(study)(run).phases]
    assert {network.num_classes for example in examples for network in (example.model, example.scored)} == {3}


def test_a_head_that_nobody_needs_counts_against_no_budget(shapes: Path, tmp_path: Path):
    example = studies.get("as_vit")(settings("as_vit", tmp_path, data=f"folder:{shapes}")).phase("topology").example
    with_thousand = replace(example, model=resized(example.model, num_classes=1000))
    between = Budget(at_most={"params_m": (cost(example.model).params + 1) / 1e6})
    assert between.holds(example)
    assert not between.holds(with_thousand)


def test_classes_are_counted_and_the_data_is_summarized_without_opening_an_image(shapes: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr("PIL.Image.open", refuse)
    source = f"folder:{shapes}"
    assert count_classes(source) == 3
    assert summarize(source, (16,), with_parts=True).startswith(f"data {source}: 31 images, 3 classes; train 22, val 3, test 6;")


def test_data_without_labels_leaves_a_study_its_own_number(tmp_path: Path):
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    assert count_classes(f"folder:{tmp_path}") == 0
    assert settings("as_vit", tmp_path / "runs", data=f"folder:{tmp_path}").num_classes is None


def test_a_data_set_is_summarized_with_its_damaged_files(shapes: Path):
    summary = load_dataset(f"folder:{shapes}", img_size=8).summary
    assert summary == (
        f"data folder:{shapes}: 30 images, 3 classes; train 21, val 3, test 6; brought to 8 px; 1 skipped as damaged (line/bad.png)"
    )


def test_the_summary_before_and_after_reading_agree_where_no_file_can_be_damaged():
    before = summarize("digits", (8,), with_parts=True)
    assert before == load_dataset("digits", img_size=8).summary
    assert before.startswith("data digits: 1,797 images, 10 classes; train 1,")


def test_a_sample_is_summarized_with_the_size_it_is_scored_at(tmp_path: Path):
    run = settings("as_vit", tmp_path, img_size=224, proxy_img_size=64)
    assert data_summary(studies.get("as_vit")(run), run) == "data digits: 1,797 images, 10 classes; brought to 64 px; none skipped"


@pytest.mark.parametrize(
    "model", ["vit_cifar", "deit_tiny", "timm:vit_tiny_patch16_224", "as_vit:4,2,2|2,1,2|2,1,2|2,1,2|16", "as_vit_seed"]
)
def test_any_network_is_trained_on_any_number_of_classes(model: str, tmp_path: Path, shapes: Path):
    done = run_here(main, "evaluate", model, *TINY, "--img-size", "32", "--data", f"folder:{shapes}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, _ = done.stdout.splitlines()[:2]
    assert first.startswith(f"data folder:{shapes}: 30 images, 3 classes; train 21, val 3, test 6; brought to 32 px; 1 skipped")
    assert "test_top1_pct" in done.stdout


def test_json_stays_one_object_and_the_summary_goes_to_the_other_stream(tmp_path: Path, shapes: Path):
    done = run_here(main, "evaluate", "vit_digits", *TINY, "--img-size", "8", "--data", f"folder:{shapes}", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["digest"] == resized(catalog.resolve("vit_digits"), img_size=8, num_classes=3).digest
    assert "30 images, 3 classes" in done.stderr


def test_without_data_a_network_keeps_the_catalogues_classes_unless_a_flag_says_otherwise(tmp_path: Path):
    described = json.loads(run_here(main, "describe", "deit_tiny", "--json", cwd=tmp_path).stdout)
    flags = ["evaluate", "deit_tiny", "--evaluators", "cost", "--json"]
    own, changed = (json.loads(run_here(main, *flags, *more, cwd=tmp_path).stdout) for more in ([], ["--num-classes", "7"]))
    assert own["digest"] == described["digest"]
    assert round(1e6 * (own["values"]["params_m"] - changed["values"]["params_m"])) == (1000 - 7) * (192 + 1)


@pytest.mark.parametrize("command", [["evaluate", "vit_cifar", *TINY], ["tune"], ["ablations"]])
def test_a_number_of_classes_that_cannot_be_trained_is_refused_before_any_work(command: list[str], tmp_path: Path, shapes: Path):
    done = run_here(main, *command, "--num-classes", "5", "--data", f"folder:{shapes}", cwd=tmp_path)
    assert done.returncode == 2
    assert "--num-classes 5: data" in done.stderr
    assert "has 3 classes" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_another_number_of_classes_than_the_study_was_created_with_is_refused(tmp_path: Path):
    search.open_study("smoke/search", runs=tmp_path)
    search.open_study("smoke/search", runs=tmp_path)
    with pytest.raises(SettingsError, match="num_classes was 10, now 4"):
        search.open_study("smoke/search", runs=tmp_path, num_classes=4)


OLD = {"as_vit/topology": "ce0158fe1110e072", "as_vit/growth": "5112cb545048e9e9", "smoke/search": "015d3f1d0da01f78"}
"""Digests of the settings that were stored before networks took their classes from the data (as_vit at 32 px, smoke as it is)."""


def create_old_study(method: str, runs: Path, **changes: Any) -> None:
    """The phases of a study as they were created by the old rules, whose stored settings are known by their digests."""
    run = RunSettings(study=method, runs=runs, defaults=1, **changes)
    for phase in studies.get(method)(run).phases:
        assert digest_of(phase_settings(phase, run, "digits")) == OLD[f"{method}/{phase.name}"]
        open_phase(f"{method}/{phase.name}", phase, run, "digits", open_storage(runs / "optuna.journal"))


def test_an_old_study_keeps_its_networks_and_its_limits(tmp_path: Path):
    create_old_study("as_vit", tmp_path, img_size=32)
    run = settings("as_vit", tmp_path, img_size=32)
    study = studies.get("as_vit")(run)
    assert study.phase("topology").example.model.digest == "6d69f139439a1490"
    assert study.phase("growth").budget.at_most == {"params_m": 100.0}
    assert "rounds (--rounds)" not in study.phase("growth").plan
    for phase in ("topology", "growth"):
        search.open_study(f"as_vit/{phase}", runs=tmp_path, img_size=32)
    with pytest.raises(SettingsError, match="--num-classes 3: study 'as_vit' was created before there was this flag"):
        settings("as_vit", tmp_path, img_size=32, num_classes=3)


def test_an_old_study_resumes_on_data_of_other_classes_with_the_classes_it_had(tmp_path: Path, shapes: Path):
    create_old_study("smoke", tmp_path)
    run = settings("smoke", tmp_path, data=f"folder:{shapes}")
    assert studies.get("smoke")(run).phase("search").example.model.digest == "373e71a4b972f53f"
    anew = fitted(RunSettings(study="smoke", runs=tmp_path, data=f"folder:{shapes}"), fresh=True)
    assert studies.get("smoke")(anew).phase("search").example.model.num_classes == 3


@pytest.mark.parametrize(("epochs", "warmup_epochs", "is_doubtful"), [(2, 2.0, True), (3, 2.0, True), (4, 2.0, False), (2, 0.2, False)])
def test_a_recipe_that_is_mostly_warm_up_says_so(epochs: int, warmup_epochs: float, is_doubtful: bool):
    assert bool(Recipe(epochs=epochs, warmup_epochs=warmup_epochs).doubts) == is_doubtful


def test_evaluate_warns_of_a_warm_up_before_it_reads_the_images(tmp_path: Path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "0.png")
    flags = ["--evaluators", "train", "--recipe", "epochs=2,batch_size=32", "--data", "folder:."]
    done = run_here(main, "evaluate", "vit_digits", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert "one class only" in done.stderr or "too few" in done.stderr
    assert "warning: recipe: 2 of 2 epochs are warm-up" in done.stderr


def test_scores_on_the_digits_that_stand_where_no_data_is_named_leave_a_network_its_classes(tmp_path: Path):
    assert studies.get("as_vit")(settings("as_vit", tmp_path)).phase("topology").example.model.num_classes == 1000
    assert studies.get("tune")(settings("tune", tmp_path)).phase("recipes").example.model.num_classes == 10


def test_what_a_study_will_do_is_said_with_its_limits_and_where_they_come_from(shapes: Path, tmp_path: Path):
    given = RunSettings(
        study="as_vit", runs=tmp_path, data=f"folder:{shapes}", img_size=64, options=studies.get("as_vit").options(rounds=3)
    )
    run = fitted(given, fresh=False)
    topology, growth = (" ".join(told.split()) for told in announcements(studies.get("as_vit")(run), run, given))
    assert topology == (
        "as_vit/topology: 200 trials (default, --trials) proposed by policy_gradient; "
        "networks for 64 px (--img-size) and 3 classes (of the data)"
    )
    assert growth.startswith(
        "as_vit/growth: at most 3 rounds (--rounds), which is at most 37 trials with the seed, as long as a network is"
    )
    assert "params_m 30 (default) (--max)" in growth


GOALS = (Metric("width", "maximize"),)
SPACE = growth_space(img_size=64, proxy_img_size=64, num_classes=10)


def grown(growth: Growth, widths_first: bool) -> tuple[int, int | None, int | None]:
    """Trials until growth ended, and the total that was said before the first and after the last."""
    sign = 1 if widths_first else -1
    study = optuna.create_study(directions=["maximize"])
    said = growth.num_total(study)
    while batch := growth.next_batch(study):
        for point in batch:
            study.enqueue_trial(dict(point))
            trial = study.ask()
            study.tell(trial, float(sign * int(SPACE.suggest(trial)["proxy_embed_dim"])))
    return len(study.trials), said, growth.num_total(study)


@pytest.mark.parametrize("widths_first", [True, False])
@pytest.mark.parametrize("rounds", [1, 4])
def test_growth_takes_no_more_rounds_and_trials_than_it_says(rounds: int, widths_first: bool):
    topology = {axis: value for axis, value in next(SPACE.points()).items() if axis in TOPOLOGY_AXES}
    growth = Growth(space=SPACE, topology=topology, max_params=10**9, objectives=GOALS, max_rounds=rounds)
    measured, before, after = grown(growth, widths_first)
    assert before is not None
    assert 1 + 8 * rounds <= measured <= before <= 1 + 16 * rounds
    assert after == measured
    assert growth.ended == f"{rounds} rounds are done, and no more are wanted (--rounds)"


@pytest.mark.usefixtures("serial_pool")
def test_a_table_s_digest_names_its_network_and_the_parent_run_knows_the_data(tmp_path: Path, shapes: Path):
    small = ["--set", "as_vit.num_repeats=2", "--set", "as_vit.num_angles=2", "--set", "as_vit.ntk_batch_size=2"]
    done = run_here(main, "smoke", "--trials", "2", "--data", f"folder:{shapes}", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line = f"data folder:{shapes}: 31 images, 3 classes; brought to 32 px; damaged files are found and skipped when images are read"
    assert line in done.stdout.splitlines()
    uri = RunPaths(tmp_path / "runs").mlflow_uri
    client = mlflow_client(uri)
    experiment = client.get_experiment_by_name("smoke")
    assert experiment is not None
    (parent,) = search_runs(client, [experiment.experiment_id], "tags.kind = 'invocation'")
    assert parent.data.params["data_summary"] == line
    digest = load(uri, "smoke").digest.iloc[0]
    described = run_here(main, "describe", digest[:4], "--json", cwd=tmp_path)
    assert json.loads(described.stdout)["digest"] == digest
    evaluated = run_here(main, "evaluate", digest[:4], "--evaluators", "cost", "--json", cwd=tmp_path)
    assert json.loads(evaluated.stdout)["digest"] == digest


def test_the_lines_of_the_readme_load_a_trained_network_and_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (block,) = re.findall(r"```python\n([^`]*load_model[^`]*)```", (REPOSITORY / "README.md").read_text())
    trained = run_here(main, "evaluate", "vit_digits", *TINY, "--workdir", "winner", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    rows = re.findall(r"\[([^\[\]]*)\]", capsys.readouterr().out)
    assert [len(row.split(",")) for row in rows] == [10] * 4

"""The study `ablations`: its cells, what it names beforehand, and the whole of it on real digits."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import time
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from conftest import run_here
from faulty_driver import drive
from forked import Forked
from optuna.trial import TrialState

from results import leaderboard
from results.attachments import attach_leaderboard
from results.effects.design import Design
from results.effects.text import effects_summary
from results.mlflow_store import MlflowTracker, mlflow_client, search_runs
from results.paths import RunPaths
from results.records import Measurement, Metric
from results.report import load_report
from results.study_results import load
from results.tracking import TrialRecord
from search.budget import Budget
from search.preparation import fitted
from search.registration import register
from search.run import main
from search.storage import open_storage
from search.strategies.grid import Grid
from search.studies.ablations import LEVELS, AblationOptions, cells
from search.study import DESIGNS_ATTRIBUTE, FITTED, Need, RunSettings, SettingsError, Study, open_phase, phase_settings, studies
from space.registry import SpecError
from space.search_space import Candidate


def make(data: str = "digits", run: dict | None = None, **options) -> Study:
    settings = RunSettings(study="ablations", runs=Path(), data=data, options=AblationOptions(**options), **(run or {}))
    return studies.get("ablations")(settings)


def candidate(study: Study, factor: str, level: str, seed: int = 0) -> Candidate:
    return study.phase("train").space.decode({"factor": factor, factor: level, "seed": seed})


def differing(a: Candidate, b: Candidate) -> set[str]:
    """Names of the fields of model and recipe in which two candidates differ."""
    parts = ((a.model, b.model), (a.recipe, b.recipe))
    return {
        field.name for one, other in parts for field in dataclasses.fields(one) if getattr(one, field.name) != getattr(other, field.name)
    }


def test_the_levels_of_stored_studies_keep_their_order():
    """They are the choices of the study's axes: another order is another space, in which no older study goes on."""
    assert LEVELS["mixing"] == ("none", "mixup", "cutmix", "mixup_cutmix", "patch_mixing", "mask_mix", "transmix", "mixpro")


def test_a_level_changes_exactly_one_thing():
    study = make()
    departure = candidate(study, "pooling", "class_token")
    changes = {"pooling": {"pooling"}, "mixing": {"mixing"}, "optimizer": {"optimizer", "lr", "min_lr", "weight_decay"}}
    for factor, (reference, *others) in LEVELS.items():
        assert differing(candidate(study, factor, reference), departure) == set()
        for level in others:
            found = differing(candidate(study, factor, level), departure)
            assert found
            assert found <= changes[factor]
    assert differing(candidate(study, "mixing", "cutmix", 3), candidate(study, "mixing", "cutmix", 4)) == {"seed"}


def test_every_level_is_a_network_and_a_recipe_of_its_own():
    study = make()
    made = [candidate(study, factor, level) for factor, (_, *others) in LEVELS.items() for level in others]
    assert len({(one.model.digest, one.recipe.digest) for one in made}) == len(made)
    ggem = candidate(study, "pooling", "ggem").model
    assert ggem.pooling.choices["groups"] == ggem.stages[-1].blocks[-1].mixer.choices["num_heads"]


def test_the_learning_rate_changes_against_the_weight_decay_so_that_their_product_stays():
    study = make(lr=2e-3)
    for level in LEVELS["optimizer"]:
        recipe = candidate(study, "optimizer", level).recipe
        assert recipe.optimizer_lr * recipe.optimizer_weight_decay == pytest.approx(2e-3 * 0.05)


def test_digits_are_not_mirrored():
    assert not candidate(make(), "mixing", "none").recipe.flip


def test_digits_are_trained_until_they_converge_and_not_cropped():
    recipe = candidate(make(), "mixing", "none").recipe
    assert (recipe.epochs, recipe.warmup_epochs, recipe.crop) == (60, 6.0, "none")
    assert candidate(make(epochs=7), "mixing", "none").recipe.epochs == 7
    images = make(data="torchvision:cifar10:/data")
    assert (candidate(images, "mixing", "none").recipe.epochs, candidate(images, "mixing", "none").recipe.crop) == (20, "pad")


def test_a_study_that_was_made_with_the_old_defaults_keeps_them(tmp_path: Path):
    """The recipe of a study of before November 2026, as it was stored with it."""
    old = {"epochs": 20, "batch_size": 32, "lr": 3e-3, "min_lr": 3e-5, "flip": False}
    for defaults in (1, FITTED):
        study = make(run={"defaults": defaults})
        recipe = candidate(study, "mixing", "none").recipe
        assert recipe.to_json() == old
        assert "mixpro" not in {level for contrast in study.designs["train"].contrasts for level in contrast.levels}
        assert any("mixpro is left out" in note for note in study.notes)
        settings = RunSettings(study="ablations", runs=tmp_path / str(defaults), defaults=defaults, options=AblationOptions())
        phase = study.phase("train")
        open_phase("ablations/train", phase, settings, "digits", open_storage(settings.runs / "optuna.journal"))
        resumed = fitted(dataclasses.replace(settings, defaults=RunSettings.defaults), fresh=False)
        assert studies.get("ablations")(resumed).phase("train").example.recipe == phase.example.recipe
        anew = fitted(dataclasses.replace(settings, defaults=RunSettings.defaults), fresh=True)
        assert studies.get("ablations")(anew).phase("train").example.recipe != phase.example.recipe


def test_a_study_of_other_factors_and_seeds_is_the_same_study():
    settings = [
        phase_settings(make(factor=factor, seeds=seeds).phase("train"), RunSettings(study="ablations", runs=Path()), "digits")
        for factor, seeds in ((("pooling",), 1), (("mixing", "optimizer"), 5))
    ]
    assert settings[0] == settings[1]
    longer = phase_settings(make(epochs=21).phase("train"), RunSettings(study="ablations", runs=Path()), "digits")
    assert {name for name in longer if longer[name] != settings[0][name]} == {"recipe"}


def test_seeds_are_paired_and_the_reference_is_a_cell_of_every_factor():
    points = cells({"pooling": ("class_token", "mean"), "mixing": ("none", "cutmix")}, range(5, 7))
    one_seed = [("pooling", "class_token"), ("pooling", "mean"), ("mixing", "none"), ("mixing", "cutmix")]
    assert [(point["factor"], point[point["factor"]], point["seed"]) for point in points] == [
        (factor, level, seed) for seed in (5, 6) for factor, level in one_seed
    ]


def primary(study: Study, phase: str = "train") -> dict[str, str]:
    return {contrast.factor: contrast.text for contrast in study.designs[phase].contrasts if contrast.is_primary}


def test_primary_contrasts_are_those_that_the_papers_claim():
    mixings = ", ".join(LEVELS["mixing"][1:])
    assert primary(make()) == {"pooling": "ggem - mean", "mixing": f"mean({mixings}) - none", "optimizer": "lion - adamw"}
    assert primary(make(level=("pooling=max", "optimizer=sgd"))) == {
        "pooling": "max - class_token",
        "mixing": f"mean({mixings}) - none",
        "optimizer": "sgd - adamw",
    }
    cnn = make(model="convnext_cifar", factor=("mixing",), robustness=True).designs["train"]
    (contrast,) = [contrast for contrast in cnn.contrasts if contrast.is_primary]
    assert (contrast.text, contrast.outcome, contrast.alternative) == ("patch_mixing - none", "patch_mix_fine_auc", "greater")


def test_all_other_levels_are_tested_against_the_reference():
    for factor, levels in LEVELS.items():
        others = [contrast for contrast in make().designs["train"].contrasts if contrast.factor == factor]
        assert {contrast.levels for contrast in others if contrast.baseline == levels[0] and len(contrast.levels) == 1} == {
            (level,) for level in levels[1:]
        }


def test_published_effects_are_the_lower_ends_of_what_was_published():
    def published(factor: str, **options) -> tuple[float | None, str]:
        contrasts = make(factor=(factor,), **options).designs["train"].contrasts
        ((size, source),) = {(contrast.published, contrast.source) for contrast in contrasts if contrast.is_primary}
        assert not any(contrast.published or contrast.source for contrast in contrasts if not contrast.is_primary)
        return size, source

    gained, source = published("pooling")
    assert gained == 0.1
    assert "+0.1 to +0.7" in source
    gained, source = published("mixing")
    assert gained == pytest.approx(69.98 - 65.81, abs=0.05)
    assert "Mixup +4.2, CutMix +8.3" in source
    gained, source = published("optimizer")
    assert gained is None
    assert "up to 2 points" in source
    assert published("mixing", model="convnext_cifar", robustness=True)[0] == 7.5
    assert published("mixing", model="convnext_cifar") == (None, "")
    assert published("mixing", level=("mixing=mask_mix",)) == (None, "")


def test_every_design_is_about_accuracy_and_nll():
    study = make(linear_probe=True, robustness=True)
    outcomes = {phase: [(outcome.name, outcome.goal) for outcome in design.outcomes] for phase, design in study.designs.items()}
    assert outcomes["probe"] == [("top1_pct", "maximize"), ("nll", "minimize")]
    assert outcomes["train"][:2] == outcomes["probe"]
    assert len(outcomes["train"]) == 6


def test_what_a_model_cannot_have_is_left_out_with_a_sentence_or_refused_by_name():
    study = make(model="convnext_cifar")
    assert study.designs["train"].factors == ("mixing", "optimizer")
    assert [note.split(":")[0] for note in study.notes if "left out" in note] == [
        "factor pooling is left out",
        "level mixing=transmix is left out",
        "level mixing=mixpro is left out",
    ]
    with pytest.raises(SettingsError, match="--factor pooling: the pooling of a timm model is fixed"):
        make(model="convnext_cifar", factor=("pooling",))
    with pytest.raises(SettingsError, match="--level mixing=transmix: models of timm give no attention"):
        make(model="convnext_cifar", level=("mixing=transmix",))
    with pytest.raises(SettingsError, match="compares poolings"):
        make(model="convnext_cifar", linear_probe=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"factor": ("poling",)}, "did you mean 'pooling'"),
        ({"level": ("pooling=gemm",)}, "did you mean 'gem' or 'ggem'"),
        ({"level": ("pooling",)}, "FACTOR=LEVEL is expected"),
        ({"factor": ("mixing",), "level": ("pooling=gem",)}, "--factor names only mixing"),
        ({"level": ("pooling=class_token",)}, "the reference is always there; name others: mean, relu_mean"),
        ({"probe_seeds": 5}, "--probe-seeds means nothing without --linear-probe"),
        ({"seeds": 0, "linear_probe": True, "robustness": True}, "--seeds 0 trains none"),
        ({"seeds": 0, "linear_probe": True, "factor": ("pooling", "mixing")}, "mixing would not be varied"),
        ({"seeds": 0, "linear_probe": True, "level": ("optimizer=lion",)}, "optimizer would not be varied"),
        ({"seeds": -1}, "--seeds is -1; at least 0"),
        ({"seeds": 0}, "nothing to train"),
        ({"epochs": -1}, "--epochs is -1"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options: dict, words: str):
    with pytest.raises(SpecError, match=words):
        AblationOptions(**options)


def test_flags_that_mean_nothing_here_are_refused():
    for flag, value in {"num_trials": 3, "strategy": "tpe", "budget": Budget(at_most={"params_m": 1.0})}.items():
        with pytest.raises(SettingsError, match="means nothing here"):
            make(run={flag: value})


def test_robustness_on_a_part_of_the_test_images_is_refused():
    part = {"evaluator_settings": {"robustness": {"max_images": "100"}}}
    with pytest.raises(SettingsError, match=r"robustness\.max_images=100: .* on all test images"):
        make(robustness=True, run=part)


def test_the_classes_are_those_of_the_data(tmp_path: Path):
    from PIL import Image

    for name in ("cat", "dog", "eel"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name / "0.png")
    run = fitted(RunSettings(study="ablations", runs=tmp_path / "runs", data=f"folder:{tmp_path}"), fresh=False)
    assert candidate(studies.get("ablations")(run), "mixing", "none").model.num_classes == 3


def test_the_probe_needs_the_backbone_and_is_a_design_of_its_own():
    study = make(linear_probe=True, seeds=0, probe_seeds=4)
    assert [phase.name for phase in study.phases] == ["train", "backbone", "probe"]
    assert study.phase("probe").needs == (Need("backbone"),)
    assert set(study.designs) == {"probe"}
    assert primary(study, "probe") == {"pooling": "ggem - mean"}
    shared = "the seeds of the linear probe share one backbone and each have 90 % of the same training images: its effects are those of"
    enough = "--probe-seeds 4 is enough for intervals; the exact test can reject every contrast from --probe-seeds 9 on"
    assert study.notes == (f"{shared} this backbone", enough)
    assert not [note for note in make(linear_probe=True, seeds=9).notes if "seeds" in note and not note.startswith(shared)]
    empty = optuna.create_study()
    assert isinstance(grid := study.phase("train").propose({}), Grid)
    assert grid.next_batch(empty) is None
    assert study.phase("probe").propose({}).num_total(empty) == 4 * len(LEVELS["pooling"])


def test_the_design_survives_json():
    design = make(robustness=True).designs["train"]
    assert Design.from_json(json.loads(json.dumps(design.to_json()))).digest == design.digest


def test_a_design_is_said_and_kept_and_one_that_was_changed_after_trials_overwrites_none():
    study = optuna.create_study(study_name="ablations/train")
    first, second = (make(factor=("pooling",), level=level).designs["train"] for level in ((), ("pooling=gem", "pooling=max")))
    title, primary_line = register(study, first)
    assert title == f"ablations/train tests design {first.digest} on top1_pct, nll: 6 secondary contrasts and, primary,"
    assert primary_line.startswith("  pooling: ggem - mean on top1_pct, published +0.1 (GGeM (https://arxiv.org/abs/2212.04114)")
    study.add_trials([optuna.trial.create_trial(value=1.0), optuna.trial.create_trial(state=TrialState.FAIL)])
    assert register(study, first) == [title, primary_line]
    assert register(study, second)[1:] == [
        "  pooling: max - class_token on top1_pct, nothing published",
        f"  the design was {first.digest}, now {second.digest}, with 1 trial there",
    ]
    kept = study.user_attrs[DESIGNS_ATTRIBUTE]
    assert [(entry["digest"], entry["num_trials"]) for entry in kept] == [(first.digest, 0), (second.digest, 1)]
    assert [Design.from_json(entry["design"]) for entry in kept] == [first, second]


# What comes of a design, from the ledger alone


GAIN = {"class_token": 0.0, "mean": 0.0, "ggem": 0.5}


def predictions(level: str, seed: int) -> bytes:
    """Of 200 images; `ggem` has half of those right that the others have wrong."""
    generator = np.random.default_rng(seed)
    labels = np.arange(200) % 10
    is_right = generator.random(200) < 0.5
    is_right |= generator.random(200) < GAIN[level]
    logits = np.zeros((200, 10), np.float32)
    logits[np.arange(200), np.where(is_right, labels, (labels + 1) % 10)] = 5.0
    file = io.BytesIO()
    np.savez(file, ids=np.arange(200), labels=labels, logits=logits)
    return file.getvalue()


def record_cells(tracker: MlflowTracker, folder: Path, levels, seeds, first_number: int, reused: bool = False) -> int:
    number = first_number
    for seed in seeds:
        for level in levels:
            left = folder / str(number)
            left.mkdir(parents=True)
            if not (reused and level == "class_token"):
                (left / "predictions.npz").write_bytes(predictions(level, seed))
            trial = TrialRecord(
                study_name="ablations",
                phase="train",
                number=number,
                label=f"{level} {seed}",
                digest=level,
                params={"factor": "pooling", "pooling": level, "seed": seed},
                candidate={},
                recipe_digest=str(seed),
            )
            outcome = Measurement(values={"val_top1_pct": 50.0}, elapsed_s=1.0, device="cpu", versions={}, seed=seed)
            tracker.record(trial, outcome, left)
            number += 1
    return number


@pytest.fixture
def ledger(tmp_path: Path):
    """A tracker of the study for a design; called again, that of a later invocation."""

    def open_ledger(*levels: str) -> MlflowTracker:
        design = make(factor=("pooling",), level=tuple(f"pooling={level}" for level in levels)).designs["train"]
        return MlflowTracker(
            RunPaths(tmp_path).mlflow_uri,
            "ablations",
            invocation={"command": "run"},
            objectives={"train": [Metric("val_top1_pct", "maximize")]},
            designs={"train": design.to_json()},
        )

    return open_ledger


def test_effects_come_from_the_runs_alone_and_say_in_how_many_looks(tmp_path: Path, ledger):
    levels = ("class_token", "mean", "ggem")
    first = ledger("mean", "ggem")
    done = record_cells(first, tmp_path / "files", levels, range(3), 0)
    (effects,) = attach_leaderboard(first).effects
    first.close("FINISHED")
    assert "pooling registered before its first trial" in " ".join(effects_summary(effects).split())
    assert "looked at" not in effects_summary(effects)
    second = ledger("mean", "ggem")
    record_cells(second, tmp_path / "files", levels, range(3, 7), done)
    (effects,) = attach_leaderboard(second).effects
    second.close("FINISHED")
    assert "effects were looked at 2 times or more while trials came" in " ".join(effects_summary(effects).split())
    row = effects.table.loc[effects.table["is_primary"]].iloc[0]
    arms = {level: np.mean([100 * hits(level, seed) for seed in range(7)]) for level in ("mean", "ggem")}
    assert row["effect"] == pytest.approx(arms["ggem"] - arms["mean"])
    assert row["n_seeds"] == 7
    (again,) = load_report(RunPaths(tmp_path).mlflow_uri, "ablations").effects
    pd.testing.assert_frame_equal(again.table, effects.table)
    client = mlflow_client(RunPaths(tmp_path).mlflow_uri)
    names = {file.path for file in client.list_artifacts(second.parent_run_id)}
    assert {"designs.json", "effects.csv", "effects.json", "forest.png", "forest.html"} <= names
    page = Path(client.download_artifacts(second.parent_run_id, "leaderboard.html", str(tmp_path))).read_text()
    assert "<h2>Effects: train</h2>" in page
    assert "pooling: ggem - mean" in page
    assert "pooling: ggem - mean" in client.get_run(second.parent_run_id).data.tags["mlflow.note.content"]


def hits(level: str, seed: int) -> float:
    with np.load(io.BytesIO(predictions(level, seed))) as file:
        return float((file["logits"].argmax(axis=1) == file["labels"]).mean())


def test_a_design_that_was_changed_after_trials_says_so(tmp_path: Path, ledger):
    first = ledger("ggem")
    done = record_cells(first, tmp_path / "files", ("class_token", "ggem"), range(2), 0)
    first.close("FINISHED")
    second = ledger("mean", "ggem")
    record_cells(second, tmp_path / "files", ("mean",), range(2), done)
    second.close("FINISHED")
    (effects,) = load_report(RunPaths(tmp_path).mlflow_uri, "ablations").effects
    assert "registered after 2 trials of its arms" in " ".join(effects_summary(effects).split())


def test_a_study_without_measured_contrast_is_shown_without_plot(tmp_path: Path, ledger):
    tracker = ledger("ggem")
    record_cells(tracker, tmp_path / "files", ("ggem",), range(1), 0)
    (effects,) = attach_leaderboard(tracker).effects
    assert not effects.is_measured
    assert "not measured" in effects_summary(effects)


# The whole of it


FLAGS = ["ablations", "--data", "digits", "--epochs", "1", "--batch-size", "256", "--seeds", "2"]


def told(folder: Path, name: str = "ablations/train") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=open_storage(folder / "runs" / "optuna.journal"))


def measured_cells(folder: Path) -> list[tuple[str, str, int]]:
    """Factor, level and seed of every finished trial's run."""
    client = mlflow_client(RunPaths(folder / "runs").mlflow_uri)
    runs = search_runs(client, [client.get_experiment_by_name("ablations").experiment_id], "tags.kind = 'trial'")
    assert {run.info.status for run in runs} == {"FINISHED"}
    all_params = [run.data.params for run in runs]
    return [(params["factor"], params[params["factor"]], int(params["seed"])) for params in all_params]


@pytest.mark.slow
@pytest.mark.usefixtures("serial_pool")
def test_the_study_of_all_poolings_goes_on_after_a_kill_and_grows_by_a_factor(tmp_path: Path):
    flags = [*FLAGS, "--factor", "pooling"]
    killed = Forked(drive, [*flags, "--runs", str(tmp_path / "runs")], "serial", folder=tmp_path)
    while len(list((tmp_path / "runs" / "work").rglob("outcome.json"))) < 4:
        assert killed.is_running, killed.wait()
        time.sleep(0.05)
    killed.send(signal.SIGKILL)
    said = killed.wait().stdout
    (kept,) = told(tmp_path).user_attrs[DESIGNS_ATTRIBUTE]
    assert f"ablations/train tests design {kept['digest']}" in said
    assert kept["num_trials"] == 0

    done = run_here(main, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14/14 done" in done.stdout
    assert "P pooling: ggem - mean" in done.stdout
    assert "2 seeds cannot reject" in " ".join(done.stdout.split())
    # A single seed is not the best of anything.
    assert "best trial" not in done.stdout
    poolings = [("pooling", level, seed) for level in LEVELS["pooling"] for seed in range(2)]
    assert [trial.state for trial in told(tmp_path).trials] == [TrialState.COMPLETE] * 14
    assert sorted(measured_cells(tmp_path)) == sorted(poolings)
    uri = RunPaths(tmp_path / "runs").mlflow_uri
    (effects,) = load_report(uri, "ablations").effects
    contrasts = ["ggem - mean", *(f"{level} - class_token" for level in LEVELS["pooling"][1:])]
    rows = {(row.contrast, row.outcome): row for row in effects.table.itertuples()}
    assert rows.keys() == {(contrast, outcome) for contrast in contrasts for outcome in ("top1_pct", "nll")}
    assert all(row.n_seeds == 2 and np.isfinite([row.effect, row.low, row.high, row.p]).all() for row in rows.values())

    more = run_here(main, *FLAGS, "--factor", "optimizer", "--level", "optimizer=lion", cwd=tmp_path)
    assert more.returncode == 0, more.stdout + more.stderr
    assert "18/18 done" in more.stdout
    assert "P optimizer: lion - adamw" in more.stdout
    assert f"the design was {kept['digest']}, now" in more.stdout
    optimizers = [("optimizer", level, seed) for level in ("adamw", "lion") for seed in range(2)]
    assert sorted(measured_cells(tmp_path)) == sorted(poolings + optimizers)
    assert len(load(uri, "ablations")) == 16
    shown = run_here(leaderboard.main, "ablations", "--top", "3", cwd=tmp_path)
    table = more.stdout[more.stdout.index("ablations/train, effects") : more.stdout.index("all of it")]
    assert table.strip() in shown.stdout

    refused = run_here(main, *FLAGS, "--batch-size", "128", cwd=tmp_path)
    assert refused.returncode == 2
    assert "recipe.batch_size was 256, now 128" in refused.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("serial_pool")
def test_the_linear_probe_runs_on_the_backbone_of_an_earlier_phase(tmp_path: Path):
    flags = ["ablations", "--seeds", "0", "--linear-probe", "--probe-seeds", "2", "--epochs", "1", "--set", "linear_probe.epochs=1"]
    done = run_here(main, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ablations/probe  14/14 done" in done.stdout
    assert "P pooling: ggem - mean" in done.stdout
    assert len(told(tmp_path, "ablations/backbone").trials) == 1

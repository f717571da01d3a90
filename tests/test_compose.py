"""Study `compose`: axes from the command line, the space they make, and what the other studies take of its flags."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import optuna
import pytest
from conftest import run_here

import search
from results.paths import RunPaths
from search.budget import Budget, climb, random_point
from search.composition import composed_space, needed_choices
from search.preparation import fitted
from search.run import main
from search.storage import open_storage
from search.strategy import Problem, strategies
from search.studies.ablations import AblationOptions
from search.studies.compose import ComposeOptions
from search.studies.tune import TuneOptions
from search.study import CONVERGING, RunSettings, SettingsError, Study, open_phase, studies
from space import catalog
from space.recipe import Recipe
from space.registry import SpecError
from space.search_space import Axis, SearchSpace
from space.spec import ArchSpec, Component
from space.values import Interval
from workers.evaluator import Call, evaluators

DIGITS = catalog.resolve("vit_digits")


def call(name: str) -> Call:
    return Call(name, evaluators.get(name).parse_settings({}))


def space_of(*texts: str, evaluators: tuple[str, ...] = ("cost",), model: ArchSpec = DIGITS, recipe=None) -> SearchSpace:
    return composed_space("test", model, texts, calls=tuple(map(call, evaluators)), recipe=recipe)


def made(run: dict | None = None, **options) -> Study:
    settings = RunSettings(study="compose", runs=Path("runs"), options=ComposeOptions(**options), **(run or {}))
    return studies.get("compose")(settings)


def test_every_point_is_the_model_with_what_the_axes_say():
    space = space_of("pooling=mean,gem", "feed_forward.hidden_dim=8,16", "depth=2..3")
    assert [axis.name for axis in space.axes] == ["depth", "feed_forward.hidden_dim", "pooling"]
    assert space.size == 8
    for point in space.points():
        candidate = space.decode(point)
        (stage,) = candidate.model.stages
        assert len(stage.blocks) == point["depth"]
        assert {block.feed_forward for block in stage.blocks} == {Component("mlp", hidden_dim=point["feed_forward.hidden_dim"])}
        assert candidate.model.pooling == Component(point["pooling"])
        assert candidate.model.position == DIGITS.position
    assert space.decode(space.first_point()).label == "depth=2 feed_forward.hidden_dim=8 pooling=mean"


def test_the_order_of_the_flags_makes_no_other_space():
    texts = ["recipe.lr=1e-4..1e-2:log", "pooling=mean,ggem", "pooling.groups=1,2"]
    there, back = (space_of(*each, evaluators=("train",), recipe=lambda said: Recipe(epochs=1, **said)) for each in (texts, texts[::-1]))
    assert there.digest == back.digest


def test_a_choice_that_nothing_gives_is_an_axis_over_what_fits():
    # 48 channels are no multiple of 64 heads' worth of groups: 5 is not offered, and each of the others divides 48.
    space = space_of("pooling=mean,ggem")
    (groups,) = [axis for axis in space.axes if axis.name == "pooling.groups"]
    assert groups.when == ("pooling", ("ggem",))
    assert groups.choices == (1, 2, 3, 4, 6, 8, 12, 16)
    assert space_of(
        "pooling=mean,ggem", model=dataclasses.replace(DIGITS, stages=(dataclasses.replace(DIGITS.stages[0], embed_dim=40),))
    ).axes[1].choices == (1, 2, 4, 8)
    (sentence,) = needed_choices(space, ["pooling=mean,ggem"])
    assert sentence == "pooling.groups is an axis, too (1, 2, 3, 4, 6, 8, 12, 16): ggem needs one, and no flag gives it"
    assert space.decode({"pooling": "ggem", "pooling.groups": 4}).label == "pooling=ggem,groups=4"
    assert needed_choices(space_of("pooling=mean,ggem,groups=2"), ["pooling=mean,ggem,groups=2"]) == []


def test_a_choice_is_an_axis_where_the_component_has_it_and_it_is_not_given():
    space = space_of("pooling=mean,gem,p=2,gem,ggem,groups=2", "pooling.p=1..4")
    (exponent,) = [axis for axis in space.axes if axis.name == "pooling.p"]
    assert exponent == Axis(name="pooling.p", choices=Interval(1.0, 4.0), when=("pooling", ("gem", "ggem,groups=2")))
    assert space.decode({"pooling": "gem,p=2"}).model.pooling == Component("gem", p=2.0)
    assert space.decode({"pooling": "gem", "pooling.p": 1.5}).model.pooling == Component("gem", p=1.5)


def test_settings_of_evaluators_and_fields_of_the_recipe_are_axes():
    space = space_of(
        "profile.batch_size=1,8",
        "short_train.stop_after=1,2",
        "recipe.optimizer=adamw,lion",
        evaluators=("train", "profile"),
        recipe=lambda said: Recipe(epochs=3, **said),
    )
    candidate = space.decode({"profile.batch_size": 8, "recipe.optimizer": "lion", "train.stop_after": 2})
    assert candidate.settings == {"profile": {"batch_size": 8}, "train": {"stop_after": 2}}
    assert candidate.recipe == Recipe(epochs=3, optimizer="lion")
    assert candidate.model == DIGITS
    assert candidate.label == "profile.batch_size=8 optimizer=lion train.stop_after=2"


def test_the_recipe_is_the_ablations_with_what_is_said_and_shares_follow():
    (phase,) = made(axis=("recipe.lr=1e-3,1e-2",), recipe="epochs=40,label_smoothing=0.2").phases
    slow, fast = (phase.space.decode({"recipe.lr": lr}).recipe for lr in (1e-3, 1e-2))
    reference = (
        studies.get("ablations")(RunSettings(study="ablations", runs=Path("runs"), options=AblationOptions())).phases[0].example.recipe
    )
    assert slow is not None
    assert fast is not None
    assert (slow.lr, slow.epochs, slow.label_smoothing) == (1e-3, 40, 0.2)
    assert fast.min_lr / slow.min_lr == pytest.approx(10)
    assert slow.warmup_epochs / 40 == pytest.approx(reference.warmup_epochs / reference.epochs)
    assert (slow.flip, slow.batch_size) == (reference.flip, reference.batch_size)
    (phase,) = made(axis=("recipe.lr=1e-3,1e-2",), recipe="min_lr=0,warmup_epochs=1").phases
    assert (phase.example.recipe.min_lr, phase.example.recipe.warmup_epochs) == (0, 1)


MISTAKES = {
    "no axis": ([], "compose needs an axis, e.g. --axis pooling=mean,gem"),
    "no choices": (["--axis", "pooling"], "TARGET=CHOICES is expected"),
    "unknown target": (["--axis", "poling=mean"], "did you mean 'pooling'"),
    "unknown evaluator": (["--axis", "profile.batch_size=1,2"], "unknown part, recipe or evaluator 'profile'"),
    "unknown component": (["--axis", "pooling=mean,gm"], "unknown pooling 'gm' in --axis pooling; did you mean 'gem'"),
    "unknown choice": (["--axis", "pooling=mean,gem", "--axis", "pooling.q=2"], "unknown open choice 'q' in --axis pooling.q"),
    "choice of none": (["--axis", "token_reduction.rate=2"], "of token_reduction none; known: (none)"),
    "unknown field": (["--axis", "recipe.lrr=1,2"], "did you mean 'lr'"),
    "field not allowed": (["--axis", "recipe.lr=0,1"], "--axis recipe.lr: recipe: lr is 0.0; allowed: numbers above 0"),
    "field that is a list": (
        ["--axis", "recipe.mixing_grids=4,8"],
        "--axis recipe.mixing_grids: mixing_grids is a list itself and no axis",
    ),
    "mixing unknown": (["--axis", "recipe.mixing=none,cutmux"], "--axis recipe.mixing: cutmux fits no candidate: unknown mixing 'cutmux'"),
    "setting not allowed": (
        ["--evaluators", "profile", "--axis", "profile.batch_size=0,1"],
        "batch_size is 0; allowed: whole numbers from 1",
    ),
    "same axis twice": (["--axis", "depth=2,3", "--axis", "depth=4,5"], "--axis depth is given twice"),
    "same choice twice": (["--axis", "pooling=mean,mean"], "--axis pooling has mean twice"),
    "fits no network": (["--axis", "depth=0..2"], "--axis depth: 0 fits no candidate"),
    "no class token": (["--axis", "prefix=none", "--axis", "pooling=mean,class_token"], "class_token fits no candidate"),
    "first points do not fit": (
        ["--axis", "prefix=none,class_token", "--axis", "pooling=class_token,mean"],
        "the first choices of all axes make no network (pooling: pooling 'class_token' needs a class token",
    ),
    "nothing is trained": (["--evaluators", "cost", "--axis", "recipe.lr=1e-3,1e-2"], "--axis recipe.lr: cost trains nothing"),
    "scores train nothing": (["--objectives", "snip", "--axis", "recipe.lr=1e-3,1e-2"], "--axis recipe.lr: gradient_scores trains nothing"),
    "recipe of nothing": (
        ["--evaluators", "cost", "--axis", "depth=2,3", "--recipe", "epochs=3"],
        "--recipe epochs=3: cost trains nothing",
    ),
    "unknown objective": (
        ["--axis", "depth=2,3", "--evaluators", "cost", "--objectives", "params"],
        "unknown objective 'params' in phase 'search', which measures by cost; did you mean 'params_m'? known: depth, gmacs, params_m",
    ),
    "unknown strategy": (["--axis", "depth=2,3", "--strategy", "tpee"], "did you mean 'tpe'? known: evolution, grid, halving, nsga2"),
    "grid of an interval": (["--axis", "recipe.lr=1e-4..1e-2", "--strategy", "grid"], "the axes have infinitely many points"),
    "grid with trials": (["--axis", "depth=2,3", "--strategy", "grid", "--trials", "3"], "--trials 3 means nothing with --strategy grid"),
    "halving without training": (["--axis", "depth=2,3", "--evaluators", "cost", "--strategy", "halving"], "needs --evaluators train"),
    "halving of epochs": (["--axis", "recipe.epochs=9,18", "--strategy", "halving"], "no axis of epochs"),
    "halving by two": (
        ["--axis", "depth=2,3", "--strategy", "halving", "--objectives", "val_nll,val_top1_pct"],
        "goes by one objective",
    ),
    "halving too short": (["--axis", "depth=2,3", "--strategy", "halving", "--recipe", "epochs=8"], "--recipe epochs=9 is the least"),
    "outside the budget": (
        ["--axis", "depth=2,3", "--max", "depth=1"],
        "is within --max depth=1; the nearest of its 2 has depth 2 (depth=2)",
    ),
    "axis of a timm model": (["--model", "convnext_cifar", "--axis", "pooling=mean"], "--axis pooling takes networks of our components"),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_before_any_work(tmp_path: Path, arguments: list[str], words: str):
    done = run_here(main, "compose", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("run", "options", "strategy"),
    [
        ({}, {"axis": ("pooling=mean,gem",)}, None),
        ({}, {"axis": ("depth=1..40",)}, "tpe"),
        ({"objectives": ("val_top1_pct", "train_loss")}, {"axis": ("depth=1..40",)}, "nsga2"),
        ({"num_trials": 3}, {"axis": ("depth=1..4",)}, "tpe"),
        ({"strategy": "random"}, {"axis": ("pooling=mean,gem",)}, "random"),
    ],
)
def test_what_proposes_follows_from_the_space_and_the_objectives(run: dict, options: dict, strategy: str | None):
    (phase,) = made(run, **options).phases
    assert phase.strategy == strategy
    assert (phase.propose is None) == (strategy is not None)


def test_objectives_have_the_goals_that_their_metrics_declare():
    (phase,) = made({"evaluators": "short_train,profile", "objectives": "val_top1_pct,latency_ms"}, axis=("pooling=mean,gem",)).phases
    assert [call.name for call in phase.evaluators] == ["train", "profile"]
    assert [(goal.name, goal.goal) for goal in phase.goals] == [("val_top1_pct", "maximize"), ("latency_ms", "minimize")]


def test_a_grid_leaves_out_what_is_outside_the_budget():
    (phase,) = made({"budget": Budget(at_most={"depth": 3}), "evaluators": "cost"}, axis=("depth=2..5",)).phases
    assert phase.plan == "every point of the grid (2 of 4; the others cannot be built or are outside --max depth=3), measured once"


def test_a_grid_leaves_out_what_cannot_be_built():
    (phase,) = made({"evaluators": "cost"}, axis=("prefix=class_token,none", "pooling=mean,class_token")).phases
    assert phase.plan == "every point of the grid (3 of 4; the others cannot be built), measured once"


def test_the_study_is_taken_over_with_optuna(tmp_path: Path):
    settings = {"runs": str(tmp_path / "runs"), "axis": ("depth=1..40",), "evaluators": ("cost",), "objectives": ("params_m",)}
    study = search.open_study("compose/search", **settings)
    study.optimize(search.objective("compose/search", **settings), n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    assert study.trials[0].value == study.trials[0].user_attrs["result"]["params_m"]


def test_halving_trains_points_to_rungs_beside_their_other_settings():
    (phase,) = made({"strategy": "halving", "num_trials": 9}, axis=("depth=1..30", "train.temperature=1"), recipe="epochs=18").phases
    assert phase.plan == "successive halving of 9 points: 9 to epoch 2, 3 to epoch 6, 1 to epoch 18"
    first, last = ({**phase.space.first_point(), "epochs_trained": rung} for rung in (2, 18))
    assert phase.space.decode(first).settings == {"train": {"temperature": 1.0, "stop_after": 2}}
    assert phase.space.decode(last).settings == {"train": {"temperature": 1.0}}


def test_a_changed_axis_is_refused_by_its_name():
    storage = optuna.storages.InMemoryStorage()

    def opened(*axes: str):
        run = RunSettings(study="compose", runs=Path("runs"), options=ComposeOptions(axis=axes), evaluators=("cost",))
        return open_phase("compose/search", studies.get("compose")(run).phases[0], run, "", storage)

    opened("pooling=mean,gem", "depth=2,3")
    opened("depth=2,3", "pooling=mean,gem")
    with pytest.raises(SettingsError, match=r"space\.axes\.pooling\.choices was \['mean', 'gem'\], now \['mean', 'gem', 'max'\]\. Run"):
        opened("pooling=mean,gem,max", "depth=2,3")
    with pytest.raises(SettingsError, match=r"space\.axes\.depth was \{.*now None"):
        opened("pooling=mean,gem")


def test_a_study_of_free_evaluators_runs_resumes_and_shows_its_labels(tmp_path: Path):
    flags = ["--axis", "depth=2..9", "--axis", "feed_forward.hidden_dim=8..64", "--evaluators", "cost", "--max", "depth=5"]
    flags += ["--objectives", "depth,params_m", "--runs", tmp_path / "runs"]
    first = run_here(main, "compose", *flags, "--trials", "4", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "4 trials (--trials) proposed by nsga2; limits --max depth=5" in first.stdout
    again = run_here(main, "compose", *flags, "--trials", "6", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "depth=" in again.stdout
    study = optuna.load_study(study_name="compose/search", storage=open_storage(tmp_path / "runs" / "optuna.journal"))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 6
    assert all(trial.params["depth"] <= 5 for trial in study.trials)
    whole = run_here(main, "compose", *flags, "--trials", "6", "--name", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    unbroken = optuna.load_study(study_name="whole/search", storage=open_storage(tmp_path / "runs" / "optuna.journal"))
    assert [trial.params for trial in unbroken.trials] == [trial.params for trial in study.trials]


def test_every_strategy_proposes_in_an_interval_and_within_a_budget(tmp_path: Path):
    (phase,) = made(
        {"budget": Budget(at_most={"params_m": 0.06}), "strategy": "tpe"}, axis=("recipe.lr=1e-4..1e-2:log", "depth=1..8")
    ).phases
    for name in strategies.names():
        sampler = strategies.get(name)(Problem(space=phase.space, goals=phase.goals, budget=phase.budget, seed=0))
        study = optuna.create_study(directions=["maximize"], sampler=sampler)
        for _ in range(12):
            trial = study.ask()
            point = phase.space.suggest(trial)
            phase.space.check(point)
            assert phase.budget.holds(phase.space.decode(point))
            study.tell(trial, math.log(point["recipe.lr"]))
        assert len({trial.params["recipe.lr"] for trial in study.trials}) == 12


def test_a_space_with_an_interval_is_infinite_and_has_a_first_point():
    space = space_of("pooling=gem", "pooling.p=1..4")
    assert space.size == math.inf
    assert space.first_point() == {"pooling": "gem", "pooling.p": 1.0}
    with pytest.raises(SpecError, match=r"no list of points: pooling\.p is an interval"):
        next(space.points())
    with pytest.raises(SpecError, match=r"pooling\.p is 9; allowed: 1\.0\.\.4\.0"):
        space.check({"pooling": "gem", "pooling.p": 9})
    drawn = [random_point(space, random.Random(seed))["pooling.p"] for seed in range(9)]
    assert len(set(drawn)) == 9
    assert all(value in Interval(1.0, 4.0) for value in drawn)
    assert climb(space, space.first_point(), Budget(at_most={"depth": 1}), random.Random(0))[1] > 0
    assert [axis.at(0.5) for axis in (Axis(name="a", choices=range(4)), Axis(name="b", choices=Interval(1e-4, 1.0, log=True)))] == [
        2,
        pytest.approx(1e-2),
    ]


def other(study: str, options=None, **run) -> Study:
    return studies.get(study)(RunSettings(study=study, runs=Path("runs"), options=options, **run))


@pytest.mark.parametrize(
    ("study", "run"),
    [
        ("smoke", {"evaluators": "profile"}),
        ("as_vit", {"evaluators": "profile", "objectives": "length_distortion,latency_ms"}),
        ("tune", {"evaluators": "profile", "objectives": "val_nll", "options": TuneOptions()}),
        ("ablations", {"evaluators": "profile", "options": AblationOptions()}),
    ],
)
def test_other_studies_take_further_evaluators_and_objectives(study: str, run: dict):
    plain, phase = other(study, run.get("options")).phases[0], other(study, **run).phases[0]
    assert [call.name for call in phase.evaluators] == [*(call.name for call in plain.evaluators), "profile"]
    assert phase.objectives == tuple(run["objectives"].split(",")) if "objectives" in run else plain.objectives


@pytest.mark.parametrize(
    ("study", "run", "words"),
    [
        ("tune", {"objectives": "val_nll,val_top1_pct"}, "successive halving goes by one objective"),
        ("ablations", {"objectives": "val_nll"}, "nothing is searched"),
        ("smoke", {"objectives": "latency_ms"}, "unknown objective 'latency_ms' in phase 'search', which measures by as_vit, cost"),
        ("smoke", {"evaluators": "cost,cost"}, "different names are expected"),
        ("smoke", {"evaluators": "profil"}, "unknown evaluator 'profil'; did you mean 'profile'"),
    ],
)
def test_what_a_study_cannot_take_is_refused_with_the_reason(study: str, run: dict, words: str):
    with pytest.raises(ValueError, match=words):
        other(study, **run)


def test_a_study_that_takes_neither_says_so(monkeypatch: pytest.MonkeyPatch):
    plain = other("smoke")
    method = studies.get("smoke")
    monkeypatch.setattr(method, "_make", lambda run: plain)
    with pytest.raises(SettingsError, match="--evaluators profile: study 'smoke' measures by its own evaluators alone"):
        other("smoke", evaluators="profile")
    with pytest.raises(SettingsError, match="--objectives gmacs: study 'smoke' has objectives of its own alone"):
        other("smoke", objectives="gmacs")


@pytest.mark.parametrize(
    ("study", "run", "evaluators"),
    [
        ("smoke", {"objectives": "nsc"}, "cost nsc"),
        ("smoke", {"objectives": "latency_ms", "evaluators": "profile"}, "cost profile"),
        ("smoke", {"objectives": "nsc", "evaluators": "as_vit"}, "as_vit cost nsc"),
        ("smoke", {"objectives": "nsc,ntk_condition"}, "as_vit cost nsc"),
        ("as_vit", {"objectives": "nsc"}, "as_vit_closed_form cost nsc"),
        ("as_vit", {"objectives": "snip"}, "as_vit_closed_form cost gradient_scores"),
        ("as_vit", {}, "as_vit as_vit_closed_form cost"),
        ("tune", {"objectives": "nsc"}, "train nsc"),
    ],
)
def test_an_objective_stands_in_the_place_of_the_studys_own_scores(study: str, run: dict, evaluators: str):
    for phase in other(study, **run).phases:
        assert [call.name for call in phase.evaluators] == evaluators.split()


def test_compose_by_scores_alone_trains_nothing():
    (phase,) = made({"objectives": "nsc,snip,params_m"}, axis=("depth=1..4",)).phases
    assert [call.name for call in phase.evaluators] == ["nsc", "gradient_scores", "cost"]
    assert phase.example.recipe is None


@pytest.mark.parametrize(("study", "own"), [("as_vit", "as_vit"), ("compose", "train")])
def test_a_study_that_measured_its_own_scores_beside_the_objective_goes_on_to(study: str, own: str, tmp_path: Path):
    options = ComposeOptions(axis=("depth=1..4",)) if study == "compose" else None
    settings = RunSettings(study=study, runs=tmp_path, objectives=("nsc",), options=options, defaults=CONVERGING)
    phase = studies.get(study)(settings).phases[0]
    assert own in (call.name for call in phase.evaluators)
    open_phase(f"{study}/{phase.name}", phase, settings, "digits", open_storage(str(tmp_path / "optuna.journal")))
    resumed = fitted(dataclasses.replace(settings, defaults=RunSettings.defaults), fresh=False)
    assert studies.get(study)(resumed).phases[0].evaluators == phase.evaluators
    anew = fitted(dataclasses.replace(settings, defaults=RunSettings.defaults), fresh=True)
    assert own not in (call.name for call in studies.get(study)(anew).phases[0].evaluators)


def test_an_objective_that_no_score_has_is_refused(tmp_path: Path):
    with pytest.raises(SpecError, match="unknown objective 'nscx'"):
        studies.get("as_vit")(RunSettings(study="as_vit", runs=tmp_path, objectives=("nscx",)))


def test_a_selection_on_test_images_is_refused(tmp_path: Path):
    with pytest.raises(SpecError, match=r"objective test_top1_pct: test images are for what is reported.*take val_top1_pct"):
        studies.get("tune")(RunSettings(study="tune", runs=tmp_path, objectives=("test_top1_pct",)))


def test_a_study_takes_a_leaderboard_entry_by_its_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = str(tmp_path / "runs")
    assert main(["compose", "--model", "vit_digits", "--axis", "depth=2,3", "--evaluators", "cost", "--runs", runs]) == 0
    digest = catalog.resolve("vit_digits").digest
    (entry,) = load_entries(runs, without=digest, label="depth=2")
    assert (
        main(["compose", "--name", "again", "--model", entry[:6], "--axis", "pooling=mean,max", "--evaluators", "cost", "--runs", runs])
        == 0
    )
    assert main(["tune", "--model", "beef", "--runs", runs]) == 2
    assert "no leaderboard entry has the digest 'beef'" in capsys.readouterr().err


def load_entries(runs: str, *, without: str, label: str) -> list[str]:
    from results.study_results import load

    rows = load(RunPaths(Path(runs)).mlflow_uri, "compose")
    return [digest for digest, said in zip(rows["digest"], rows["label"], strict=True) if digest != without and label in said]

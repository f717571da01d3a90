"""The command line as a user meets it: what it prints, and one clear line for every mistake, before any work."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_command, run_here

from results.paths import place_flags
from search.arguments import parse_recipe, parse_study
from search.run import main
from search.studies.ablations import AblationOptions
from space.recipe import Recipe

SEED = "as_vit:8,2,3|4,1,2|4,1,4|4,1,6|32"


def test_list_names_what_there_is_without_importing_the_heavy_libraries(tmp_path: Path):
    listed = run_command("list", cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert listed.returncode == 0, listed.stderr
    for name in (
        "as_vit",
        "smoke",
        "deit_small",
        "vit_resnas/tiny",
        "mixer window_attention",
        "pooling ggem",
        "profile",
        "policy_gradient",
        "nsga2",
    ):
        assert f"  {name} " in listed.stdout
    imported = {line.split("|")[-1].strip() for line in listed.stderr.splitlines()}
    assert not imported & {"torch", "timm", "ray", "optuna", "mlflow", "pandas", "numpy"}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["as_vit", "--help"], ["ablations", "--help"], ["compose", "--help"], ["describe", "--help"], ["evaluate", "--help"]],
)
def test_help_is_there_and_imports_nothing_heavy(tmp_path: Path, arguments: list[str]):
    shown = run_command(*arguments, cwd=tmp_path, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert shown.returncode == 0
    assert "usage:" in shown.stdout
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert not imported & {"torch", "timm", "ray", "optuna", "mlflow", "pandas"}


def test_describe_gives_exact_integers_that_add_up(tmp_path: Path):
    described = json.loads(run_here(main, "describe", "deit_small", "--json", cwd=tmp_path).stdout)
    assert described.keys() == {"digest", "params", "macs", "fvcore_macs", "parts", "spec"}
    assert (described["params"], described["macs"], described["fvcore_macs"]) == (22_050_664, 4_598_882_304, 4_608_338_304)
    for count in ("params", "macs", "fvcore_macs"):
        assert sum(part[count] for part in described["parts"].values()) == described[count]


def test_a_described_spec_is_found_again_by_its_file(tmp_path: Path):
    described = json.loads(run_here(main, "describe", SEED, "--json", cwd=tmp_path).stdout)
    (tmp_path / "spec.json").write_text(json.dumps(described["spec"]))
    again = json.loads(run_here(main, "describe", "spec.json", "--json", cwd=tmp_path).stdout)
    assert again == described


def test_evaluate_measures_one_model_now(tmp_path: Path):
    spec = json.loads(run_here(main, "describe", SEED, "--json", cwd=tmp_path).stdout)["spec"]
    (tmp_path / "small.json").write_text(json.dumps({**spec, "img_size": 32, "num_classes": 10}))
    flags = ["small.json", "--evaluators", "as_vit,cost", "--seed", "3", "--set", "as_vit.mode=reference", "--json"]
    flags += ["--set", "as_vit.num_repeats=2", "--set", "as_vit.num_angles=2", "--set", "as_vit.ntk_batch_size=2"]
    first, second = run_command("evaluate", *flags, cwd=tmp_path), run_here(main, "evaluate", *flags, cwd=tmp_path)
    measured = json.loads(first.stdout)
    assert measured.keys() == {"digest", "values", "elapsed_s", "device", "versions", "seed", "num_threads", "evaluators", "warnings"}
    assert measured["seed"] == 3
    assert measured["evaluators"]["as_vit"]["num_angles"] == 2
    assert {"length_distortion", "ntk_condition", "params_m", "gmacs"} <= measured["values"].keys()
    assert json.loads(second.stdout)["values"] == measured["values"]


MISTAKES = {
    "unknown study": (["as_vitt"], "unknown study or command 'as_vitt'; did you mean 'as_vit'?"),
    "unknown model": (["describe", "deit_smal"], "did you mean 'deit_small'"),
    "unknown evaluator": (["evaluate", "deit_small", "--evaluators", "profil"], "unknown evaluator 'profil'; did you mean 'profile'?"),
    "unknown strategy": (["as_vit", "--strategy", "tpee"], "unknown strategy 'tpee'; did you mean 'tpe'?"),
    "unknown setting": (["as_vit", "--set", "as_vit.mod=x"], "unknown setting 'mod'"),
    "setting not allowed": (["as_vit", "--set", "as_vit.mode=fast"], "allowed: default, reference"),
    "settings of another evaluator": (["as_vit", "--set", "profile.batch_size=2"], "unknown evaluator 'profile' in --set"),
    "size that does not fit": (["evaluate", "vit_resnas_tiny", "--evaluators", "cost", "--img-size", "100"], "nearest img_size"),
    "malformed topology": (["describe", "as_vit:9,2,3|4,1,2|4,1,4|4,1,6|32"], "4, 5, 6, 7, 8"),
    "subnet of another depth": (
        ["describe", "vit_resnas/digits:32,4x96,4x96|64,4x192,4x192,4x192|128,4x384,4x384,4x384"],
        "subnet string of vit_resnas/digits: stage 1 has 2 blocks; allowed: 3",
    ),
    "value of a subnet": (
        ["describe", "vit_resnas/digits:32,4x96,-,4x96|64,4x192,4x192,4x190|128,4x384,4x384,4x384"],
        "block 3 of stage 2: hidden_dim is 190; allowed: 192, 160, 128, 96",
    ),
    "malformed network": (["describe", "vit_resnas:176,3x704|352,10|704,8x2560"], "block 1 of stage 2 is not HEADSxHIDDEN, as in 3x704"),
    "budget too small": (["as_vit", "--max-params-m", "0.01"], "no network of space 'as_vit/topology' is within --max params_m=0.01"),
    "unreachable compute budget": (
        ["smoke", "--max-gmacs", "1e-9"],
        "the nearest of its 720 has gmacs 0.0003935 (ViT-32x2/8 2h r2 learned mean)",
    ),
    "lower bound too large": (["smoke", "--min", "depth=5"], "is within --min depth=5; the nearest of its 720 has depth 4 (ViT-32x4/4"),
    "bounds that no family meets": (["as_vit", "--max", "gmacs=0.2", "--min", "params_m=25"], "of space 'as_vit/growth' is within"),
    "bounds without a network between": (["smoke", "--max", "depth=3.5", "--min", "depth=3.1"], "--max depth=3.5 --min depth=3.1"),
    "bounds the wrong way round": (["smoke", "--max", "depth=2", "--min", "depth=3"], "--max depth=2 is below --min depth=3"),
    "lower bound above growth's end": (["as_vit", "--min", "params_m=150"], "give --max params_m=M too"),
    "bound that takes measuring": (
        ["smoke", "--max", "length_distortion=1"],
        "length_distortion is known only after measuring (evaluator as_vit); a budget takes what is known before: closed_form, depth",
    ),
    "bound on no metric": (["smoke", "--min", "gmac=1"], "unknown metric 'gmac' in --min gmac=1; did you mean 'gmacs'?"),
    "bound without a meaning": (["smoke", "--max", "closed_form=1"], "has no meaning in space 'smoke/tiny_vit'"),
    "bound without a number": (["smoke", "--max", "gmacs=few"], "--max 'gmacs=few' is malformed; METRIC=VALUE with a number"),
    "bound that is infinite": (["smoke", "--max", "gmacs=inf"], "--max gmacs=inf: a finite number is expected"),
    "bounds that contradict": (
        ["smoke", "--max", "params_m=2", "--max-params-m", "3"],
        "--max params_m=2 and --max-params-m 3 contradict each other",
    ),
    "bound on a fixed design": (["ablations", "--max", "gmacs=9"], "--max gmacs=9 means nothing here: the design is fixed"),
    "no such data": (["as_vit", "--data", "folder:/does/not/exist"], "/does/not/exist does not exist"),
    "data without an image": (["as_vit", "--data", "folder:."], "image"),
    "unknown kind of data": (["as_vit", "--data", "floder:."], "did you mean 'folder:PATH'?"),
    "image size": (["as_vit", "--img-size", "100"], "32"),
    "unreachable storage": (
        ["smoke", "--storage", "sqlite:////does/not/exist/o.db"],
        "Optuna storage 'sqlite:////does/not/exist/o.db' cannot be opened",
    ),
    "not a number": (["as_vit", "--trials", "0"], "--trials: '0' is not a whole number above 0"),
    "not a number at all": (["as_vit", "--trials", "many"], "--trials: 'many' is not a whole number above 0"),
    "negative seed": (["as_vit", "--seed", "-1"], "--seed: '-1' is not a whole number from 0"),
    "name with a slash": (["smoke", "--name", "a/b"], "--name 'a/b' is no name for a study"),
    "unknown factor": (["ablations", "--factor", "poling"], "unknown factor 'poling' in --factor; did you mean 'pooling'"),
    "level of no factor": (["ablations", "--level", "gem"], "FACTOR=LEVEL is expected"),
    "reference as a level": (["ablations", "--level", "pooling=class_token"], "the reference is always there"),
    "probe's seeds without probe": (["ablations", "--probe-seeds", "5"], "--probe-seeds means nothing without --linear-probe"),
    "option that is no number": (["ablations", "--seeds", "many"], "--seeds: 'many' is not a whole number"),
    "options of another study": (["smoke", "--seeds", "3"], "unrecognized arguments: --seeds 3"),
    "flag without meaning": (["ablations", "--trials", "3"], "--trials means nothing here"),
    "recipe of no field": (["evaluate", "vit_digits", "--evaluators", "train", "--recipe", "epoch=1"], "did you mean 'epochs'"),
    "recipe of no number": (["evaluate", "vit_digits", "--evaluators", "train", "--recipe", "epochs=x"], "a whole number is expected"),
    "unknown digest": (["describe", "0123456789abcdef"], "no leaderboard entry has the digest '0123456789abcdef'"),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_one_clear_line_and_status_2(tmp_path: Path, arguments: list[str], words: str):
    done = run_here(main, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error:" in line]) == 1
    assert not (tmp_path / "runs" / "work").exists()


def test_a_study_says_where_its_results_go_before_it_checks_anything(tmp_path: Path):
    arguments, words = MISTAKES["unknown strategy"]
    done = run_here(main, *arguments, "--storage", "sqlite:///o.db", cwd=tmp_path)
    assert words in done.stderr
    runs = tmp_path / "runs"
    assert done.stdout == f"results in {runs} (Optuna: sqlite:///{tmp_path}/o.db; MLflow: sqlite:///{runs}/mlflow.db)\n"


def test_the_process_ends_with_the_status_and_the_line_alone(tmp_path: Path):
    arguments, words = MISTAKES["unknown study"]
    done = run_command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {words}")
    assert done.stderr.count("\n") == 1


def test_a_study_explains_its_own_flags(tmp_path: Path):
    shown = run_command("ablations", "--help", cwd=tmp_path, env={"COLUMNS": "200"}).stdout
    assert "of this study:" in shown
    assert "--factor NAME" in shown
    assert "paired trainings of each level" in shown
    assert "(default: 3)" in shown
    assert "--factor" not in run_command("smoke", "--help", cwd=tmp_path).stdout
    assert "--axis TARGET=CHOICES" in run_command("compose", "--help", cwd=tmp_path).stdout


def test_options_become_the_fields_of_the_studys_own_class():
    settings, _ = parse_study("ablations", ["--factor", "pooling", "--factor", "mixing", "--seeds", "5", "--lr", "0.002", "--robustness"])
    assert settings.options == AblationOptions(factor=("pooling", "mixing"), seeds=5, lr=0.002, robustness=True)
    assert parse_study("ablations", [])[0].options == AblationOptions()


def test_a_recipe_is_read_field_by_field():
    text = "epochs=3, lr=0.01,flip=false,mixing=cutmix,mixing_grids=4/8"
    recipe = Recipe(epochs=3, seed=7, lr=0.01, flip=False, mixing="cutmix", mixing_grids=(4, 8))
    assert parse_recipe(text, 7) == recipe
    assert parse_recipe("", 7) is None


def test_evaluate_trains_one_model_with_a_recipe(tmp_path: Path):
    flags = ["--evaluators", "train", "--recipe", "epochs=1,batch_size=256,flip=false", "--workdir", tmp_path / "out", "--json"]
    done = run_here(main, "evaluate", "vit_digits", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 0 <= json.loads(done.stdout)["values"]["test_top1_pct"] <= 100
    assert "train (evaluator 1 of 1)  epoch 1 of 1 | " in done.stderr
    assert "train_loss" in done.stderr
    assert (tmp_path / "out" / "artifacts" / "predictions.npz").exists()


def test_an_unknown_component_of_a_spec_file_is_named_with_the_nearest(tmp_path: Path):
    spec = json.loads(run_here(main, "describe", "deit_tiny", "--json", cwd=tmp_path).stdout)["spec"]
    (tmp_path / "typo.json").write_text(json.dumps({**spec, "pooling": ["clas_token"]}))
    done = run_here(main, "describe", "typo.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'class_token'?" in done.stderr


def test_a_tracking_server_that_does_not_answer_is_named(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = run_here(main, "smoke", "--tracking-uri", f"http://127.0.0.1:{port}", cwd=tmp_path)
    assert done.returncode == 2
    assert f"http://127.0.0.1:{port}" in done.stderr


def test_the_script_is_executable_as_it_stands():
    assert os.access(REPOSITORY / "search" / "run.py", os.X_OK)
    assert (REPOSITORY / "search" / "run.py").read_text().startswith("#!")


def test_a_gpu_that_is_not_there_is_one_line_and_status_2(tmp_path: Path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = run_here(main, "evaluate", "deit_tiny", "--evaluators", "profile", "--gpus", "1", cwd=tmp_path)
    assert done.returncode == 2
    # Torch may take so long to be imported that a line says so.
    errors = [line for line in done.stderr.splitlines() if "so far" not in line]
    assert errors == ["error: --gpus 1: there is no CUDA device on this machine; leave --gpus out to measure on the CPU"]


def test_help_says_defaults_that_exist_and_no_others(tmp_path: Path):
    shown = run_here(main, "as_vit", "--help", cwd=tmp_path).stdout
    assert "(default: None)" not in shown
    assert "(default: digits)" in " ".join(shown.split())


def test_hints_name_the_place_that_is_not_found_without(tmp_path: Path):
    there = tmp_path / "my runs"
    assert place_flags(there, None, {}) == f" --runs '{there}'"
    assert place_flags(there, None, {"VITSCALE_RUNS": str(there)}) == ""
    assert place_flags(there, "http://h:5000", {"VITSCALE_RUNS": str(there)}) == " --tracking-uri http://h:5000"

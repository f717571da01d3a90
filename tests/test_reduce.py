"""The study `reduce`: its budgets, what it tests, and the whole of it on real digits."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run_here

from results.paths import RunPaths
from results.records import Failure
from results.report import load_report
from search.budget import Budget
from search.measuring import Measuring
from search.run import main
from search.studies.reduce import LEVELS, METHODS, ReduceOptions
from search.study import Need, RunSettings, SettingsError, Study, studies
from space.cost import cost
from space.families.vit import plain_vit
from space.model import build_model
from space.recipe import Recipe
from space.reductions import narrower_within, placed, reduced_within, without_reductions
from space.registry import SpecError
from space.search_space import Candidate
from workers.checkpoints import save_model
from workers.evaluate import evaluate
from workers.evaluator import Call, EarlierTrial

SHARES = (85, 70)


def make(run: dict | None = None, **options) -> Study:
    return studies.get("reduce")(RunSettings(study="reduce", runs=Path(), options=ReduceOptions(**options), **(run or {})))


def candidate(study: Study, level: str, share: int, seed: int = 0) -> Candidate:
    return study.phase("reduce").space.decode({"factor": f"macs_{share}", f"macs_{share}": level, "seed": seed})


def macs(given: Candidate) -> int:
    return cost(given.model).fvcore_macs


def test_every_network_keeps_its_budget_and_no_milder_one_would():
    study = make()
    whole = macs(candidate(study, "whole", 85))
    for share in SHARES:
        for level in (*METHODS, "random_drop", "narrower"):
            spent = macs(candidate(study, level, share)) / whole
            # The coarsest step: a percent of the patches kept, a patch in every block, or a width one lower.
            assert share / 100 - 0.05 < spent <= share / 100, (level, share)
    assert candidate(study, "whole", 85) == candidate(study, "whole", 70)


def test_what_is_reduced_is_the_trained_network_and_seeds_are_those_of_its_training():
    study = make()
    trained = study.phase("train").space.decode({"network": "whole", "seed": 2})
    narrower = study.phase("train").space.decode({"network": "narrower_70", "seed": 2})
    for level in METHODS:
        reduced = candidate(study, level, 70, seed=2)
        assert reduced.recipe == trained.recipe
        assert without_reductions(reduced.model) == trained.model
    assert candidate(study, "narrower", 70, seed=2).model == narrower.model
    drops = [candidate(study, "random_drop", 70, seed).model.stages[0].blocks[3].token_reduction for seed in (0, 1)]
    assert [drop.choices.get("seed", 0) for drop in drops] == [0, 1]
    assert study.phase("reduce").needs == (Need("train", "all"),)


def test_every_reducer_is_compared_with_both_baselines_and_the_whole_network():
    design = make().designs["reduce"]
    for factor in ("macs_85", "macs_70"):
        own = {(contrast.levels, contrast.baseline) for contrast in design.contrasts if contrast.factor == factor}
        singles = {((level,), baseline) for level in METHODS for baseline in ("random_drop", "narrower", "whole")}
        assert own == {(METHODS, "random_drop"), (("random_drop",), "narrower"), *singles}


def test_the_levels_of_stored_studies_keep_their_order():
    assert LEVELS == ("whole", "random_drop", "narrower", "evit", "gtp", "diffrate", "mctf")


def test_the_profile_takes_a_batch_unless_the_user_says_otherwise():
    def batch_size(**settings: str) -> int:
        (profile,) = (call for call in make({"evaluator_settings": {"profile": settings}}).calls if call.name == "profile")
        return profile.settings.batch_size

    assert (batch_size(), batch_size(batch_size="1"), batch_size(num_runs="40")) == (32, 1, 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": ("0",)}, "--share '0'; a whole number from 1 to 99"),
        ({"share": ("70%",)}, "--share '70%'; a whole number from 1 to 99"),
        ({"seeds": 0}, "--seeds is 0; at least 1"),
        ({"model": "as_vit_seed"}, "--model as_vit_seed: networks of one stage can be reduced; this one has 4"),
        ({"model": "timm:test_convnext"}, "reduce takes networks of our components"),
        ({"model": "reduced:gtp,P=2:vit_digits"}, "reduces its tokens already; name the network that keeps them"),
        ({"share": ("1",)}, "no narrower network costs at most"),
        ({"run": {"num_trials": 3}}, "--trials means nothing here"),
        ({"run": {"budget": Budget(at_most={"gmacs": 1.0})}}, "means nothing here: --share says"),
        ({"run": {"seed": 9999}}, "--seed 9999 and 3 seeds: seeds go up to 9999"),
    ],
)
def test_flags_without_a_meaning_are_refused(given: dict, message: str):
    with pytest.raises((SpecError, SettingsError), match=message):
        make(**given)


def test_a_reducer_that_reaches_no_budget_is_left_out_and_named():
    study = make(share=("80", "52"))
    levels = {factor: {c.levels[0] for c in study.designs["reduce"].contrasts if c.factor == factor} for factor in ("macs_80", "macs_52")}
    assert levels["macs_80"] - levels["macs_52"] == {"gtp", "diffrate", "mctf"}
    assert "level gtp of macs_52 is left out: gtp cannot bring this network to" in " ".join(study.notes)


PLAIN = plain_vit(12, 2, 2, patch_size=2, img_size=8, num_classes=10)


def test_a_reducer_that_cannot_reach_a_budget_says_so():
    with pytest.raises(SpecError, match="mctf cannot bring this network to 1e-05 GMAC: it stops at"):
        reduced_within(PLAIN, "mctf", 10_000)
    assert cost(narrower_within(PLAIN, 50_000)).fvcore_macs <= 50_000 < cost(PLAIN).fvcore_macs


def measured(model, folder: Path, seed: int, trained_under: int = 3):
    weights = folder / "trained"
    save_model(weights / "model.pt", build_model(PLAIN, seed=0), PLAIN)
    earlier = {"train": (EarlierTrial(number=0, workdir=weights, key="", seed=trained_under),)}
    measuring = Measuring(seed=0, data="digits", data_fingerprint="", workdir=lambda number: folder / str(number), earlier=earlier)
    return evaluate(measuring.job(0, Candidate(model=model, recipe=Recipe(epochs=1, seed=seed)), (Call("reduced"),)))


def test_the_weights_are_those_of_the_same_seed(tmp_path: Path):
    plain, reduced = measured(PLAIN, tmp_path, seed=3), measured(placed(PLAIN, "gtp", P=2), tmp_path, seed=3)
    assert not isinstance(plain, Failure)
    assert not isinstance(reduced, Failure)
    assert plain.values != reduced.values
    other = measured(placed(PLAIN, "gtp", P=2), tmp_path, seed=3, trained_under=4)
    assert isinstance(other, Failure)
    assert f"left no network {PLAIN.digest} that was trained under seed 3" in other.message


def test_weights_from_a_file_are_reduced_without_any_training(tmp_path: Path):
    model = make().phase("train").space.decode({"network": "whole", "seed": 0}).model
    save_model(tmp_path / "model.pt", build_model(model, seed=5), model)
    study = make({"weights": tmp_path / "model.pt"})
    assert [phase.name for phase in study.phases] == ["reduce"]
    assert {contrast.baseline for contrast in study.designs["reduce"].contrasts} == {"random_drop", "whole"}
    phase = study.phase("reduce")
    assert [call.name for call in phase.evaluators] == ["accuracy", "profile"]
    measuring = Measuring(seed=0, data="digits", data_fingerprint="", workdir=lambda number: tmp_path / str(number))
    values = {}
    for number, level in enumerate(("whole", "gtp")):
        outcome = evaluate(measuring.job(number, candidate(study, level, 70), phase.evaluators[:1]))
        assert not isinstance(outcome, Failure), outcome
        values[level] = outcome.values["test_nll"]
    assert values["whole"] != values["gtp"]


@pytest.mark.slow
@pytest.mark.usefixtures("serial_pool")
def test_the_whole_study_prints_effects_of_every_reducer(tmp_path: Path):
    flags = ["reduce", "--share", "70", "--seeds", "1", "--epochs", "1", "--set", "profile.num_runs=30", "--set", "profile.batch_size=1"]
    done = run_here(main, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reduce/reduce  7/7 done" in done.stdout
    assert "P macs_70: mean(evit, gtp, diffrate, mctf) - random_drop" in done.stdout
    (effects,) = load_report(RunPaths(tmp_path / "runs").mlflow_uri, "reduce").effects
    assert set(effects.levels["level"]) == set(LEVELS)
    assert (effects.table["n_seeds"] == 1).all()

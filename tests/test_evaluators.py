"""The contract of every registered evaluator, and facts about the small ones."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from torch import nn

from results.records import Failure
from space.cost import cost
from space.families.as_vit import Network, spec
from space.model import build_model
from space.recipe import Recipe
from space.registry import SpecError
from space.search_space import Candidate
from space.spec import Component
from space.supernet_space import BlockChoices, StageChoices, SupernetSpace
from space.timm_spec import TimmSpec
from workers.checkpoints import save_model
from workers.data import load_dataset
from workers.evaluate import Job, evaluate
from workers.evaluator import Call, Context, EarlierTrial, NoSettings, evaluators
from workers.evaluators import profile as profile_module
from workers.timing import Execution, on_device
from workers.weights import weights_from

SMALL = spec(Network.parse("4,8,2|2,4,2|2,2,2|2,1,2|16,8"), img_size=32, num_classes=10)
CONTEXT = Context(seed=0)
RECIPE = Recipe(epochs=1, batch_size=256)
# Other test files register evaluators of their own.
EVALUATORS = [each for each in map(evaluators.get, evaluators.names()) if each.function.__module__.startswith("workers.evaluators.")]
CHOICES = tuple(StageChoices(widths=(stage.embed_dim,), blocks=(BlockChoices(),) * len(stage.blocks)) for stage in SMALL.stages)
SPACE = SupernetSpace(name="small", largest=SMALL, stages=CHOICES)
QUICK = {
    "as_vit": {"num_repeats": "2", "ntk_batch_size": "4", "num_angles": "2"},
    "az_nas": {"batch_size": "4"},
    "gradient_scores": {"batch_size": "4"},
    "gradient_variance": {"batch_size": "4"},
    "grasp": {"batch_size": "4"},
    "head_confidence": {"batch_size": "4"},
    "linear_probe": {"epochs": "1"},
    "profile": {"num_runs": "30", "num_warmup": "1"},
    "robustness": {"max_images": "20"},
    "supernet": {"space": json.dumps(SPACE.to_json())},
    "throughput": {"max_batch_size": "2"},
    "w_pca": {"batch_size": "4"},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=EVALUATORS, ids=lambda each: each.name)
def each(request):
    return request.param


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work directory of a trial that has left its network."""
    workdir = tmp_path_factory.mktemp("trained")
    save_model(workdir / "model.pt", build_model(SMALL, seed=0), SMALL, space=json.dumps(SPACE.to_json()))
    return workdir


@pytest.fixture
def run(trained, tmp_path):
    """Each call has a work directory of its own, with a trained network in it and in that of an earlier phase."""

    def run(each, number=0):
        workdir = shutil.copytree(trained, tmp_path / str(number))
        dataset = load_dataset("digits", img_size=SMALL.img_size) if each.needs_dataset else None
        context = Context(
            seed=0,
            dataset=dataset,
            recipe=RECIPE,
            weights=weights_from(workdir / "model.pt", SMALL) if each.weights == "needed" else None,
            workdir=workdir,
            earlier={
                phase: (EarlierTrial(number=0, workdir=trained, key=phase, seed=RECIPE.seed),)
                for phase in ("backbone", "supernet", "train")
            },
        )
        return each.function(SMALL, context, each.parse_settings(QUICK.get(each.name, {})))

    return run


def test_exactly_the_declared_metrics_are_measured_and_finite(each, run):
    measured = run(each)
    assert set(measured) == {metric.name for metric in each.metrics}
    assert all(math.isfinite(value) for value in measured.values())


def test_equal_calls_give_equal_values(each, run):
    if not each.is_deterministic:
        pytest.skip("measures time")
    assert run(each) == run(each, 1)


def test_a_model_of_timm_is_measured_or_refused_with_the_reason(each, tmp_path):
    """Whatever a study gives to an evaluator, the user reads a sentence and no AttributeError."""
    model = TimmSpec(name="test_convnext", img_size=32, num_classes=10)
    save_model(tmp_path / "model.pt", build_model(model, seed=0), model)
    dataset = load_dataset("digits", img_size=32) if each.needs_dataset else None
    context = Context(
        seed=0,
        dataset=dataset,
        recipe=RECIPE,
        weights=weights_from(tmp_path / "model.pt", model) if each.weights == "needed" else None,
        workdir=tmp_path,
        earlier={phase: (EarlierTrial(number=0, workdir=tmp_path, key=phase),) for phase in ("backbone", "train")},
    )
    refusal = ""
    measured = {}
    try:
        measured = each.function(model, context, each.parse_settings(QUICK.get(each.name, {})))
    except SpecError as error:
        refusal = str(error)
    assert all(math.isfinite(value) for value in measured.values())
    assert measured or "timm" in refusal


def test_the_default_settings_name_a_call(each):
    assert dataclasses.is_dataclass(each.settings)
    first, second = Call(each.name, each.settings()), Call(each.name, each.settings())
    assert first.digest == second.digest
    assert first.evaluator is each


def test_every_evaluator_says_what_it_measures(each):
    assert evaluators.summary(each.name)
    assert all(metric.goal in ("minimize", "maximize") for metric in each.metrics)


@pytest.mark.parametrize(
    ("settings", "recipe", "words"),
    [
        ({"coarse_grid": "5", "fine_grid": "7"}, RECIPE, "two divisors of img_size 32"),
        ({}, dataclasses.replace(RECIPE, mixing="patch_mixing", mixing_grids=(33,)), "33 cells per side"),
        ({}, dataclasses.replace(RECIPE, mixing="transmix"), "no class token"),
        ({}, dataclasses.replace(RECIPE, randaugment="rand-m9-mstd"), "rand-m9-mstd0.5-inc1"),
        ({}, None, "needs a recipe"),
    ],
)
def test_what_can_never_be_measured_is_refused_before_the_training(tmp_path, settings, recipe, words):
    """Robustness comes last and its grids are still looked at first."""
    chosen = {"train": {}, "robustness": settings}
    calls = tuple(Call(name, evaluators.get(name).parse_settings(given)) for name, given in chosen.items())
    job = Job(
        trial=0,
        candidate=Candidate(model=SMALL, recipe=recipe),
        calls=calls,
        seed=0,
        data="digits",
        data_fingerprint="digits",
        workdir=tmp_path,
    )
    outcome = evaluate(job)
    assert isinstance(outcome, Failure)
    assert outcome.kind == "illegal"
    assert words in outcome.message
    assert not list(tmp_path.iterdir())


def test_settings_that_change_no_number_are_no_part_of_a_measurement():
    usual, patient = (evaluators.get("train").parse_settings(given) for given in ({}, {"checkpoint_every_s": "600"}))
    assert Call("train", usual).digest == Call("train", patient).digest


def test_cost_is_the_analytic_count(run):
    counted = cost(SMALL)
    measured = run(evaluators.get("cost"))
    assert measured == {"params_m": counted.params / 1e6, "gmacs": counted.macs / 1e9, "depth": 4}


def test_the_closed_form_is_near_the_length_distortion():
    # At 64 px the last grid is 2 x 2, and the zero padding of the mergings, which the form leaves out, takes its largest share.
    model = spec(Network.parse("8,2,3|2,1,2|2,1,4|2,1,6|32,32"), img_size=64, num_classes=10)
    closed_form = evaluators.get("as_vit_closed_form").function(model, CONTEXT, NoSettings())["closed_form"]
    scored = evaluators.get("as_vit").function(model, CONTEXT, evaluators.get("as_vit").parse_settings({"ntk_batch_size": "2"}))
    assert scored["length_distortion"] == pytest.approx(closed_form, rel=0.15)


def test_the_closed_form_refuses_what_it_does_not_hold_for():
    plain = dataclasses.replace(SMALL, position=Component("learned"))
    with pytest.raises(SpecError, match="As-ViT alone"):
        evaluators.get("as_vit_closed_form").function(plain, CONTEXT, NoSettings())


def peak_mb(batch_size=1, precision="fp32"):
    """What `profile` reports as `memory_mb`."""
    with torch.inference_mode():
        network = on_device(SMALL, Execution(precision=precision), batch_size=batch_size, device="cpu", seed=0)
        return profile_module._peak_bytes(*network) / 1e6


def test_profile_memory_holds_the_weights_and_grows_with_the_batch():
    assert peak_mb() > 4 * cost(SMALL).params / 1e6
    assert peak_mb(batch_size=8) > peak_mb()


def test_peak_memory_counts_what_is_alive_together():
    class Doubling(nn.Module):
        def forward(self, x):
            return x.exp().exp().exp()

    with torch.inference_mode():
        # Each step holds its own input and output beside the caller's input: three storages of 4,000 bytes.
        assert profile_module._peak_bytes(Doubling(), torch.zeros(1000)) == 3 * 4000


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_profile_runs_in_half_precision_with_half_the_memory(precision):
    assert peak_mb(precision=precision) == pytest.approx(peak_mb() / 2, rel=0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["profile", "throughput", "as_vit"])
def test_evaluators_run_on_the_gpu(name, tmp_path):
    each = evaluators.get(name)
    settings = each.parse_settings(QUICK[name])
    on_gpu = each.function(SMALL, Context(seed=0, device="cuda", workdir=tmp_path), settings)
    assert all(math.isfinite(value) for value in on_gpu.values())
    if name == "as_vit":
        on_cpu = each.function(SMALL, CONTEXT, settings)
        assert on_gpu["length_distortion"] == pytest.approx(on_cpu["length_distortion"], rel=1e-3)

"""The contract of every registered evaluator, and facts about the small ones."""

import dataclasses
import math
import statistics

import pytest
import torch
from torch import nn

from space.as_vit import Network, spec
from space.cost import cost
from space.registry import SpecError
from space.spec import Component
from workers.evaluator import Call, Context, NoSettings, evaluators
from workers.evaluators import profile as profile_module
from workers.evaluators.profile import ProfileSettings, profile

SMALL = spec(Network.parse("4,8,2|2,4,2|2,2,2|2,1,2|16,8"), img_size=32, num_classes=10)
CONTEXT = Context(seed=0)
# Other test files register evaluators of their own.
EVALUATORS = [each for each in map(evaluators.get, evaluators.names()) if each.function.__module__.startswith("workers.evaluators.")]
QUICK = {"as_vit": {"num_repeats": "2", "ntk_batch_size": "4", "num_angles": "2"}, "profile": {"num_runs": "30", "num_warmup": "1"}}


@pytest.fixture(autouse=True)
def one_thread():
    # Equal values need an equal number of threads, and tiny networks run no faster on more.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=EVALUATORS, ids=lambda each: each.name)
def each(request):
    return request.param


def run(each):
    return each.function(SMALL, CONTEXT, each.parse_settings(QUICK.get(each.name, {})))


def test_exactly_the_declared_metrics_are_measured_and_finite(each):
    measured = run(each)
    assert set(measured) == {metric.name for metric in each.metrics}
    assert all(math.isfinite(value) for value in measured.values())


def test_equal_calls_give_equal_values(each):
    if each.name == "profile":
        pytest.skip("measures time")
    assert run(each) == run(each)


def test_the_default_settings_name_a_call(each):
    assert dataclasses.is_dataclass(each.settings)
    first, second = Call(each.name, each.settings()), Call(each.name, each.settings())
    assert first.digest == second.digest
    assert first.evaluator is each


def test_every_evaluator_says_what_it_measures(each):
    assert evaluators.summary(each.name)
    assert all(metric.goal in ("minimize", "maximize") for metric in each.metrics)


def test_cost_is_the_analytic_count():
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


def test_profile_reports_the_median_and_spread_of_its_runs(monkeypatch):
    latencies = iter(float(number) for number in range(1, 31))
    monkeypatch.setattr(profile_module, "_latency_ms", lambda network, images: next(latencies))
    measured = profile(SMALL, CONTEXT, ProfileSettings(num_runs=30, num_warmup=1, batch_size=4))
    lower, median, upper = statistics.quantiles(range(1, 31), n=4)
    assert (measured["latency_ms"], measured["latency_iqr_ms"]) == (median, upper - lower)
    assert measured["throughput_img_s"] == pytest.approx(4 * 1000 / median)


def test_profile_memory_holds_the_weights_and_grows_with_the_batch():
    one, many = (profile(SMALL, CONTEXT, ProfileSettings(num_runs=30, num_warmup=1, batch_size=size))["memory_mb"] for size in (1, 8))
    assert one > 4 * cost(SMALL).params / 1e6
    assert many > one


def test_peak_memory_counts_what_is_alive_together():
    class Doubling(nn.Module):
        def forward(self, x):
            return x.exp().exp().exp()

    with torch.inference_mode():
        # Each step holds its own input and output beside the caller's input: three storages of 4,000 bytes.
        assert profile_module._peak_bytes(Doubling(), torch.zeros(1000)) == 3 * 4000


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_profile_runs_in_half_precision_with_half_the_memory(precision):
    full, half = (
        profile(SMALL, CONTEXT, ProfileSettings(num_runs=30, num_warmup=1, precision=name))["memory_mb"] for name in ("fp32", precision)
    )
    assert half == pytest.approx(full / 2, rel=0.2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["profile", "as_vit"])
def test_evaluators_run_on_the_gpu(name):
    each = evaluators.get(name)
    settings = each.parse_settings(QUICK[name])
    on_gpu = each.function(SMALL, Context(seed=0, device="cuda"), settings)
    assert all(math.isfinite(value) for value in on_gpu.values())
    if name == "as_vit":
        on_cpu = each.function(SMALL, CONTEXT, settings)
        assert on_gpu["length_distortion"] == pytest.approx(on_cpu["length_distortion"], rel=1e-3)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ({"precision": "fp8"}, "allowed: fp32, bf16, fp16"),
        ({"num_runs": "10"}, "whole numbers from 30"),
        ({"batch_size": "0"}, "whole numbers from 1"),
    ],
)
def test_profile_settings_out_of_range_are_refused(assignment, words):
    with pytest.raises(ValueError, match=words):
        evaluators.get("profile").parse_settings(assignment)

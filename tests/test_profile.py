"""The evaluators that measure time: how a network is executed, when it is warm, what is marked, and what the best batch is."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from space.families.as_vit import Network, spec
from space.model import build_model
from space.registry import SpecError
from workers import device_state, timing
from workers.device_state import Gpu, is_overloaded
from workers.evaluator import ARTIFACTS, Call, Context, evaluators
from workers.evaluators.profile import NOISY_SPREAD, ProfileSettings, profile
from workers.evaluators.throughput import BatchSearch, ThroughputSettings, best_batch, throughput
from workers.resources import Resources, resources_of
from workers.timing import Execution, Rounds, Run, cpu_threads, in_turns, is_stationary, noise, percentiles, runnable, timed_run, warm_up

SMALL = spec(Network.parse("4,8,2|2,4,2|2,2,2|2,1,2|16,8"), img_size=32, num_classes=10)

pytestmark = pytest.mark.usefixtures("one_thread")


def profiled(workdir: Path, **settings: Any) -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """What `profile` measures, its artifact and its warnings."""
    warnings: list[str] = []
    context = Context(seed=0, workdir=workdir, warn=warnings.append, resources=Resources(node_share=1.0))
    measured = dict(profile(SMALL, context, ProfileSettings(**{"num_runs": 30, "num_warmup": 1, **settings})))
    return measured, json.loads((workdir / ARTIFACTS / "profile.json").read_text()), warnings


def test_a_profile_holds_every_run_and_what_follows_from_them(tmp_path: Path):
    measured, stored, _ = profiled(tmp_path, batch_size=2, precision="bf16", memory_format="channels_last", threads=1, num_runs=40)
    runs, anchor = stored["latencies_ms"], stored["anchor_rounds_ms"]
    assert runs == list(itertools.chain(*stored["rounds_ms"]))
    assert (len(runs), len(stored["rounds_ms"]), sum(map(len, anchor))) == (40, 10, 30)
    lower, median, upper = statistics.quantiles(runs, n=4)
    assert measured["latency_ms"] == median
    assert (measured["latency_q1_ms"], measured["latency_q3_ms"]) == (lower, upper)
    assert measured["latency_iqr_ms"] == upper - lower
    assert measured["latency_p90_ms"] <= measured["latency_p99_ms"] <= max(runs)
    assert measured["throughput_img_s"] == pytest.approx(2 * 1000 / median)
    assert measured["anchor_ms"] == statistics.median(itertools.chain(*anchor))
    assert measured["latency_to_anchor"] == statistics.median(stored["ratios"])
    circumstances = {"batch_size": 2, "precision": "bf16", "memory_format": "channels_last", "execution": "eager", "threads": 1}
    assert {name: stored[name] for name in circumstances} == circumstances
    assert (stored["img_size"], stored["device"], stored["anchor"]) == (32, "cpu", "deit_tiny")
    assert (measured["is_alone"], stored["is_alone"]) == (1.0, True)


def test_a_profile_is_noisy_exactly_where_it_says_why(tmp_path: Path):
    measured, stored, warnings = profiled(tmp_path)
    assert measured["is_noisy"] == float(bool(stored["doubts"]))
    assert warnings == [f"latency_ms is noisy: {doubt}" for doubt in stored["doubts"]]
    spreads = measured["latency_iqr_ms"] > NOISY_SPREAD * measured["latency_ms"]
    assert any("middle half" in doubt for doubt in stored["doubts"]) == spreads
    assert any("load average" in doubt for doubt in stored["doubts"]) == is_overloaded(stored["load_average"])


def test_times_are_doubted_for_their_spread_the_warm_up_and_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    latencies = itertools.cycle([100.0, 100.0, 111.0])
    monkeypatch.setattr("workers.evaluators.profile.timed_run", lambda one: Run(latency := next(latencies), latency))
    monkeypatch.setattr("workers.evaluators.profile.warm_up", lambda run, least: (least, False))
    monkeypatch.setattr("os.getloadavg", lambda: (1000.0, 0.0, 0.0))
    measured, stored, _ = profiled(tmp_path)
    assert [doubt.split(" ")[1] for doubt in stored["doubts"]] == ["middle", "runs", "load"]
    assert measured["is_noisy"] == 1.0


def test_load_is_too_much_from_half_a_core_more_than_there_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert [is_overloaded(load) for load in (0.0, 2.5, 2.6)] == [False, False, True]


def test_runs_are_stationary_where_the_last_two_windows_agree():
    steady = [10.0] * 5
    assert not is_stationary(steady + [10.0] * 4)
    assert is_stationary([90.0, *steady, *[10.3] * 5])
    assert not is_stationary([90.0, *steady, *[10.4] * 5])
    # A median of five does not see two slow runs.
    assert is_stationary([*steady, 10.0, 50.0, 10.0, 50.0, 10.0])


def test_the_warm_up_ends_at_stationarity_and_not_before_the_least_number_of_runs():
    falling = [100.0, 80.0, 60.0, 40.0, 20.0] + [10.0] * 100
    assert warm_up(iter(falling).__next__, least=1) == (13, True)
    assert warm_up(iter(falling).__next__, least=20) == (20, True)


def test_a_warm_up_without_end_is_given_up_and_said():
    clock = itertools.count(0, timing.MAX_WARMUP_S / 8)
    num_runs, stationary = warm_up(map(float, itertools.count(1, 10)).__next__, least=1, clock=lambda: next(clock))
    assert (num_runs, stationary) == (9, False)


def test_rounds_alternate_and_leave_out_the_first_run_after_the_other():
    order: list[str] = []

    def run(name: str, first_ms: int):
        times = itertools.count(first_ms)
        return lambda: order.append(name) or Run(float(next(times)), 1.0)

    rounds = in_turns(run("o", 0), run("a", 100), num_runs=5, num_rounds=2, num_anchor_runs=2)
    assert "".join(order) == "ooo" + "aa" + "oooo" + "aa"
    assert [[one.latency_ms for one in runs] for runs in rounds.own] == [[1, 2], [4, 5, 6]]
    assert [[one.latency_ms for one in runs] for runs in rounds.anchor] == [[101], [103]]


def test_a_load_that_lasts_for_rounds_cancels_in_the_ratio():
    own, anchor = ([[Run(ms * factor, ms * factor)] for factor in (1.0, 1.0, 2.5, 2.5, 1.7)] for ms in (30.0, 20.0))
    rounds = Rounds(own=tuple(map(tuple, own)), anchor=tuple(map(tuple, anchor)))
    assert rounds.ratios == pytest.approx([1.5] * 5)


def test_one_thread_is_compared_by_its_own_cpu_time():
    import time

    sleepy = SimpleNamespace(device=torch.device("cpu"), run=lambda: time.sleep(0.02))
    run = timed_run(sleepy)
    assert run.latency_ms >= 20
    assert run.compared_ms < 20
    with cpu_threads(2) as num_threads:
        run = timed_run(sleepy)
    assert (num_threads, torch.get_num_threads()) == (2, 1)
    assert run.compared_ms == run.latency_ms


def test_percentiles_are_linear_between_runs():
    percentile = percentiles([float(value) for value in range(1, 102)])
    assert (percentile(50), percentile(90), percentile(99)) == (51, 91, 100)


@pytest.mark.parametrize("execution", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_every_execution_computes_the_network(execution: str):
    chosen = Execution(execution=execution, memory_format="channels_last")
    network = build_model(SMALL, seed=0).eval()
    images = noise(SMALL, chosen, batch_size=2, device="cpu", seed=0)
    assert images.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = network(images)
        torch.testing.assert_close(runnable(network, images, chosen).run(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_a_cuda_graph_computes_the_network_again_on_other_images():
    chosen = Execution(execution="cuda_graph")
    network = build_model(SMALL, seed=0).eval().cuda()
    images = noise(SMALL, chosen, batch_size=2, device="cuda", seed=0)
    outputs: list[torch.Tensor] = []
    network.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.inference_mode():
        replayed = runnable(network, images, chosen)
        captured = outputs[-1]
        images.copy_(noise(SMALL, chosen, batch_size=2, device="cuda", seed=1))
        replayed.run()
        torch.cuda.synchronize()
        result = captured.clone()
        torch.testing.assert_close(result, network(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("evaluate", [(profile, ProfileSettings), (throughput, ThroughputSettings)])
def test_a_cuda_graph_is_refused_on_the_cpu(evaluate: Any, tmp_path: Path):
    measure, settings = evaluate
    with pytest.raises(SpecError, match="execution is 'cuda_graph', and the device is 'cpu'"):
        measure(SMALL, Context(seed=0, workdir=tmp_path), settings(execution="cuda_graph"))


REFUSED = {
    "precision": ({"precision": "fp8"}, "allowed: fp32, bf16, fp16"),
    "execution": ({"execution": "jit"}, "allowed: eager, compile, cuda_graph"),
    "memory format": ({"memory_format": "nhwc"}, "allowed: contiguous, channels_last"),
    "threads": ({"threads": "-1"}, "whole numbers from 0"),
    "runs": ({"num_runs": "10"}, "whole numbers from 30"),
    "batch": ({"batch_size": "0"}, "whole numbers from 1"),
}


@pytest.mark.parametrize(("assignment", "words"), REFUSED.values(), ids=REFUSED)
def test_settings_out_of_range_are_refused(assignment: dict[str, str], words: str):
    with pytest.raises(ValueError, match=words):
        evaluators.get("profile").parse_settings(assignment)


def test_settings_that_came_later_leave_old_keys_as_they_were():
    stored = {"batch_size": 1, "precision": "fp32", "num_runs": 50, "num_warmup": 10}
    assert Call("profile", ProfileSettings()).to_json()["settings"] == stored
    assert Call("profile", ProfileSettings(execution="compile")).to_json()["settings"] == stored | {"execution": "compile"}


def test_a_trial_that_measures_nothing_but_time_takes_a_whole_node():
    timed, counted, trained = (Call(name, evaluators.get(name).settings()) for name in ("profile", "cost", "train"))
    assert resources_of([timed, counted]).whole_node
    assert not resources_of([timed, trained]).whole_node
    assert not resources_of([counted]).whole_node


THROUGHPUTS = {1: 100.0, 2: 150.0, 4: 151.0, 8: 160.0, 16: 161.0, 32: 162.0, 64: 500.0}


def test_batches_double_until_two_doublings_in_a_row_gain_nothing():
    search = best_batch(THROUGHPUTS.__getitem__, 1024)
    assert list(search.throughputs) == [1, 2, 4, 8, 16, 32]
    assert (search.best, search.too_large) == (32, 0)
    assert list(best_batch(THROUGHPUTS.__getitem__, 5).throughputs) == [1, 2, 4]


def test_the_end_of_memory_is_an_answer_unless_a_single_image_is_too_much():
    def limited(batch_size: int) -> float:
        if batch_size > 4:
            raise torch.OutOfMemoryError
        return float(batch_size)

    assert best_batch(limited, 1024) == BatchSearch(throughputs={1: 1.0, 2: 2.0, 4: 4.0}, too_large=8)
    with pytest.raises(torch.OutOfMemoryError):
        best_batch(lambda batch_size: limited(5), 1024)

    def broken(batch_size: int) -> float:
        return 1 / (batch_size - 2)

    with pytest.raises(ZeroDivisionError):
        best_batch(broken, 1024)


def test_memory_that_really_ends_at_a_batch_is_an_answer(tmp_path: Path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    now_mb = next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (int(now_mb + 200) * 2**20, limits[1]))
    try:
        measured = throughput(SMALL, Context(seed=0, workdir=tmp_path), ThroughputSettings(max_batch_size=2**20))
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert measured["best_throughput_img_s"] > 0
    stored = json.loads((tmp_path / ARTIFACTS / "throughput.json").read_text())
    assert set(stored["throughput_img_s"]) >= {"1", "2", "4"}


class Nvml:
    """NVML's answers of a GPU whose clock falls under a power cap, as `pynvml` gives them; what it does not know raises as there."""

    class NVMLError(Exception): ...

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    nvmlClocksEventReasonHwSlowdown, nvmlClocksEventReasonHwThermalSlowdown, nvmlClocksEventReasonHwPowerBrakeSlowdown = 8, 64, 128
    nvmlClocksEventReasonSwThermalSlowdown, nvmlClocksEventReasonSwPowerCap = 32, 4

    def __init__(self, clocks_mhz: list[int], reasons: int):
        self._clocks, self._reasons = iter(clocks_mhz), reasons

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return next(self._clocks) if kind == self.NVML_CLOCK_SM else 2619

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        return self._reasons

    def __getattr__(self, name: str) -> Any:
        def unknown(*arguments: Any) -> Any:
            raise self.NVMLError(name)

        return unknown


@pytest.mark.parametrize(
    ("clocks_mhz", "reasons", "doubts"),
    [
        ([1980, 1950], 0, []),
        ([1980, 1950], 4, []),
        ([1980, 1500], 4, ["the clock of the GPU changed by more than 10%"]),
        ([1980, 1950], 64, ["the GPU slowed down (HwThermalSlowdown)"]),
    ],
)
def test_a_clock_that_changes_or_is_throttled_casts_doubt(clocks_mhz: list[int], reasons: int, doubts: list[str]):
    gpu = Gpu(Nvml(clocks_mhz, reasons), "handle")
    for _ in clocks_mhz:
        gpu.look()
    assert gpu.doubts() == doubts
    # Power, temperature and energy are not known to this one, and nothing fails.
    assert set(gpu.state()) == {"clocks_mhz", "memory_clock_mhz", "slowdowns"}
    assert gpu.energy(lambda: None, 1) == {}


def test_a_machine_without_a_gpu_or_its_library_says_nothing_of_it(monkeypatch: pytest.MonkeyPatch):
    assert device_state.static_state("cpu") == {}
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert Gpu.current() is None


@pytest.mark.gpu
def test_a_gpu_tells_its_clock_power_and_energy(tmp_path: Path):
    measured = profile(SMALL, Context(seed=0, device="cuda", workdir=tmp_path), ProfileSettings())
    stored = json.loads((tmp_path / ARTIFACTS / "profile.json").read_text())
    assert stored["anchor"] == "deit_small"
    if Gpu.current() is None:
        pytest.skip("no NVML here")
    assert min(stored["clocks_mhz"]) > 0
    assert stored["driver"]
    assert measured["energy_mj_img"] > 0
    assert math.isfinite(measured["power_w"])

"""Speed and size of a network where it runs: the one place that benchmark numbers come from.

Latency is the time of one forward pass of a batch, the device idle before it: the median over the runs, with quartiles and percentiles.
`memory_mb` is the peak of what the tensors of one eager forward pass occupy, weights and input included, in 1e6 bytes: the allocator's
own count on CUDA; on the CPU, where there is none, the count of the storages that are alive after each operator, without the scratch
space inside operators.

The runs are timed once they are stationary (`workers.timing`), in 10 rounds, in turns with an *anchor network*: DeiT-Ti on the CPU,
DeiT-S on CUDA, always one image in fp32, run eagerly on the trial's threads. `latency_to_anchor` is the latency over the anchor's, the
median over the rounds. The anchor is a clock that slows down as the network does, so the ratio compares across a shared machine where
milliseconds do not. Where a single thread of the CPU runs both, the ratio is of that thread's CPU time.

`is_noisy` is 1 where the times are not to be trusted, and a warning says why: the middle half of the runs spreads over more than
`NOISY_SPREAD` of the median; the runs were not stationary; the load average exceeds the cores; the clock of the GPU changed, or it
slowed down. `is_alone` is 1 where the scheduler kept other trials off the node.

The artifact `profile.json` holds what the times were measured under, and the time of every run, by rounds. On a GPU that counts its
energy, `power_w` and `energy_mj_img` are measured over a second of runs of the network alone.
"""

from __future__ import annotations

import itertools
import os
import statistics
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from results.records import Metric, write_json_atomically
from space import catalog
from space.cost import cost
from space.model import Model
from workers.device_state import Gpu, is_overloaded, static_state
from workers.evaluator import ARTIFACTS, Context, evaluator
from workers.timing import (
    Execution,
    Run,
    Runnable,
    cpu_threads,
    in_turns,
    latency_ms,
    on_device,
    percentiles,
    runnable,
    synchronize,
    timed_run,
    warm_up,
)

LEAST_RUNS = 30
NUM_ROUNDS = 10
ANCHORS = {"cpu": "deit_tiny", "cuda": "deit_small"}
ANCHOR_RUNS = 30
ANCHOR_WARMUP = 3
NOISY_SPREAD = 0.1
"""Interquartile range relative to the median. An idle machine stays below; another program on the same cores does not."""
PROFILE = "profile.json"


@dataclass(frozen=True, kw_only=True)
class ProfileSettings(Execution):
    """What is run and how often; the warm-up has `num_warmup` runs at least."""

    batch_size: int = 1
    num_runs: int = 50
    num_warmup: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("batch_size", 1), ("num_runs", LEAST_RUNS), ("num_warmup", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}; allowed: whole numbers from {least}")


@evaluator(
    "profile",
    metrics=(
        Metric("params_m", "minimize", "parameters, millions"),
        Metric("gmacs", "minimize", "multiply-adds for one image, 1e9"),
        Metric("latency_ms", "minimize", "forward pass of a batch, median"),
        Metric("latency_iqr_ms", "minimize", "forward pass of a batch, interquartile range"),
        Metric("latency_q1_ms", "minimize", "forward pass of a batch, lower quartile"),
        Metric("latency_q3_ms", "minimize", "forward pass of a batch, upper quartile"),
        Metric("latency_p90_ms", "minimize", "forward pass of a batch, 90th percentile"),
        Metric("latency_p99_ms", "minimize", "forward pass of a batch, 99th percentile"),
        Metric("latency_to_anchor", "minimize", "latency over that of the anchor network"),
        Metric("anchor_ms", "minimize", "forward pass of the anchor network, median"),
        Metric("throughput_img_s", "maximize", "images a second at the median latency"),
        Metric("memory_mb", "minimize", "peak memory of tensors in one forward pass, 1e6 bytes"),
        Metric("load_average", "minimize", "load average of the machine, last minute"),
        Metric("is_noisy", "minimize", "1 if the times are not to be trusted"),
        Metric("is_alone", "maximize", "1 if other trials were kept off the node"),
    ),
    settings=ProfileSettings,
    is_deterministic=False,
    measures_time=True,
    memory_mb=2000,
)
def profile(model: Model, context: Context, settings: ProfileSettings) -> Mapping[str, float]:
    """Latency, throughput and peak memory on the device at hand, beside an anchor network; parameters and MACs."""
    settings.check_device(context.device)
    counted = cost(model)
    gpu = Gpu.current() if context.device == "cuda" else None
    with torch.inference_mode(), cpu_threads(settings.threads) as num_threads:
        network, images = on_device(model, settings, batch_size=settings.batch_size, device=context.device, seed=context.seed)
        peak_bytes = _peak_bytes(network, images)
        own, anchor = runnable(network, images, settings), _anchor(context.device)
        num_warmup, is_stationary = warm_up(partial(latency_ms, own), least=settings.num_warmup)
        for _ in range(ANCHOR_WARMUP):
            anchor.run()

        def watched_run() -> Run:
            if gpu is not None:
                gpu.look()
            return timed_run(own)

        rounds = in_turns(
            watched_run,
            partial(timed_run, anchor),
            num_runs=settings.num_runs,
            num_rounds=NUM_ROUNDS,
            num_anchor_runs=ANCHOR_RUNS,
        )
        load_average = os.getloadavg()[0]
        energy = gpu.energy(own.run, settings.batch_size) if gpu else {}
    own_ms, anchor_ms = ([[run.latency_ms for run in runs] for runs in turns] for turns in (rounds.own, rounds.anchor))
    latencies_ms = list(itertools.chain(*own_ms))
    lower, median, upper = statistics.quantiles(latencies_ms, n=4)
    percentile = percentiles(latencies_ms)
    doubts = gpu.doubts() if gpu else []
    if upper - lower > NOISY_SPREAD * median:
        doubts.append(f"the middle half of the runs spreads over more than {100 * NOISY_SPREAD:.0f} % of their median")
    if not is_stationary:
        doubts.append("the runs were not stationary after the warm-up")
    if context.device == "cpu" and is_overloaded(load_average):
        doubts.append("the load average exceeds the cores of the machine")
    for doubt in doubts:
        context.warn(f"latency_ms is noisy: {doubt}")
    circumstances = {
        "batch_size": settings.batch_size,
        "precision": settings.precision,
        "memory_format": settings.memory_format,
        "execution": settings.execution,
        "img_size": model.img_size,
        "threads": num_threads,
        "device": context.device,
        "num_warmup": num_warmup,
        "is_stationary": is_stationary,
        "is_noisy": bool(doubts),
        "doubts": doubts,
        "is_alone": context.resources.is_alone,
        "load_average": load_average,
        "anchor": ANCHORS[context.device],
        **static_state(context.device),
        **(gpu.state() if gpu else {}),
        **energy,
    }
    times = {"latencies_ms": latencies_ms, "rounds_ms": own_ms, "anchor_rounds_ms": anchor_ms, "ratios": rounds.ratios}
    write_json_atomically(context.workdir / ARTIFACTS / PROFILE, {**circumstances, **times})
    return {
        "params_m": counted.params / 1e6,
        "gmacs": counted.macs / 1e9,
        "latency_ms": median,
        "latency_iqr_ms": upper - lower,
        "latency_q1_ms": lower,
        "latency_q3_ms": upper,
        "latency_p90_ms": percentile(90),
        "latency_p99_ms": percentile(99),
        "latency_to_anchor": statistics.median(rounds.ratios),
        "anchor_ms": statistics.median(itertools.chain(*anchor_ms)),
        "throughput_img_s": settings.batch_size * 1e3 / median,
        "memory_mb": peak_bytes / 1e6,
        "load_average": load_average,
        "is_noisy": float(bool(doubts)),
        "is_alone": float(context.resources.is_alone),
        **energy,
    }


def _anchor(device: str) -> Runnable:
    """The anchor network, the same whatever is measured beside it."""
    plain = Execution()
    return runnable(*on_device(catalog.resolve(ANCHORS[device]), plain, batch_size=1, device=device, seed=0), plain)


def _peak_bytes(network: nn.Module, images: Tensor) -> int:
    if images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(images.device)
        network(images)
        synchronize(images.device)
        return torch.cuda.max_memory_allocated(images.device)
    with _LiveStorages([*network.parameters(), *network.buffers(), images]) as live:
        network(images)
    return live.peak_bytes


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages alive after each operator, and their peak."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self._alive: set[int] = set()
        self._num_bytes = 0
        self.peak_bytes = 0
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # Views share a storage, and every access wraps it in a new object: the C++ one underneath is what counts.
        identity = storage._cdata
        if identity not in self._alive:
            self._alive.add(identity)
            self._num_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self._num_bytes)
            weakref.finalize(storage, self._remove, identity, storage.nbytes())

    def _remove(self, identity: int, num_bytes: int) -> None:
        self._alive.discard(identity)
        self._num_bytes -= num_bytes

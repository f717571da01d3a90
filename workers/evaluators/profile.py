"""Speed and size of a network where it runs: the one place that benchmark numbers come from.

Latency is the wall time of one forward pass of a batch, the device synchronised at both ends of every run: the median
over the runs, with the quartiles as its spread. Where the middle half of the runs spreads over more than `NOISY_SPREAD` of the
median, the measurement is noisy, and a warning says so. `memory_mb` is the peak of what the tensors of one forward
pass occupy, weights and input included, in 1e6 bytes: the allocator's own count on CUDA; on the CPU, where there is
none, the count of the storages that are alive after each operator, without the scratch space inside operators.

The artifact `profile.json` holds what the times were measured under (batch size, precision, threads, device) and the time of every run.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from results.records import Metric, write_json_atomically
from space.cost import cost
from space.model import Model, build_model
from workers.evaluator import ARTIFACTS, Context, evaluator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_RUNS = 30
NOISY_SPREAD = 0.1
"""Interquartile range relative to the median. An idle machine stays below; another program on the same cores does not."""
PROFILE = "profile.json"


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """What is run and how often; `num_warmup` runs come before the timed ones."""

    batch_size: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    num_runs: int = 50
    num_warmup: int = 10

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ValueError(f"precision is {self.precision!r}; allowed: {', '.join(DTYPES)}")
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
        Metric("throughput_img_s", "maximize", "images a second at the median latency"),
        Metric("memory_mb", "minimize", "peak memory of tensors in one forward pass, 1e6 bytes"),
    ),
    settings=ProfileSettings,
    is_deterministic=False,
    memory_mb=2000,
)
def profile(model: Model, context: Context, settings: ProfileSettings) -> Mapping[str, float]:
    """Latency, throughput and peak memory on the device at hand, with parameters and MACs."""
    counted = cost(model)
    device, dtype = torch.device(context.device), DTYPES[settings.precision]
    network = build_model(model, seed=context.seed).eval().to(device, dtype)
    size = (settings.batch_size, model.in_chans, model.img_size, model.img_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(context.seed)).to(device, dtype)
    with torch.inference_mode():
        peak_bytes = _peak_bytes(network, images)
        for _ in range(settings.num_warmup):
            network(images)
        latencies_ms = [_latency_ms(network, images) for _ in range(settings.num_runs)]
    lower, median, upper = statistics.quantiles(latencies_ms, n=4)
    is_noisy = upper - lower > NOISY_SPREAD * median
    if is_noisy:
        spread = f"{100 * NOISY_SPREAD:.0f} %"
        context.warn(f"latency_ms is noisy: the middle half of the runs spreads over more than {spread} of their median")
    circumstances = {
        "batch_size": settings.batch_size,
        "precision": settings.precision,
        "threads": torch.get_num_threads(),
        "device": context.device,
        "num_warmup": settings.num_warmup,
        "is_noisy": is_noisy,
    }
    write_json_atomically(context.workdir / ARTIFACTS / PROFILE, {**circumstances, "latencies_ms": latencies_ms})
    return {
        "params_m": counted.params / 1e6,
        "gmacs": counted.macs / 1e9,
        "latency_ms": median,
        "latency_iqr_ms": upper - lower,
        "latency_q1_ms": lower,
        "latency_q3_ms": upper,
        "throughput_img_s": settings.batch_size * 1e3 / median,
        "memory_mb": peak_bytes / 1e6,
    }


def _latency_ms(network: nn.Module, images: Tensor) -> float:
    _synchronize(images.device)
    started = time.perf_counter()
    network(images)
    _synchronize(images.device)
    return (time.perf_counter() - started) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(network: nn.Module, images: Tensor) -> int:
    if images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(images.device)
        network(images)
        _synchronize(images.device)
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

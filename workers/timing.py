"""How long a network takes for a batch: how it is executed, when it is warm, and what its runs say together.

Warm-up ends at *stationarity*: the medians of the last two windows of 5 runs each differ by at most 3 per cent of the later one. Where
that is not so within `MAX_WARMUP_S`, the timed runs begin all the same, and the measurement says that it was not stationary.

A run is timed by CUDA events on a GPU, by the wall clock on the CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from space.model import Model, build_model
from space.registry import SpecError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
EXECUTIONS = ("eager", "compile", "cuda_graph")

WINDOW = 5
STATIONARY = 0.03
MAX_WARMUP_S = 30.0
NUM_QUANTILES = 100


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a network is run: settings that evaluators which measure time share.

    `compile` is `torch.compile`, and `cuda_graph` the replay of a captured pass. `threads` are those of the CPU; 0 takes the trial's.
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    memory_format: Literal["contiguous", "channels_last"] = field(default="contiguous", metadata={"added_later": True})
    execution: Literal["eager", "compile", "cuda_graph"] = field(default="eager", metadata={"added_later": True})
    threads: int = field(default=0, metadata={"added_later": True})

    def __post_init__(self) -> None:
        for name, allowed in (("precision", DTYPES), ("memory_format", MEMORY_FORMATS), ("execution", EXECUTIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if type(self.threads) is not int or self.threads < 0:
            raise ValueError(f"threads is {self.threads!r}; allowed: whole numbers from 0, which takes those of the trial")

    def check_device(self, device: str) -> None:
        """Raise SpecError for an execution that the device does not know."""
        if self.execution == "cuda_graph" and device != "cuda":
            raise SpecError(f"execution is 'cuda_graph', and the device is {device!r}; allowed there: eager, compile")


@dataclass(frozen=True)
class Runnable:
    """A network on its device, ready to run on one batch: images `(B, C, H, W)`."""

    network: nn.Module
    images: Tensor
    run: Callable[[], Any]

    @property
    def device(self) -> torch.device:
        return self.images.device


def on_device(model: Model, execution: Execution, *, batch_size: int, device: str, seed: int) -> tuple[nn.Module, Tensor]:
    """The network in evaluation mode and a batch of noise for it, in the precision and the memory format of the execution."""
    dtype, memory_format = DTYPES[execution.precision], MEMORY_FORMATS[execution.memory_format]
    network = build_model(model, seed=seed).eval().to(device, dtype).to(memory_format=memory_format)
    return network, noise(model, execution, batch_size=batch_size, device=device, seed=seed)


def noise(model: Model, execution: Execution, *, batch_size: int, device: str, seed: int) -> Tensor:
    """A batch of noise for the model, `(B, C, H, W)`."""
    size = (batch_size, model.in_chans, model.img_size, model.img_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return images.to(device, DTYPES[execution.precision]).contiguous(memory_format=MEMORY_FORMATS[execution.memory_format])


def runnable(network: nn.Module, images: Tensor, execution: Execution) -> Runnable:
    """The network as it is executed, after its first pass: compiling and capturing are over. Call it in inference mode."""
    if execution.execution == "cuda_graph":
        return Runnable(network, images, _captured(network, images))
    called = network
    if execution.execution == "compile":
        # What other networks left in this process counts towards the limit of recompilations, after which all runs eagerly.
        torch.compiler.reset()
        called = torch.compile(network, dynamic=False)
    called(images)
    return Runnable(network, images, lambda: called(images))


def _captured(network: nn.Module, images: Tensor) -> Callable[[], None]:
    # PyTorch asks for some passes on another stream before a capture: libraries choose their kernels in them.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            network(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network(images)
    return graph.replay


@contextmanager
def cpu_threads(threads: int) -> Iterator[int]:
    """Within it PyTorch computes with so many CPU threads, 0 leaving them as they are; gives their number."""
    before = torch.get_num_threads()
    try:
        if threads:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Run:
    """One run: its latency, and the time by which it is compared with another network's."""

    latency_ms: float
    compared_ms: float


def timed_run(runnable: Runnable) -> Run:
    """Time one run, the device idle at its beginning and done at its end.

    A run by one thread of the CPU is compared by the CPU time of that thread, which does not grow while other programs have the core.
    """
    synchronize(runnable.device)
    if runnable.device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        runnable.run()
        end.record()
        end.synchronize()
        latency_ms = start.elapsed_time(end)
        return Run(latency_ms, latency_ms)
    started, busy = time.perf_counter(), time.thread_time()
    runnable.run()
    busy_ms, latency_ms = (time.thread_time() - busy) * 1e3, (time.perf_counter() - started) * 1e3
    return Run(latency_ms, busy_ms if torch.get_num_threads() == 1 else latency_ms)


def latency_ms(runnable: Runnable) -> float:
    return timed_run(runnable).latency_ms


def is_stationary(latencies_ms: Sequence[float]) -> bool:
    """Whether the medians of the last two windows of runs differ by at most 3 per cent of the later; False for fewer runs than that."""
    if len(latencies_ms) < 2 * WINDOW:
        return False
    before, last = statistics.median(latencies_ms[-2 * WINDOW : -WINDOW]), statistics.median(latencies_ms[-WINDOW:])
    return abs(last - before) <= STATIONARY * last


def warm_up(timed_run: Callable[[], float], *, least: int, clock: Callable[[], float] = time.monotonic) -> tuple[int, bool]:
    """Run until the times of `timed_run`, in ms, are stationary, at least so often, and give up at `MAX_WARMUP_S`.

    Returns the number of runs, and whether they became stationary.
    """
    started = clock()
    latencies_ms: list[float] = []
    while True:
        latencies_ms.append(timed_run())
        if len(latencies_ms) >= least:
            if is_stationary(latencies_ms):
                return len(latencies_ms), True
            if clock() - started > MAX_WARMUP_S:
                return len(latencies_ms), False


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The runs of two networks that ran in turns, those of each round together."""

    own: tuple[tuple[Run, ...], ...]
    anchor: tuple[tuple[Run, ...], ...]

    @property
    def ratios(self) -> list[float]:
        """The network's median over the anchor's, of each round: what slows both down for longer than a round cancels."""
        return [_compared(own) / _compared(anchor) for own, anchor in zip(self.own, self.anchor, strict=True)]


def _compared(runs: Sequence[Run]) -> float:
    return statistics.median(run.compared_ms for run in runs)


def in_turns(own: Callable[[], Run], anchor: Callable[[], Run], *, num_runs: int, num_rounds: int, num_anchor_runs: int) -> Rounds:
    """Time two networks in alternation: in each round a share of `num_runs` of the one, then of `num_anchor_runs` of the other.

    The first run of each after the other is not counted: it meets the other's caches.
    """
    rounds: list[tuple[tuple[Run, ...], tuple[Run, ...]]] = []
    for number in range(num_rounds):
        timed = []
        for run, total in ((own, num_runs), (anchor, num_anchor_runs)):
            run()
            share = total * (number + 1) // num_rounds - total * number // num_rounds
            timed.append(tuple(run() for _ in range(share)))
        rounds.append((timed[0], timed[1]))
    return Rounds(own=tuple(own for own, _ in rounds), anchor=tuple(anchor for _, anchor in rounds))


def percentiles(latencies_ms: Sequence[float]) -> Callable[[int], float]:
    """The percentiles of the times, linear between them: `percentiles(times)(90)`."""
    cuts = statistics.quantiles(latencies_ms, n=NUM_QUANTILES, method="inclusive")
    return lambda percent: cuts[percent - 1]

"""Images a second at the batch size that is best for them.

Batch sizes double from 1. The search ends when two doublings in a row have not raised the best throughput by 3 per cent, at
`max_batch_size`, or when memory ends: that batch is then the answer to how much fits, and no failure. The best batch is then timed again,
30 runs, after a warm-up as in `workers.timing`.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from results.records import Metric, write_json_atomically
from space.model import Model
from workers.evaluator import ARTIFACTS, Context, evaluator, failure_kind
from workers.timing import Execution, cpu_threads, latency_ms, noise, on_device, runnable, warm_up

THROUGHPUT = "throughput.json"
LEAST_GAIN = 1.03
PATIENCE = 2
SEARCH_RUNS = 5
FINAL_RUNS = 30


@dataclass(frozen=True, kw_only=True)
class ThroughputSettings(Execution):
    """How the network is run, and the largest batch that is tried."""

    max_batch_size: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.max_batch_size) is not int or self.max_batch_size < 1:
            raise ValueError(f"max_batch_size is {self.max_batch_size!r}; allowed: whole numbers from 1")


@dataclass(frozen=True, kw_only=True)
class BatchSearch:
    """The throughput in images a second by batch size, and the batch size that memory was too small for, 0 if there was none."""

    throughputs: Mapping[int, float]
    too_large: int = 0

    @property
    def best(self) -> int:
        return max(self.throughputs, key=lambda batch_size: self.throughputs[batch_size])


def best_batch(throughput: Callable[[int], float], at_most: int) -> BatchSearch:
    """Search the batch size with the highest throughput; raises what a batch of one raises when memory is too small for it."""
    found: dict[int, float] = {}
    best, num_vain, batch_size = 0.0, 0, 1
    while batch_size <= at_most and num_vain < PATIENCE:
        try:
            found[batch_size] = throughput(batch_size)
        except Exception as error:
            if not found or failure_kind(error) != "out_of_memory":
                raise
            return BatchSearch(throughputs=found, too_large=batch_size)
        num_vain = 0 if found[batch_size] >= LEAST_GAIN * best else num_vain + 1
        best, batch_size = max(best, found[batch_size]), 2 * batch_size
    return BatchSearch(throughputs=found)


@evaluator(
    "throughput",
    metrics=(
        Metric("best_throughput_img_s", "maximize", "images a second at the best batch size"),
        Metric("best_batch_size", "maximize", "the batch size with the most images a second"),
    ),
    settings=ThroughputSettings,
    is_deterministic=False,
    measures_time=True,
    memory_mb=4000,
)
def throughput(model: Model, context: Context, settings: ThroughputSettings) -> Mapping[str, float]:
    """Images a second at the best batch size, found by doubling until throughput or memory ends."""
    settings.check_device(context.device)
    with torch.inference_mode(), cpu_threads(settings.threads):
        network, _ = on_device(model, settings, batch_size=1, device=context.device, seed=context.seed)

        def img_s(batch_size: int, *, num_runs: int = SEARCH_RUNS) -> float:
            if context.device == "cuda":
                # What the last batch size cached is of another shape, and would end memory early.
                gc.collect()
                torch.cuda.empty_cache()
            images = noise(model, settings, batch_size=batch_size, device=context.device, seed=context.seed)
            timed = partial(latency_ms, runnable(network, images, settings))
            if num_runs == FINAL_RUNS:
                warm_up(timed, least=1)
            return batch_size * 1e3 / statistics.median(timed() for _ in range(num_runs))

        search = best_batch(img_s, settings.max_batch_size)
        best_img_s = img_s(search.best, num_runs=FINAL_RUNS)
    found = {"throughput_img_s": {str(size): value for size, value in search.throughputs.items()}}
    out_of_memory = {"out_of_memory_at": search.too_large} if search.too_large else {}
    write_json_atomically(context.workdir / ARTIFACTS / THROUGHPUT, {**found, **out_of_memory})
    return {"best_throughput_img_s": best_img_s, "best_batch_size": float(search.best)}

"""Specs per second: parameters and MACs of random points as a search gets them, decoded and counted, on one core.

    python tests/benchmarks/bench_cost.py [NUM_SPECS]

Rates are per second of processor time, and a point of as_vit/growth is two specs. `cold` is the first spec of a process.
"""

from __future__ import annotations

import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from space import catalog
from space.cost import cost
from space.search_space import SearchSpace

NUM_SPECS = 10_000
COLD = """
import time
begun = time.perf_counter()
from space.catalog import resolve
from space.cost import cost
spec = resolve({name!r})
counted = cost(spec)
print(f"{{(time.perf_counter() - begun) * 1e3:.1f}} ms with imports, torch's among them;", end=" ")
begun = time.perf_counter()
cost(resolve({name!r}))
print(f"{{(time.perf_counter() - begun) * 1e6:.0f}} us the second time")
"""


class RandomTrial:
    """The two calls of a trial that a space makes, answered uniformly at random."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def suggest_categorical(self, name: str, choices):
        return self._random.choice(choices)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1) -> int:
        return self._random.randrange(low, high + 1, step)


def points_per_second(space: SearchSpace, num_specs: int, count: Callable) -> float:
    trial = RandomTrial(seed=0)
    points = [space.suggest(trial) for _ in range(num_specs)]
    begun = time.process_time()
    for params in points:
        count(space.decode(params))
    return num_specs / (time.process_time() - begun)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    num_specs = int(sys.argv[1]) if len(sys.argv) > 1 else NUM_SPECS
    print(f"{processor()}; Python {platform.python_version()}, torch {torch.__version__}; one core, {num_specs} random points")
    for make in catalog.spaces().values():
        space = make(img_size=224, num_classes=1000)
        decoded = points_per_second(space, num_specs, lambda candidate: cost(candidate.model))
        named = points_per_second(space, num_specs // 10, lambda candidate: candidate.model.digest)
        print(f"{space.name:16} {decoded:8,.0f} points/s decoded and counted, {named:8,.0f} points/s decoded and named by digest")
    for name in ("deit_small", "as_vit_large"):
        done = subprocess.run([sys.executable, "-c", COLD.format(name=name)], capture_output=True, text=True, check=True)
        print(f"cold {name:12} {done.stdout.strip()}")


if __name__ == "__main__":
    main()

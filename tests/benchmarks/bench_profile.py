"""How well two measurements of one network agree on a machine that is shared: in milliseconds, and as a ratio to the anchor network.

    python tests/benchmarks/bench_profile.py [--model deit_small] [--repeats 6]

Each network is profiled several times as the machine is, and several times while 1 or 2 processes per core multiply matrices
beside it.
Agreement is the largest measurement over the smallest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from machine import machine

from space import catalog
from workers.evaluator import Context
from workers.evaluators.profile import ProfileSettings, profile

LOAD = "import torch; torch.set_num_threads(1); a = torch.randn(600, 600)\nwhile True: a @ a"


@contextmanager
def loaded(num_processes: int) -> Iterator[None]:
    """So many busy processes beside this one."""
    processes = [subprocess.Popen([sys.executable, "-c", LOAD]) for _ in range(num_processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="repeatable; default: vit_digits, deit_tiny, deit_small")
    parser.add_argument("--repeats", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    print(f"{'network':12} {'load':28} {'latency_ms':>16} {'agreement':>10} {'to anchor':>18} {'agreement':>10} {'noisy':>6}")
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        context = Context(seed=0, workdir=Path(folder))
        for name in arguments.model or ["vit_digits", "deit_tiny", "deit_small"]:
            both: dict[str, list[float]] = {"latency_ms": [], "latency_to_anchor": []}
            for title, loads in (("as the machine is", [0]), ("1 or 2 processes per core", [cores, 2 * cores])):
                runs = []
                for repeat in range(arguments.repeats):
                    with loaded(loads[repeat % len(loads)]):
                        runs.append(profile(catalog.resolve(name), context, ProfileSettings(num_runs=30)))
                for metric, values in both.items():
                    values += [run[metric] for run in runs]
                print(line(name, title, [run["latency_ms"] for run in runs], [run["latency_to_anchor"] for run in runs], runs), flush=True)
            print(line(name, "all of them", both["latency_ms"], both["latency_to_anchor"], []), flush=True)


def line(name: str, title: str, latencies_ms: list[float], ratios: list[float], runs: list) -> str:
    cells = []
    for values, digits in ((latencies_ms, 1), (ratios, 3)):
        low, high = min(values), max(values)
        cells.append(f"{f'{low:.{digits}f} to {high:.{digits}f}':>{16 if digits == 1 else 18}} {high / low:9.2f}x")
    noisy = f"{sum(run['is_noisy'] for run in runs):.0f}/{len(runs)}" if runs else ""
    return f"{name:12} {title:28} {cells[0]} {cells[1]} {noisy:>6}"


if __name__ == "__main__":
    main()

"""How busy the cores are over a whole run of the main job, and where the rest of the time goes.

    python tests/benchmarks/bench_utilisation.py [flags of search/run.py as_vit]

Reads the CPU time of every process of the run twice a second; a phase of the run is what its output says it is at.
The limit is the number of cores times the wall time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from machine import machine

REPOSITORY = Path(__file__).resolve().parents[2]
FLAGS = ["--trials", "60", "--img-size", "224", "--proxy-img-size", "64", "--max-params-m", "12"]
INTERVAL_S = 0.5
ROLES = ("scoring workers", "driver", "Ray itself")


def role(process: psutil.Process, driver: int) -> str:
    if process.pid == driver:
        return "driver"
    return "scoring workers" if any(word.startswith("ray::") for word in process.cmdline()) else "Ray itself"


def cpu_seconds(driver: int) -> dict[tuple[int, str], float]:
    """CPU seconds so far of every living process of the run, by process and role."""
    found = {}
    root = psutil.Process(driver)
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
            found[process.pid, role(process, driver)] = times.user + times.system
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def part_of_run(output: str) -> str:
    if "best of" in output or "on the Pareto front" in output:
        return "leaderboard"
    for part in ("growth", "topology"):
        lines = [line for line in output.splitlines() if line.startswith(f"as_vit/{part}")]
        if lines:
            return part if " 0 done" not in lines[-1] and " 0/" not in lines[-1] else f"start of {part}"
    return "start"


def main() -> None:
    print(machine())
    num_cores = len(os.sched_getaffinity(0))
    spent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    wall: dict[str, float] = defaultdict(float)
    with TemporaryDirectory() as folder, open(Path(folder) / "output", "w+") as output:
        command = [sys.executable, str(REPOSITORY / "search" / "run.py"), "as_vit", *(sys.argv[1:] or FLAGS)]
        run = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        before, last = {}, time.perf_counter()
        while run.poll() is None:
            time.sleep(INTERVAL_S)
            part = part_of_run((Path(folder) / "output").read_text())
            try:
                after = cpu_seconds(run.pid)
            except psutil.NoSuchProcess:
                break
            now = time.perf_counter()
            wall[part] += now - last
            for key, seconds in after.items():
                spent[part][key[1]] += seconds - before.get(key, 0.0)
            before, last = after, now
        assert run.wait() == 0, (Path(folder) / "output").read_text()
    print(f"{'part of the run':20} {'wall s':>8} {'busy %':>8}  " + "  ".join(f"{name + ' CPU-s':>22}" for name in ROLES))
    parts = [*wall, "whole run"]
    wall["whole run"] = sum(wall.values())
    for part in parts[:-1]:
        for name in ROLES:
            spent["whole run"][name] += spent[part][name]
    for part in parts:
        busy = 100 * sum(spent[part].values()) / (num_cores * wall[part])
        print(f"{part:20} {wall[part]:8.1f} {busy:8.0f}  " + "  ".join(f"{spent[part][name]:22.1f}" for name in ROLES))


if __name__ == "__main__":
    main()

"""What a benchmark prints first: the machine and the versions its numbers belong to."""

import os
import sys
from pathlib import Path

import torch

from workers.evaluate import device_name, software_versions


def machine() -> str:
    """One line: processor, cores this process may use, torch's threads, accelerator, versions."""
    versions = ", ".join(f"{name} {version}" for name, version in software_versions().items())
    accelerator = f", {device_name('cuda')}" if torch.cuda.is_available() else ""
    cores = len(os.sched_getaffinity(0))
    return f"{device_name('cpu')}, {cores} cores, {torch.get_num_threads()} torch threads{accelerator}; {sys.platform}, {versions}"


def memory_mb(which: str) -> float:
    """MiB resident in this process now (`VmRSS`) or at most so far (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(which))

"""What a benchmark prints first: the machine and the versions its numbers belong to."""

import os
import sys

import torch

from workers.evaluate import device_name, software_versions


def machine() -> str:
    """One line: processor, cores this process may use, torch's threads, accelerator, versions."""
    versions = ", ".join(f"{name} {version}" for name, version in software_versions().items())
    accelerator = f", {device_name('cuda')}" if torch.cuda.is_available() else ""
    cores = len(os.sched_getaffinity(0))
    return f"{device_name('cpu')}, {cores} cores, {torch.get_num_threads()} torch threads{accelerator}; {sys.platform}, {versions}"

"""What a device was doing while it was timed: load of the machine, and clocks, throttling, power and energy of a GPU.

The GPU answers through NVML, by NVIDIA's `nvidia-ml-py`. Where that, the driver or a single counter is missing, what it would say is
missing too, and nothing fails.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

CLOCK_SPREAD = 0.1
"""Share of the highest clock by which the clock may fall between rounds before the times are not to be trusted."""

POWER_CAP = "SwPowerCap"
SLOWDOWNS = ("HwSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown", "SwThermalSlowdown", POWER_CAP)
"""Reasons, as NVML names them, for which a GPU runs below the clock that it was asked for."""

ENERGY_S = 1.0
"""Over which energy is counted: NVML's counter moves only some ten times a second."""


def is_overloaded(load_average: float) -> bool:
    """Whether programs waited for a core: the load average of the last minute, this process in it, exceeds the cores by a half."""
    return load_average > (os.cpu_count() or 1) + 0.5


def static_state(device: str) -> dict[str, Any]:
    """What does not change while a network is timed: versions of CUDA and of the driver."""
    if device != "cuda":
        return {}
    found: dict[str, Any] = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    if (gpu := Gpu.current()) is not None:
        found["driver"] = gpu.ask("nvmlSystemGetDriverVersion", of_device=False)
    return {name: value for name, value in found.items() if value is not None}


@dataclass
class Gpu:
    """A GPU as NVML sees it; every answer is None where the device or the driver does not know it."""

    nvml: Any
    handle: Any
    clocks_mhz: list[int] = field(default_factory=list)
    slowdowns: set[str] = field(default_factory=set)

    @classmethod
    def current(cls) -> Gpu | None:
        """PyTorch's current device; None without NVML."""
        try:
            import pynvml
        except ModuleNotFoundError:
            return None
        try:
            pynvml.nvmlInit()
            # Not by its index, which CUDA_VISIBLE_DEVICES shifts.
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except pynvml.NVMLError:
            return None

    def ask(self, function: str, *arguments: Any, of_device: bool = True) -> Any:
        """The answer of a function of NVML."""
        try:
            return getattr(self.nvml, function)(*((self.handle,) if of_device else ()), *arguments)
        except self.nvml.NVMLError:
            return None

    def look(self) -> None:
        """Note the clock, and why it is lower than asked for, at this moment."""
        clock = self.ask("nvmlDeviceGetClockInfo", self.nvml.NVML_CLOCK_SM)
        reasons = self.ask("nvmlDeviceGetCurrentClocksEventReasons") or 0
        self.clocks_mhz += [] if clock is None else [clock]
        self.slowdowns |= {name for name in SLOWDOWNS if reasons & getattr(self.nvml, f"nvmlClocksEventReason{name}")}

    def doubts(self) -> list[str]:
        """Why the clock casts doubt on what was timed since the first look.

        A power cap alone casts none: a GPU at full load runs at it, and its clock tells whether it is steady.
        """
        slowed = sorted(self.slowdowns - {POWER_CAP})
        doubts = [f"the GPU slowed down ({', '.join(slowed)})"] if slowed else []
        if self.clocks_mhz and min(self.clocks_mhz) < (1 - CLOCK_SPREAD) * max(self.clocks_mhz):
            doubts.append(f"the clock of the GPU changed by more than {CLOCK_SPREAD:.0%}")
        return doubts

    def state(self) -> dict[str, Any]:
        """What was seen, and the limits that were set."""
        found = {
            "clocks_mhz": self.clocks_mhz or None,
            "max_clock_mhz": self.ask("nvmlDeviceGetMaxClockInfo", self.nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": self.ask("nvmlDeviceGetClockInfo", self.nvml.NVML_CLOCK_MEM),
            "slowdowns": sorted(self.slowdowns),
            "temperature_c": self.ask("nvmlDeviceGetTemperature", self.nvml.NVML_TEMPERATURE_GPU),
            "power_limit_w": _thousandth(self.ask("nvmlDeviceGetEnforcedPowerLimit")),
        }
        return {name: value for name, value in found.items() if value is not None}

    def energy(self, run: Callable[[], Any], images: int) -> dict[str, float]:
        """Mean power in W while `run` is repeated, and energy in mJ for each of its `images`; empty where no energy is counted."""
        if self.ask("nvmlDeviceGetTotalEnergyConsumption") is None:
            return {}
        torch.cuda.synchronize()
        started, before, num_runs = time.perf_counter(), self.ask("nvmlDeviceGetTotalEnergyConsumption"), 0
        while time.perf_counter() - started < ENERGY_S:
            run()
            torch.cuda.synchronize()
            num_runs += 1
        joules = (self.ask("nvmlDeviceGetTotalEnergyConsumption") - before) / 1e3
        return {"power_w": joules / (time.perf_counter() - started), "energy_mj_img": 1e3 * joules / (num_runs * images)}


def _thousandth(value: int | None) -> float | None:
    return None if value is None else value / 1e3

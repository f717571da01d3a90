"""One job from start to outcome: set threads, run the evaluators, catch what goes wrong.

Needs neither Ray nor Optuna nor MLflow, so it runs as it is on a bare GPU machine.
"""

from __future__ import annotations

import math
import os
import platform
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path

from results.records import Failure, FailureKind, Measurement, Outcome
from space.registry import SpecError
from space.search_space import Candidate
from space.spec import digest_of
from workers.evaluator import Call, Context, EvaluationError, Report, report_nothing

POISONED_DEVICE = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")
"""Words of the CUDA errors after which a process can no longer use its device."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is sent: a candidate, how it is measured, and where its files go.

    `data_fingerprint` stands for the contents behind `data` in the measurement's identity. `time_limit_s` is enforced
    by the pool, which can end a worker that hangs in native code.
    """

    trial: int
    candidate: Candidate
    calls: tuple[Call, ...]
    seed: int
    data: str
    data_fingerprint: str
    workdir: Path
    num_threads: int = 1
    gpus: float = 0.0
    time_limit_s: float | None = None

    @cached_property
    def key(self) -> str:
        """The identity of the measurement: equal keys would give equal values."""
        subjects = [(call.evaluator.name, call.digest, subject_of(call, self.candidate).digest) for call in self.calls]
        data = self.data_fingerprint if any(call.evaluator.uses_data for call in self.calls) else ""
        return digest_of([self.candidate.model.digest, subjects, data, self.seed, self.num_threads, self.gpus > 0])


def subject_of(call: Call, candidate: Candidate):
    """The network of the candidate that the evaluator looks at."""
    return candidate.scored if call.evaluator.subject == "proxy" else candidate.model


def evaluate(job: Job, report: Report = report_nothing) -> Outcome:
    """Run the job's evaluators in order and return their metrics, or the reason there are none."""
    started = time.perf_counter()
    device = "cuda" if job.gpus > 0 else "cpu"
    warnings: list[str] = []
    context = Context(seed=job.seed, data=job.data, device=device, workdir=job.workdir, report=report, warn=warnings.append)
    values: dict[str, float] = {}
    try:
        if not all(call.evaluator.is_free for call in job.calls):
            _set_num_threads(job.num_threads)
        for call in job.calls:
            measured = call.evaluator.function(subject_of(call, job.candidate), context, call.settings)
            _check(call, measured)
            values |= {name: float(value) for name, value in measured.items()}
    except Exception as error:
        return Failure(
            kind=_failure_kind(error),
            message=f"{type(error).__name__}: {error}".split("\n")[0][:500],
            traceback=traceback.format_exc(),
            elapsed_s=time.perf_counter() - started,
        )
    return Measurement(
        values=values,
        elapsed_s=time.perf_counter() - started,
        device=device_name(device),
        versions=software_versions(),
        seed=job.seed,
        num_threads=job.num_threads,
        warnings=tuple(warnings),
    )


def poisons_device(outcome: Outcome) -> bool:
    """Whether the process that met this failure can no longer use its device and must be replaced."""
    return isinstance(outcome, Failure) and any(words in outcome.message for words in POISONED_DEVICE)


@lru_cache(maxsize=2)
def device_name(device: str) -> str:
    """The name of the accelerator, or of the processor for "cpu"."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def software_versions() -> dict[str, str]:
    """The versions that decide a number's last bits."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "timm")}}


def _set_num_threads(num_threads: int) -> None:
    # A reused worker keeps the setting of its last job, and the number of threads decides the last bits of a sum.
    import torch

    torch.set_num_threads(num_threads)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)


def _check(call: Call, measured: Mapping[str, float]) -> None:
    missing = {metric.name for metric in call.evaluator.metrics} - measured.keys()
    if missing:
        raise EvaluationError("error", f"evaluator {call.name!r} did not measure {', '.join(sorted(missing))}")
    for name, value in measured.items():
        if not math.isfinite(value):
            raise EvaluationError("non_finite", f"{name} is {value}")


def _failure_kind(error: Exception) -> FailureKind:
    if isinstance(error, EvaluationError):
        return error.kind
    if isinstance(error, SpecError):
        return "illegal"
    # torch raises a bare RuntimeError when the host allocator fails, torch.OutOfMemoryError when the device's does.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return "out_of_memory"
    return "error"

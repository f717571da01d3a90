"""One job from start to outcome: set threads, run the evaluators, catch what goes wrong.

Needs neither Ray nor Optuna nor MLflow, so it runs as it is on a bare GPU machine.
"""

from __future__ import annotations

import math
import platform
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from results.records import Failure, Measurement, Outcome
from space.model import Model
from space.search_space import Candidate
from space.spec import digest_of
from workers.data import DataSet, load_dataset
from workers.distributed import in_one_task, set_num_threads
from workers.evaluator import Call, Context, EarlierTrial, EvaluationError, Report, evaluators, failure_kind, report_nothing
from workers.resources import Resources

POISONED_DEVICE = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")
"""Words of the CUDA errors after which a process can no longer use its device."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is sent: a candidate, how it is measured, and where its files go.

    `data_fingerprint` stands for the contents behind `data` in the measurement's identity; `data_cache` is the folder of the hashes it was
    made from. `earlier` holds trials of earlier phases, best first. `continues` is the work directory of an earlier trial of the same
    training, which this one may go on from; it saves time and changes no number. `time_limit_s` is enforced by the pool, which can end a
    worker that hangs in native code.
    """

    trial: int
    candidate: Candidate
    calls: tuple[Call, ...]
    seed: int
    data: str
    data_fingerprint: str
    workdir: Path
    earlier: Mapping[str, tuple[EarlierTrial, ...]] = field(default_factory=dict)
    continues: Path | None = None
    data_cache: Path | None = None
    num_threads: int = 1
    resources: Resources = field(default_factory=Resources)
    time_limit_s: float | None = None

    @property
    def needs_dataset(self) -> bool:
        return any(call.evaluator.needs_dataset for call in self.calls)

    @cached_property
    def key(self) -> str:
        """The identity of the measurement: equal keys would give equal values."""
        subjects = [(evaluators.stored_name(call.name), call.digest, subject_of(call, self.candidate).digest) for call in self.calls]
        data = self.data_fingerprint if any(call.evaluator.uses_data for call in self.calls) else ""
        identity: list[Any] = [self.candidate.model.digest, subjects, data, self.seed, self.num_threads, self.resources.gpus > 0]
        if (recipe := self.candidate.recipe) is not None:
            identity.append(recipe.digest)
            if recipe.ema_decay:
                # Moving averages without a warm-up were measured under the shorter key.
                identity.append({"ema": "warm-up"})
            if recipe.mixing == "mixpro" and recipe.label_smoothing:
                # Its labels were hard once, whatever the recipe's smoothing.
                identity.append({"mixpro": "smoothed"})
        if (weights := self.candidate.weights) is not None:
            identity.append({"weights": weights.identity})
        if self.resources.processes > 1:
            identity.append({"processes": self.resources.processes})
        if self.resources.accelerator_type:
            identity.append({"accelerator_type": self.resources.accelerator_type})
        if self.earlier:
            identity.append({phase: _key_of_all(trials) for phase, trials in sorted(self.earlier.items())})
        return digest_of(identity)

    @cached_property
    def stop(self) -> Stop | None:
        """Where in its training this job stops; None if none of its evaluators can stop and be continued."""
        for index, call in enumerate(self.calls):
            if name := call.evaluator.continued_by:
                at = getattr(call.settings, name)
                whole = call.changed({name: type(at)()})
                same = replace(self, calls=(*self.calls[:index], whole, *self.calls[index + 1 :]))
                return Stop(training=same.key, at=at or math.inf)
        return None


@dataclass(frozen=True)
class Stop:
    """A training, named by the key of its full length, and the point at which this trial of it stops; infinity is the end."""

    training: str
    at: float


def _key_of_all(trials: tuple[EarlierTrial, ...]) -> Any:
    return trials[0].key if len(trials) == 1 else [trial.key for trial in trials]


def subject_of(call: Call, candidate: Candidate):
    """The network of the candidate that the evaluator looks at."""
    return candidate.scored if call.evaluator.subject == "proxy" else candidate.model


def import_for(job: Job) -> None:
    """Import what the job's evaluators are made of, as far as that is known before they run."""
    if not all(call.evaluator.is_free for call in job.calls):
        import torch  # noqa: F401


def evaluate(
    job: Job,
    report: Report = report_nothing,
    dataset: DataSet | None = None,
    around: Callable[[Call], AbstractContextManager[object]] = nullcontext,
) -> Outcome:
    """Run the job's evaluators in order and return their metrics, or the reason there are none.

    `dataset` is the job's, where the caller has it already; else it is loaded if an evaluator needs it. Each evaluator runs inside the
    context that `around` makes of its call.
    """
    started = time.perf_counter()
    device = job.resources.device
    warnings: list[str] = []
    values: dict[str, float] = {}
    try:
        for call in job.calls:
            call.check(subject_of(call, job.candidate), job.candidate.recipe, job.candidate.weights)
        if not all(call.evaluator.is_free for call in job.calls):
            set_num_threads(job.num_threads)
        if dataset is None and job.needs_dataset:
            dataset = load_dataset(job.data, img_size=job.candidate.model.img_size, cache=job.data_cache)
        context = Context(
            seed=job.seed,
            data=job.data,
            dataset=dataset,
            recipe=job.candidate.recipe,
            weights=job.candidate.weights,
            earlier=job.earlier,
            continues=job.continues,
            device=device,
            resources=job.resources,
            workdir=job.workdir,
            report=report,
            warn=warnings.append,
        )
        for call in job.calls:
            with around(call):
                measured = _measure(call, subject_of(call, job.candidate), context)
            _check(call, measured, values)
            values |= {name: float(value) for name, value in measured.items()}
    except Exception as error:
        return Failure(
            kind=failure_kind(error),
            message=f"{type(error).__name__}: {error}".split("\n")[0][:500],
            traceback=traceback.format_exc(),
            elapsed_s=time.perf_counter() - started,
        )
    return Measurement(
        values=values,
        elapsed_s=time.perf_counter() - started,
        device=device_name(device) if job.resources.processes == 1 else f"{job.resources.processes} x {device}",
        versions=software_versions(),
        seed=job.seed,
        num_threads=job.num_threads,
        warnings=tuple(warnings),
    )


def _measure(call: Call, model: Model, context: Context) -> Mapping[str, float]:
    if context.processes == 1 or call.evaluator.is_free or call.evaluator.uses_processes:
        return call.evaluator.function(model, context, call.settings)
    # This process only coordinates: it has no core and no device of its own.
    alone = replace(context.resources, processes=1)
    done = in_one_task(partial(_measure_alone, call, model, replace(context, resources=alone, warn=Context.warn)), alone)
    for warning in done["warnings"]:
        context.warn(warning)
    return done["measured"]


def _measure_alone(call: Call, model: Model, context: Context) -> dict[str, Any]:
    warnings: list[str] = []
    measured = call.evaluator.function(model, replace(context, warn=warnings.append), call.settings)
    return {"measured": dict(measured), "warnings": warnings}


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


def _check(call: Call, measured: Mapping[str, float], before: Mapping[str, float]) -> None:
    missing = {metric.name for metric in call.evaluator.metrics} - measured.keys()
    if missing:
        raise EvaluationError("error", f"evaluator {call.name!r} did not measure {', '.join(sorted(missing))}")
    for name, value in measured.items():
        if not math.isfinite(value):
            raise EvaluationError("non_finite", f"{name} is {value}")
        if before.get(name, value) != value:
            raise EvaluationError("error", f"evaluator {call.name!r} measured {name} {value}; an earlier evaluator measured {before[name]}")

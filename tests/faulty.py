"""An evaluator that misbehaves as told, and a study of it; registered where this module is imported.

Its settings are defined here, so a Ray worker that unpickles them imports this module and knows the evaluator too.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from results.records import Metric
from search.study import Phase, RunSettings, Study, study
from space.search_space import Axis, Candidate, SearchSpace
from space.spec import ArchSpec, BlockSpec, Component, StageSpec
from workers.evaluator import Context, evaluator

Behaviour = Literal["work", "raise", "nan", "exhaust", "hang", "die_once", "die_always", "poison_device"]


@dataclass(frozen=True)
class FaultySettings:
    """Misbehaves for every model whose number of classes is a multiple of `every`; logs each start and end to `log`.

    The work takes `work_s` seconds, and does not end before the file `until` is there.
    """

    behaviour: Behaviour = "work"
    every: int = 1
    work_s: float = 0.0
    until: str = ""
    log: str = ""


@evaluator("faulty", metrics=(Metric("score", "maximize"),), settings=FaultySettings, memory_mb=50)
def faulty(model: ArchSpec, context: Context, settings: FaultySettings) -> Mapping[str, float]:
    """Scores the number of classes, unless told to misbehave."""
    note(settings, "start", context)
    context.report("warming_up", 1.0, 0)
    time.sleep(settings.work_s)
    while settings.until and not os.path.exists(settings.until):
        time.sleep(0.02)
    if model.num_classes % settings.every == 0:
        misbehave(settings.behaviour, context)
    note(settings, "end", context)
    return {"score": float("nan") if settings.behaviour == "nan" and model.num_classes % settings.every == 0 else model.num_classes}


def misbehave(behaviour: Behaviour, context: Context) -> None:
    context.workdir.mkdir(parents=True, exist_ok=True)
    marker = context.workdir / "died"
    if behaviour == "raise":
        raise ValueError("this model cannot be measured")
    if behaviour == "hang":
        time.sleep(3600)
    if behaviour == "poison_device":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if behaviour == "exhaust":
        exhaust_memory()
    if behaviour == "die_always" or (behaviour == "die_once" and not marker.exists()):
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def exhaust_memory() -> None:
    import torch

    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (2**30, before[1]))
    try:
        torch.ones(2**32)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def note(settings: FaultySettings, event: str, context: Context) -> None:
    if settings.log:
        # One write to a file opened for appending is whole, also from several processes.
        with open(settings.log, "a") as log:
            log.write(f"{event} {context.workdir.name} {os.getpid()}\n")


def classifier(num_classes: int) -> ArchSpec:
    """The cheapest network there is, of so many classes."""
    block = BlockSpec(mixer=Component("attention", num_heads=2, head_dim=4), feed_forward=Component("mlp", hidden_dim=8))
    return ArchSpec(
        stages=(StageSpec(embed_dim=8, blocks=(block,)),),
        img_size=32,
        num_classes=num_classes,
        patch_embed=Component("conv", kernel=16, stride=16),
        pooling=Component("mean"),
    )


SPACE = SearchSpace(
    name="faulty",
    axes=(Axis(name="num_classes", choices=range(1, 100_001)),),
    decode=lambda params: Candidate(model=classifier(params["num_classes"]), label=f"{params['num_classes']} classes"),
)


@study("faulty")
def faulty_study(run: RunSettings) -> Study:
    """Random models, measured by an evaluator that misbehaves."""
    phase = Phase(
        name="search",
        space=SPACE,
        evaluators=(run.call("faulty"),),
        objectives=("score",),
        strategy=run.strategy or "random",
        num_trials=run.num_trials or 10,
    )
    return Study(phases=(phase,))

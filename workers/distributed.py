"""Several processes train one network: Ray Train starts them, and each runs the training that one process would run alone.

The task that calls this holds no CPU and no GPU of its own: with one, it would wait for ever for workers that wait for it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results.records import write_json_atomically
from space.model import Model
from space.recipe import Recipe
from workers.checkpoints import load_model, save_model
from workers.data import DataSet
from workers.evaluator import EvaluationError, Report
from workers.training import Process, Training, train

MAX_LOSSES = 3
RESULT = "distributed.json"
WEIGHTS = "distributed.pt"


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """What every process is sent; `dataset` is a reference into Ray's object store."""

    model: Model
    recipe: Recipe
    dataset: Any
    device: str
    num_threads: int
    workdir: Path
    report: Report
    how: dict[str, Any]


def train_in_processes(
    model: Model,
    recipe: Recipe,
    dataset: DataSet,
    *,
    num_processes: int,
    workdir: Path,
    device: str,
    report: Report,
    warn: Callable[[str], None],
    **how: Any,
) -> Training:
    """`train` by `num_processes` processes, one device each, which see equal shares of every batch; `how` is passed on to it.

    Call it from a task of the cluster; `workdir` must be a folder that all nodes share. A process that dies is replaced, with all
    others going on from the last checkpoint, at most three times. Raises what `train` raises.
    """
    import ray
    import torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    (workdir / RESULT).unlink(missing_ok=True)
    ray_files = workdir.absolute() / "ray_train"
    shared = _Shared(
        model=model,
        recipe=recipe,
        dataset=ray.put(dataset),
        device=device,
        num_threads=torch.get_num_threads(),
        workdir=workdir.absolute(),
        report=report,
        how=how,
    )
    needs = {"CPU": 1.0, "GPU": 1.0} if device == "cuda" else {"CPU": 1.0}
    trainer = TorchTrainer(
        _train_as_one_of_many,
        train_loop_config={"shared": shared},
        scaling_config=ScalingConfig(num_workers=num_processes, use_gpu=device == "cuda", resources_per_worker=needs),
        run_config=RunConfig(storage_path=str(ray_files), failure_config=FailureConfig(max_failures=MAX_LOSSES)),
    )
    try:
        trainer.fit()
    except TrainingFailedError:
        if (failed := _read(workdir).get("failed")) is not None:
            raise EvaluationError(failed["kind"], failed["message"]) from None
        raise
    found = _read(workdir)
    for warning in found["warnings"]:
        warn(warning)
    network, _ = load_model(workdir / WEIGHTS, device)
    (workdir / WEIGHTS).unlink()
    shutil.rmtree(ray_files, ignore_errors=True)
    return Training(network=network, **found["training"])


def _train_as_one_of_many(config: dict[str, Any]) -> None:
    import ray
    import torch
    from ray.train import get_context

    shared: _Shared = config["shared"]
    context = get_context()
    rank = context.get_world_rank()
    if failed := _read(shared.workdir).get("failed"):
        # Ray Train replaces processes after any error; this one would come again.
        raise EvaluationError(failed["kind"], failed["message"])
    torch.set_num_threads(shared.num_threads)
    os.environ["OMP_NUM_THREADS"] = str(shared.num_threads)
    process = Process(device=shared.device, rank=rank, world_size=context.get_world_size())
    warnings: list[str] = []
    try:
        training = train(
            shared.model,
            shared.recipe,
            ray.get(shared.dataset),
            workdir=shared.workdir,
            process=process,
            report=shared.report,
            warn=warnings.append,
            **shared.how,
        )
    except EvaluationError as error:
        write_json_atomically(shared.workdir / RESULT, {"failed": {"kind": error.kind, "message": str(error)}})
        raise
    if rank == 0:
        save_model(shared.workdir / WEIGHTS, training.network, shared.model)
        measured = {name: value for name, value in vars(training).items() if name != "network"}
        write_json_atomically(shared.workdir / RESULT, {"training": measured, "warnings": warnings})


def _read(workdir: Path) -> dict[str, Any]:
    try:
        return json.loads((workdir / RESULT).read_text())
    except OSError:
        return {}

"""Several processes, one device each, do one thing together: Ray Train starts them, and each runs what one process would run alone.

The task that calls this holds no CPU and no GPU of its own: it would wait for ever for workers that wait for what it holds.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results.records import write_json_atomically
from workers.evaluator import Context, EvaluationError, failure_kind
from workers.resources import NODE, Resources

MAX_LOSSES = 3
RESULT = "distributed.json"


@dataclass(frozen=True, kw_only=True)
class Process:
    """Which of the processes that work together this is, and on what it computes."""

    device: str = "cpu"
    rank: int = 0
    world_size: int = 1


ALONE = Process()


def on_devices(function: Callable[[Process], Mapping[str, Any]], context: Context) -> Mapping[str, Any]:
    """Run `function` in every process of the trial, each with its device; return rank 0's result. A single process is this one.

    `function` and what it returns, a JSON object, travel between processes when there are several.
    """
    if context.processes == 1:
        return function(Process(device=context.device))
    return in_processes(function, context.resources, context.workdir)


def in_one_task(function: Callable[[], dict[str, Any]], resources: Resources) -> dict[str, Any]:
    """Run `function` in a task of its own that takes `resources`, and return what it returns.

    Call it from a task of the cluster that holds no CPU and no GPU. When the process or its node dies the task begins again, at most
    three times. Raises EvaluationError with the reason if it fails.
    """
    import ray
    import torch
    from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

    task: Any = ray.remote(max_retries=0)(_run_in_task).options(**task_options(resources))
    for num_losses in itertools.count():
        try:
            return ray.get(task.remote(function, torch.get_num_threads()))
        except OutOfMemoryError as error:
            raise EvaluationError("out_of_memory", str(error)) from error
        except RayTaskError as error:
            raise EvaluationError(failure_kind(error.cause), f"{type(error.cause).__name__}: {error.cause}") from error
        except RayError as error:
            if num_losses == MAX_LOSSES:
                raise EvaluationError("lost", f"its worker or node died {num_losses + 1} times; last: {type(error).__name__}") from error
    raise AssertionError("unreachable")


def task_options(resources: Resources) -> dict[str, Any]:
    """The resources of one process as options of a Ray task; `memory` is scheduled, not enforced."""
    memory = {"memory": resources.memory_mb * 2**20} if resources.memory_mb else {}
    accelerator = {"accelerator_type": resources.accelerator_type} if resources.accelerator_type else {}
    share = {"resources": {NODE: resources.node_share}} if resources.node_share else {}
    return {"num_cpus": resources.cpus, "num_gpus": resources.gpus, **memory, **accelerator, **share}


def _run_in_task(function: Callable[[], dict[str, Any]], num_threads: int) -> dict[str, Any]:
    set_num_threads(num_threads)
    return function()


def set_num_threads(num_threads: int) -> None:
    """Set the CPU threads of this process: a reused worker keeps that of its last job, and threads decide the last bits of a sum."""
    import torch

    torch.set_num_threads(num_threads)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)


def in_processes(function: Callable[[Process], Mapping[str, Any]], resources: Resources, workdir: Path) -> dict[str, Any]:
    """Run `function` in `resources.processes` processes together; return rank 0's result, a JSON object.

    Call it from a task of the cluster; `workdir` must be a folder that all nodes share. When a process dies all begin again, at most
    three times, so `function` should go on from a checkpoint. Raises EvaluationError with the reason if it fails in any of them.
    """
    import ray
    import torch
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    workdir = workdir.absolute()
    ray_files = workdir / "ray_train"
    (workdir / RESULT).unlink(missing_ok=True)
    uses_gpu = resources.device == "cuda"
    share = {NODE: resources.node_share} if resources.node_share else {}
    needs = {"CPU": resources.cpus, **({"GPU": resources.gpus} if uses_gpu else {}), **share}
    work = _Work(ray.put(function), workdir / RESULT, resources.device, torch.get_num_threads())
    for num_losses in itertools.count():
        trainer = TorchTrainer(
            _run_as_one_of_many,
            train_loop_config={"work": work},
            scaling_config=ScalingConfig(
                num_workers=resources.processes,
                use_gpu=uses_gpu,
                resources_per_worker=needs,
                accelerator_type=resources.accelerator_type or None,
            ),
            run_config=RunConfig(storage_path=str(ray_files)),
        )
        # Not Ray Train's own retries: it would repeat an error that comes again every time.
        try:
            trainer.fit()
            break
        except TrainingFailedError:
            if (failed := _read(work.result).get("failed")) is not None:
                raise EvaluationError(failed["kind"], failed["message"]) from None
            if num_losses == MAX_LOSSES:
                raise
    shutil.rmtree(ray_files, ignore_errors=True)
    if "returned" not in (found := _read(work.result)):
        raise EvaluationError("error", f"{workdir} is not a folder that all nodes of the cluster share: --runs must be one")
    return found["returned"]


@dataclass(frozen=True)
class _Work:
    """What every process is sent; `function` is a reference into Ray's object store."""

    function: Any
    result: Path
    device: str
    num_threads: int


def _run_as_one_of_many(config: dict[str, Any]) -> None:
    import ray
    from ray.train import get_context

    work: _Work = config["work"]
    process = Process(device=work.device, rank=get_context().get_world_rank(), world_size=get_context().get_world_size())
    set_num_threads(work.num_threads)
    try:
        function: Any = ray.get(work.function)
        returned = function(process)
    except Exception as error:
        if not _is_loss_of_another(error):
            message = str(error) if isinstance(error, EvaluationError) else traceback.format_exc()
            write_json_atomically(work.result, {"failed": {"kind": failure_kind(error), "message": message}})
        raise
    if process.rank == 0:
        write_json_atomically(work.result, {"returned": dict(returned)})


def _is_loss_of_another(error: Exception) -> bool:
    """Whether a process ended because another process of the same trial had ended first."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error)


def _read(result: Path) -> dict[str, Any]:
    try:
        return json.loads(result.read_text())
    except OSError:
        return {}

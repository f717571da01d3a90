"""`search/run.py` with the study `faulty` known, and the means to die by SIGKILL right after the n-th write of a ledger."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import faulty  # noqa: F401  registers the study and its evaluator

import search.measuring
import search.service
import workers.training
from results.mlflow_store import MlflowTracker
from search.run import main
from workers.pool import SerialPool


def die_after(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = function(*args, **kwargs)
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return dying


def drive(arguments: Sequence[str], pool: Literal["ray", "serial"], die_at: tuple[str, int] | None = None) -> None:
    """Run the command line with `arguments` and exit with its status.

    Trials run on a Ray cluster of the driver's own, or in its process. `die_at` names a ledger, "outcome" or "mlflow", or the
    "checkpoint" of a training, and after how many writes of it the process kills itself; a training must be in this process for that.
    """
    if pool == "serial":
        search.service.make_pool = lambda *_: SerialPool()
    match die_at:
        case "outcome", count:
            search.measuring.write_json_atomically = die_after(count, search.measuring.write_json_atomically)
        case "checkpoint", count:
            workers.training.save_checkpoint = die_after(count, workers.training.save_checkpoint)
        case "mlflow", count:
            MlflowTracker.record = die_after(count, MlflowTracker.record)
    sys.exit(main(list(arguments)))

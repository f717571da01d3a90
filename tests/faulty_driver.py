"""`search/run.py` with the study `faulty` known, and the means to die by SIGKILL right after the n-th write of a ledger.

KILL_AFTER=outcome:3 python tests/faulty_driver.py faulty --trials 10
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import faulty  # noqa: F401  registers the study and its evaluator

import search.measuring
from results.mlflow_store import MlflowTracker
from search.run import main


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


if __name__ == "__main__":
    write, _, count = os.environ.get("KILL_AFTER", "").partition(":")
    if write == "outcome":
        search.measuring.write_json_atomically = die_after(int(count), search.measuring.write_json_atomically)
    elif write == "mlflow":
        MlflowTracker.record = die_after(int(count), MlflowTracker.record)
    sys.exit(main(sys.argv[1:]))

"""Processes of their own that need not import the large libraries: a server of multiprocessing has them and forks.

A fresh interpreter takes seconds to import torch, timm, MLflow and Matplotlib. A test that kills or interrupts a driver needs a real
process, and no fresh interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "timm", "mlflow.store.tracking.sqlalchemy_store", "optuna", "sklearn.datasets", "matplotlib.figure", "plotly.graph_objects"]
)


class Forked:
    """`function(*arguments)` in a process of its own; what it prints goes to two files in `folder`, which must exist."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, folder: Path, env: Mapping[str, str] | None = None):
        self._files = folder / "stdout", folder / "stderr"
        environment = {**os.environ, **(env or {})}
        self._process = _context.Process(target=_call, args=(self._files, environment, function, arguments), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return self._files[0].read_text() if self._files[0].exists() else ""

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """How it ended, with a negative signal as return code, and what it printed."""
        self._process.join(timeout)
        out, err = (file.read_text() if file.exists() else "" for file in self._files)
        assert self._process.exitcode is not None, f"it still runs after {timeout:g} s\n{out}\n{err}"
        return subprocess.CompletedProcess((), self._process.exitcode, out, err)


def _call(files: tuple[Path, Path], environment: Mapping[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    for descriptor, path in zip((1, 2), files, strict=True):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)

"""Shared by all tests: no network, no telemetry, the same examples every time, and Ray clusters of their own."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, chromium
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parent.parent

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("RAY_ADDRESS", None)
# Two processes share two cores, and the arrays of tests are small. NumPy and torch read it when they are imported.
os.environ["OMP_NUM_THREADS"] = "1"

# Examples follow from the test alone: what has passed passes again, on a loaded machine too.
settings.register_profile("tests", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if hasattr(config, "workerinput"):
        # pytest-xdist hands out files in this order, and those that take longest should not come last.
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="module")
def one_thread():
    """Equal bits need an equal number of threads, and tiny networks run no faster on more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_vit():
    """The smallest plain ViT with a class token that still learns the digits."""
    from space.spec import ArchSpec, BlockSpec, Component, StageSpec

    block = BlockSpec(mixer=Component("attention", num_heads=2, head_dim=8), feed_forward=Component("mlp", hidden_dim=32))
    return ArchSpec(
        stages=(StageSpec(embed_dim=16, blocks=(block,) * 2),),
        img_size=8,
        num_classes=10,
        patch_embed=Component("conv", kernel=2, stride=2),
        prefix=Component("class_token"),
        position=Component("learned"),
        pooling=Component("class_token"),
    )


@pytest.fixture
def never_settled(monkeypatch: pytest.MonkeyPatch):
    """Files are told apart by their bytes however old they are, so that a slow test does not see them come of age."""
    monkeypatch.setattr("workers.file_hashes.SETTLED_S", float("inf"))


@pytest.fixture(scope="session", autouse=True)
def creates_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], None]]:
    """MLflow takes seconds to migrate a new store to its newest tables: it makes one, and studies in this process get copies.

    The value is the function that makes a store as users get it.
    """
    from results import mlflow_store

    create = mlflow_store._create_sqlite_store
    made = tmp_path_factory.mktemp("mlflow") / "mlflow.db"

    def copy(path: Path) -> None:
        create(made)
        if not (path.exists() and path.stat().st_size):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_store, "_create_sqlite_store", copy)
        yield create


@pytest.fixture
def serial_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials run in this process, where a cluster adds nothing to the fact under test."""
    from workers.pool import SerialPool

    monkeypatch.setattr("search.service.make_pool", lambda *arguments: SerialPool())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of one node with two CPUs; its workers can import the modules of tests."""
    # Read once, when Ray is imported; if a pool of another file did that, its token is in the environment and serves here too.
    if "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def pool(cluster: Any) -> Iterator[Any]:
    """A pool on the cluster of this module."""
    from workers.pool import RayPool

    made = RayPool(address=cluster.address)
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window; tests that need it skip themselves where it is not installed."""
    if CHROMIUM is None:
        pytest.skip("no chromium here; apt-get install chromium")
    pytest.importorskip("playwright", reason="playwright is not installed; it comes with vitscale[dev]")
    with chromium() as one:
        yield one


def run_command(
    *args: str | Path, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """`search/run.py ARGS` in its own process, as a user would run it."""
    command = [sys.executable, str(REPOSITORY / "search" / "run.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout, check=False)


def run_pasted(command: str, *, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command as it was printed, in a shell whose `python` is this one."""
    here = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    environment = {**os.environ, **here, **(env or {})}
    return subprocess.run(command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False)


def run_here(main: Callable[[list[str]], int], *args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line `main` with ARGS in this process: for what needs no process of its own, it saves the imports."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as left:  # argparse
            status = left.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(status, int)
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())

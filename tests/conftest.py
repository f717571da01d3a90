"""Shared by all tests: no network, no telemetry, and Ray clusters of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("RAY_ADDRESS", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

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


def run_command(
    *args: str | Path, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """`search/run.py ARGS` in its own process, as a user would run it."""
    command = [sys.executable, str(REPOSITORY / "search" / "run.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout, check=False)

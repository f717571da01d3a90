"""The promises of the layout: what may import what, and where the heavy libraries live."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

MAY_IMPORT = {
    "space": {"space"},
    "results": {"results"},
    "workers": {"workers", "space", "results"},
    "search": {"search", "workers", "space", "results"},
}
ONLY_IN = {
    "ray": {"workers/pool.py", "workers/distributed.py"},
    "mlflow": {"results/tracking.py", "results/leaderboard.py"},
    "optuna": {"search/"},
    "argparse": {"search/run.py", "results/leaderboard.py"},
}
NEVER = {"results": {"torch", "timm", "ray", "optuna"}, "space": {"ray", "mlflow", "optuna"}}

MODULES = [path.relative_to(REPOSITORY) for package in MAY_IMPORT for path in sorted((REPOSITORY / package).rglob("*.py"))]


def imported_roots(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            roots.add((node.module or "").split(".")[0])
    return roots


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path: Path):
    package, roots = path.parts[0], imported_roots(path)
    upward = (roots & MAY_IMPORT.keys()) - MAY_IMPORT[package]
    assert not upward, f"{path} imports {upward}; {package} may import {MAY_IMPORT[package]}"
    forbidden = roots & NEVER.get(package, set())
    assert not forbidden, f"{path} imports {forbidden}"
    for library, rooms in ONLY_IN.items():
        if library in roots:
            assert str(path).startswith(tuple(rooms)), f"{path} imports {library}, which belongs in {rooms}"


def test_no_module_of_search_hides_another_when_run_as_a_script():
    dependencies = {"optuna", "ray", "torch", "timm", "mlflow", "pandas", "numpy", "scipy", "plotly", "filelock"}
    names = {path.stem for path in (REPOSITORY / "search").glob("*.py")} | {"strategies", "studies"}
    assert not names & (sys.stdlib_module_names | dependencies)


@pytest.mark.parametrize("package", ["space", "workers.evaluators", "workers.evaluate"])
def test_evaluators_run_where_the_service_libraries_are_missing(package: str):
    code = f"""
import sys
for name in ("ray", "mlflow", "optuna", "fvcore"):
    sys.modules[name] = None
import importlib, pkgutil
module = importlib.import_module({package!r})
for found in pkgutil.walk_packages(getattr(module, "__path__", []), {package!r} + "."):
    importlib.import_module(found.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr

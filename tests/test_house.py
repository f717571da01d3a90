"""The promises of the layout: what may import what, and where the heavy libraries live."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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
    "mlflow": {"results/mlflow_store.py"},
    "optuna": {"search/"},
    "argparse": {"search/arguments.py", "search/commands.py", "results/leaderboard.py", "results/scaling_laws/__main__.py"},
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


def imported_at_run_time(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports under the node, those inside functions too; not those that only a type checker follows."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    skipped = node.body if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") else []
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            yield from imported_at_run_time(child)


def import_graph(paths: dict[str, Path]) -> dict[str, set[str]]:
    """For each module of `paths` (name to file), those of them that it imports anywhere."""
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        names: list[str] = []
        for node in imported_at_run_time(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            else:
                # `from package import name` imports the module `name` where there is one.
                names += [full if (full := f"{node.module}.{alias.name}") in paths else str(node.module) for alias in node.names]
        graph[module] = paths.keys() & set(names) - {module}
    return graph


def import_circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import circle in order, the first again at its end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_files_import_each_other_in_a_circle(package: str):
    own = [path for path in MODULES if path.parts[0] == package]
    paths = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): REPOSITORY / path for path in own}
    circle = import_circle(import_graph(paths))
    assert not circle, f"import circle: {' -> '.join(circle)}"


def test_a_circle_is_found_inside_functions_and_not_in_what_only_a_type_checker_reads(tmp_path: Path):
    paths = {name: tmp_path / f"{name}.py" for name in ("house.a", "house.b", "house.c")}
    paths["house.a"].write_text("from house import b\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import house.c\n")
    paths["house.b"].write_text("def f():\n    from house.c import x\n")
    paths["house.c"].write_text("")
    assert import_circle(import_graph(paths)) == []
    paths["house.c"].write_text("import house.a\n")
    assert set(import_circle(import_graph(paths))) == {"house.a", "house.b", "house.c"}


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

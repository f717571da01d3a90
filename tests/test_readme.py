"""What the README shows does what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from conftest import REPOSITORY, run_command

from search.storage import open_storage

pytestmark = pytest.mark.slow

BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)


def block_with(words: str) -> str:
    (block,) = [block for block in BLOCKS if words in block]
    return block


def test_links_lead_to_files():
    targets = re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / "README.md").read_text())
    files = [target for target in targets if "://" not in target]
    assert {"docs/speed.md", "docs/leaderboard.png", "CONTRIBUTING.md"} <= set(files)
    assert [file for file in files if not (REPOSITORY / file).exists()] == []


def test_the_optuna_example_goes_on_with_a_study_that_the_command_line_made(tmp_path: Path):
    flags = ["--trials", "2", "--img-size", "224", "--proxy-img-size", "64", "--max-params-m", "2.4"]
    made = run_command("as_vit", *flags, cwd=tmp_path)
    assert made.returncode == 0, made.stdout + made.stderr
    done = subprocess.run([sys.executable, "-c", block_with("study.optimize")], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "length_distortion" in done.stdout
    study = optuna.load_study(study_name="as_vit/topology", storage=open_storage(tmp_path / "runs" / "optuna.journal"))
    assert len(study.trials) == 7


def test_the_component_example_is_found_and_passes_the_contract(tmp_path: Path):
    for package in ("space", "results", "workers", "search", "tests"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    block = block_with('@component("feed_forward", "squeeze"')
    path = re.match(r"# (space/components/\w+\.py)\n", block)
    assert path is not None
    (tmp_path / path[1]).write_text(block)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_components.py", "-k", "squeeze", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\.+ ", done.stdout), done.stdout

"""What the README shows does what it says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from conftest import REPOSITORY, run_here
from interrupted import InterruptedPool
from optuna.trial import TrialState

from search.run import main
from search.storage import open_storage

pytestmark = pytest.mark.slow

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def block_with(words: str) -> str:
    (block,) = [block for block in BLOCKS if words in block]
    return block


def test_links_lead_to_files():
    targets = re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / "README.md").read_text())
    files = [target for target in targets if "://" not in target]
    assert {"docs/speed.md", "docs/leaderboard.png", "CONTRIBUTING.md"} <= set(files)
    assert [file for file in files if not (REPOSITORY / file).exists()] == []


def test_the_optuna_example_goes_on_with_a_study_that_the_command_line_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("search.service.make_pool", lambda *arguments: InterruptedPool(num_jobs=1))
    flags = ["--trials", "1", "--img-size", "224", "--proxy-img-size", "64", "--max-params-m", "2.4"]
    made = run_here(main, "as_vit", *flags, cwd=tmp_path)
    assert made.returncode == 130, made.stdout + made.stderr
    monkeypatch.chdir(tmp_path)
    exec(block_with("study.optimize"), {})
    assert "length_distortion" in capsys.readouterr().out
    study = optuna.load_study(study_name="as_vit/topology", storage=open_storage(tmp_path / "runs" / "optuna.journal"))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 6


@pytest.fixture(scope="module")
def checkout_with_component(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, with the README's component in the file that the README names."""
    root = tmp_path_factory.mktemp("checkout")
    for package in ("space", "results", "workers", "search", "tests"):
        shutil.copytree(REPOSITORY / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    block = block_with('@component("feed_forward", "squeeze"')
    path = re.match(r"# (space/components/\w+\.py)\n", block)
    assert path is not None
    (root / path[1]).write_text(block)
    return root


def run_in(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run([sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_the_component_example_is_found_and_passes_the_contract(checkout_with_component: Path):
    done = run_in(checkout_with_component, "-m", "pytest", "tests/test_components.py", "-k", "squeeze", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\.+ ", done.stdout), done.stdout


def test_the_component_example_ends_in_a_leaderboard(checkout_with_component: Path):
    section = re.sub(r"\\\n\s+", "", README.partition("## Add a component")[2].partition("\n## ")[0])
    (command,) = re.findall(r"^    (search/run\.py compose .*squeeze.*)$", section, flags=re.MULTILINE)
    done = run_in(checkout_with_component, *shlex.split(command), "--recipe", "epochs=1")
    assert done.returncode == 0, done.stdout + done.stderr
    labels = {label for label in re.findall(r"feed_forward=\S+", section) if label in done.stdout}
    assert labels == {"feed_forward=mlp", "feed_forward=squeeze,ratio=2", "feed_forward=squeeze,ratio=4"}

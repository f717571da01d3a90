"""`ray job submit`, in the order in which the README's reader types it, in a clean home folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
import psutil
import pytest
from conftest import REPOSITORY
from optuna.trial import TrialState

from results.paths import RunPaths
from search.storage import open_storage

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent


@dataclass
class Head:
    """A head node of its own, the copy of the repository that jobs are submitted from, and its user's home."""

    home: Path
    checkout: Path
    env: dict[str, str]

    def ray(self, *args: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "ray", *args], cwd=self.checkout, env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )

    def submit(self, *entrypoint: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        flags = [] if wait else ["--no-wait"]
        deadline = time.monotonic() + 180
        while True:
            done = self.ray("job", "submit", *flags, "--working-dir", ".", "--", *entrypoint)
            # `ray start` returns before the agent that takes jobs has started.
            if "No available agent" not in done.stderr or time.monotonic() > deadline:
                return done
            time.sleep(1)

    @property
    def runs(self) -> Path:
        return self.home / "vitscale" / "runs"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Ray's sockets lie below its folder, and a socket's path must stay under 108 characters.
    folder = Path(tempfile.mkdtemp(prefix="vs", dir="/tmp"))
    home, checkout = folder / "home", folder / "checkout"
    home.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        target = checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_file():
            shutil.copy2(REPOSITORY / name, target)
    for litter in (".git/objects/x", ".venv/lib/x", "runs/x", "data/x"):
        (checkout / litter).parent.mkdir(parents=True)
        (checkout / litter).write_bytes(os.urandom(2**20))
    dashboard = free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VITSCALE_", "PYTHONPATH"))}
    env |= {
        "HOME": str(home),
        "PATH": f"{BIN}:{env['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    made = Head(home, checkout, env)
    made.ray("get-auth-token", "--generate")
    # The agent that takes jobs has a fixed port, and stays silent if another cluster of the machine holds it.
    ports = ["--port", str(free_port()), "--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(free_port())]
    started = made.ray("start", "--head", "--num-cpus", "2", *ports, "--temp-dir", str(folder / "ray"))
    assert started.returncode == 0, started.stdout + started.stderr
    yield made
    for process in psutil.process_iter(["environ", "cmdline"]):
        if (process.info["environ"] or {}).get("HOME") == str(home):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def drivers(head: Head) -> list[psutil.Process]:
    """The processes of the job's driver itself, not the shell it is started by."""
    found = []
    for process in psutil.process_iter(["environ", "cmdline"]):
        command = process.info["cmdline"] or []
        if (process.info["environ"] or {}).get("HOME") == str(head.home) and command[1:2] == ["search/run.py"]:
            found.append(process)
    return found


def complete(head: Head) -> int:
    if not (head.runs / "optuna.journal").exists():
        return 0
    storage = open_storage(head.runs / "optuna.journal")
    if "smoke/search" not in optuna.get_all_study_names(storage):
        return 0
    trials = optuna.load_study(study_name="smoke/search", storage=storage).get_trials(states=(TrialState.COMPLETE,))
    return len(trials)


def test_a_killed_and_edited_job_resumes_where_it_was(head: Head):
    command = ["python", "search/run.py", "smoke", "--trials", "24"]
    assert head.submit(*command, wait=False).returncode == 0
    deadline = time.monotonic() + 180
    while complete(head) < 4:
        assert time.monotonic() < deadline, "the job made no progress"
        time.sleep(0.2)
    (running,) = drivers(head)
    running.kill()
    running.wait()
    done_before = complete(head)
    assert done_before < 24
    (head.checkout / "README.md").write_text("edited\n")
    resumed = head.submit(*command)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert complete(head) == 24
    assert f"results in {head.runs}" in resumed.stdout
    assert "24/24 done" in resumed.stdout
    assert RunPaths(head.runs).mlflow_uri in resumed.stdout


@pytest.fixture(scope="module")
def looked_around(head: Head) -> subprocess.CompletedProcess[str]:
    """A job that lists the files it has and then runs a study in a folder beside them."""
    return head.submit("sh", "-c", "find . -type f; python search/run.py smoke --runs here")


def test_a_relative_runs_folder_is_refused_in_a_job(looked_around: subprocess.CompletedProcess[str]):
    assert looked_around.returncode != 0
    assert "throw-away copy" in looked_around.stdout


def test_what_travels_is_small(looked_around: subprocess.CompletedProcess[str]):
    files = set(looked_around.stdout.splitlines())
    assert "./search/run.py" in files, looked_around.stdout + looked_around.stderr
    assert [file for file in files if file.startswith(("./.git/", "./.venv/", "./runs/", "./data/"))] == []

"""Several processes train one network: the same numbers as one, through a pool and Ray Train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

TRAIN_ONE_TRIAL = """
import json, sys
from pathlib import Path
import psutil
from results.records import Measurement
from space.catalog import resolve
from space.recipe import Recipe
from space.search_space import Candidate
from workers.evaluate import Job, evaluate
from workers.evaluator import evaluators
from workers.evaluator import Call
from workers.pool import Finished, RayPool, Reported
from workers.resources import Resources

folder, lr, num_kills = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
# Mixing differs from process to process; without it their gradients add up to those of one.
recipe = Recipe(epochs=20, batch_size=256, optimizer="sgd", lr=lr, min_lr=0.0, warmup_epochs=1, flip=False, clip_grad_norm=0.0)

def job(processes):
    return Job(
        trial=processes,
        candidate=Candidate(model=resolve("vit_digits"), recipe=recipe),
        calls=tuple(Call(name, evaluators.get(name).parse_settings(settings)) for name, settings in {
            "train": {"checkpoint_every_s": "0"},
            "robustness": {"max_images": "20"},
            "cost": {},
        }.items()),
        seed=0,
        data="digits",
        data_fingerprint="digits",
        workdir=folder / str(processes),
        resources=Resources(processes=processes),
    )

pool = RayPool(address="local")
pool.check(Resources(processes=2))
pool.submit(job(2))
outcome, curves, killed = None, [], []
while outcome is None:
    if len(killed) < num_kills and list(folder.glob("2/checkpoints-*/step-*")):
        names = {each: " ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])}
        process = next(each for each, name in names.items() if name.startswith("ray::RayTrainWorker"))
        process.kill()
        killed.append(process.pid)
    for event in pool.poll(0.1):
        if isinstance(event, Finished):
            outcome = event.outcome
        elif isinstance(event, Reported):
            curves.append((event.name, event.step))
pool.close()
alone = evaluate(job(1))
print(json.dumps({
    "together": dict(outcome.values) if isinstance(outcome, Measurement) else [outcome.kind, outcome.message],
    "alone": dict(alone.values) if isinstance(alone, Measurement) else [alone.kind, alone.message],
    "epochs": sorted({step for name, step in curves if name == "val_nll"}),
    "killed": len(killed),
    "files": sorted(path.name for path in (folder / "2").iterdir()),
}))
"""


def train_one_trial(folder: Path, lr: float, num_kills: int = 0):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", TRAIN_ONE_TRIAL, str(folder), str(lr), str(num_kills)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_two_processes_one_of_them_killed_train_what_one_process_trains(tmp_path):
    found = train_one_trial(tmp_path, lr=0.05, num_kills=1)
    assert found["killed"] == 1
    # The order in which floats are summed differs, and nothing else.
    assert found["together"] == pytest.approx(found["alone"], rel=1e-3)
    assert found["epochs"] == list(range(1, 21))
    assert "model.pt" in found["files"]
    assert "ray_train" not in found["files"]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_any_process_fails_the_trial_for_that_reason(tmp_path):
    found = train_one_trial(tmp_path, lr=1e30)
    assert found["together"][0] == found["alone"][0] == "non_finite"
    assert "not finite at step" in found["together"][1]

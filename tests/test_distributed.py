"""Several processes train one network: the same numbers as one, through a pool and Ray Train."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from results.records import Failure, Measurement, Outcome
from space.catalog import resolve
from space.recipe import Recipe
from space.search_space import Candidate
from workers.evaluate import Job, evaluate
from workers.evaluator import Call, evaluators
from workers.pool import Finished, RayPool, Reported
from workers.resources import Resources

pytestmark = pytest.mark.slow

NUM_EPOCHS = 12
SETTINGS = {"train": {"checkpoint_every_s": "0"}, "robustness": {"max_images": "20"}, "cost": {}}


def job(folder: Path, num_processes: int, lr: float) -> Job:
    # Mixing differs from process to process; without it their gradients add up to those of one.
    recipe = Recipe(epochs=NUM_EPOCHS, batch_size=256, optimizer="sgd", lr=lr, min_lr=0.0, warmup_epochs=1, flip=False, clip_grad_norm=0.0)
    return Job(
        trial=num_processes,
        candidate=Candidate(model=resolve("vit_digits"), recipe=recipe),
        calls=tuple(Call(name, evaluators.get(name).parse_settings(settings)) for name, settings in SETTINGS.items()),
        seed=0,
        data="digits",
        data_fingerprint="digits",
        workdir=folder / str(num_processes),
        resources=Resources(processes=num_processes),
    )


def kill_one_that_trains() -> None:
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    names = {process: " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]) if process.pid in ours}
    next(process for process, name in names.items() if name.startswith("ray::RayTrainWorker")).kill()


def train_in_two_processes(pool: RayPool, asked: Job, num_kills: int = 0) -> tuple[Outcome, list[Reported]]:
    """The outcome and what was reported; a process is killed after the first checkpoint, `num_kills` times."""
    reports: list[Reported] = []
    pool.check(asked.resources)
    pool.submit(asked)
    while True:
        if num_kills and list(asked.workdir.glob("checkpoints-*/step-*")):
            kill_one_that_trains()
            num_kills -= 1
        for event in pool.poll(0.1):
            if isinstance(event, Finished):
                assert num_kills == 0, "it ended before a process could be killed"
                return event.outcome, reports
            reports.append(event)


def test_two_processes_one_of_them_killed_train_what_one_process_trains(pool: RayPool, tmp_path: Path):
    together, reports = train_in_two_processes(pool, job(tmp_path, 2, lr=0.05), num_kills=1)
    alone = evaluate(job(tmp_path, 1, lr=0.05))
    assert isinstance(together, Measurement), together
    assert isinstance(alone, Measurement), alone
    # The order in which floats are summed differs, and nothing else.
    assert together.values == pytest.approx(alone.values, rel=1e-3)
    assert sorted({report.step for report in reports if report.name == "val_nll"}) == list(range(1, NUM_EPOCHS + 1))
    files = {path.name for path in (tmp_path / "2").iterdir()}
    assert "model.pt" in files
    assert "ray_train" not in files


def test_a_loss_that_is_not_finite_in_any_process_fails_the_trial_for_that_reason(pool: RayPool, tmp_path: Path):
    together, _ = train_in_two_processes(pool, job(tmp_path, 2, lr=1e30))
    alone = evaluate(job(tmp_path, 1, lr=1e30))
    assert isinstance(together, Failure)
    assert isinstance(alone, Failure)
    assert together.kind == alone.kind == "non_finite"
    assert "not finite at step" in together.message

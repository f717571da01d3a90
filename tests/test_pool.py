"""What the jobs of a pool share and take, on real Ray."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import faulty
import numpy as np
import pytest

import workers.pool as pool_module
from results.records import Failure, Measurement, Metric
from space.search_space import Candidate
from space.spec import ArchSpec
from workers.data import DataSet
from workers.evaluate import Job
from workers.evaluator import Call, Context, evaluator
from workers.pool import Finished, PoolError, RayPool
from workers.resources import Resources

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class CountSettings:
    """Every worker waits until so many have begun: they run at the same time."""

    num_together: int = 1


@evaluator("count_images", metrics=(Metric("sum", "maximize"),), settings=CountSettings, uses_data=True, needs_dataset=True, memory_mb=50)
def count_images(model: ArchSpec, context: Context, settings: CountSettings) -> Mapping[str, float]:
    """Says what the data set holds and whose memory it is in."""
    dataset = context.dataset
    assert dataset is not None
    assert dataset.images is not None
    context.workdir.mkdir(parents=True)
    while len(list(context.workdir.parent.iterdir())) < settings.num_together:
        pass
    return {
        "sum": float(dataset.images.sum(dtype=np.int64)),
        "owns": float(dataset.images.flags.owndata),
        "writeable": float(dataset.images.flags.writeable),
        "pid": float(os.getpid()),
    }


def job(trial: int, workdir: Path, *, data: str = "digits", num_together: int = 1) -> Job:
    return Job(
        trial=trial,
        candidate=Candidate(model=faulty.classifier(10)),
        calls=(Call("count_images", CountSettings(num_together)),),
        seed=0,
        data=data,
        data_fingerprint=data,
        workdir=workdir / str(trial),
    )


def test_it_says_what_has_to_happen_before_a_job_can_start(tmp_path: Path, pool: RayPool):
    assert pool.awaits() == ""
    pool.submit(job(0, tmp_path))
    assert pool.awaits() == "the data"
    while not (events := pool.poll(0.1)):
        assert pool.awaits() in ("the data", "workers to start", "")
    assert isinstance(events[-1], Finished)
    pool.submit(job(1, tmp_path))
    assert pool.awaits() == ""


def outcomes(pool: RayPool, num: int) -> list:
    found: list = []
    while len(found) < num:
        found += [event.outcome for event in pool.poll(1.0) if isinstance(event, Finished)]
    return found


def counting_load(marks: str):
    """`_load_dataset` that leaves a mark for every time that it runs; a closure, so that it travels to the workers by value."""
    load = pool_module._load_dataset

    def counted(source: str, img_size: int, cache: Path | None) -> DataSet:
        with open(marks, "a") as file:
            file.write(f"{source} {img_size}\n")
        return load(source, img_size, cache)

    return counted


def test_all_workers_read_one_data_set_that_was_decoded_once(tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch):
    marks = tmp_path / "marks"
    monkeypatch.setattr(pool_module, "_load_dataset", counting_load(str(marks)))
    with closing(RayPool(address=cluster.address)) as pool:
        for trial in range(2):
            pool.submit(job(trial, tmp_path / "work", num_together=2))
        measured = outcomes(pool, 2)
        pool.submit(job(2, tmp_path / "later"))
        measured += outcomes(pool, 1)
    assert marks.read_text() == "digits 32\n"
    assert all(isinstance(outcome, Measurement) for outcome in measured), measured
    assert len({outcome.values["sum"] for outcome in measured}) == 1
    assert {(outcome.values["owns"], outcome.values["writeable"]) for outcome in measured} == {(0.0, 0.0)}
    assert len({outcome.values["pid"] for outcome in measured[:2]}) == 2


def test_a_set_that_cannot_be_used_stops_everything_with_its_own_message(tmp_path: Path, pool: RayPool):
    (tmp_path / "images" / "only_class").mkdir(parents=True)
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "images" / "only_class" / f"{number}.png")
    pool.submit(job(0, tmp_path, data=f"folder:{tmp_path}/images"))
    with pytest.raises(PoolError, match="class"):
        outcomes(pool, 1)


def test_several_processes_of_a_trial_take_their_cores_themselves(pool: RayPool, tmp_path: Path):
    num_cores = pool.capacity(Resources())
    together = Resources(processes=num_cores)
    assert pool.capacity(together) == 1
    pool.submit(dataclasses.replace(faulty_job(tmp_path), resources=together))
    (outcome,) = outcomes(pool, 1)
    assert not isinstance(outcome, Failure), outcome
    with pytest.raises(PoolError, match=f"the cluster lacks the {num_cores + 1} times 1 CPU"):
        pool.check(Resources(processes=num_cores + 1))


def faulty_job(workdir: Path) -> Job:
    return Job(
        trial=0,
        candidate=Candidate(model=faulty.classifier(10)),
        calls=(Call("faulty", faulty.FaultySettings()),),
        seed=0,
        data="digits",
        data_fingerprint="digits",
        workdir=workdir,
    )

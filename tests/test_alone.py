"""A trial that wants a whole node has it alone, on a cluster of three fake nodes of different kinds; one of them does not take part."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import faulty
import pytest
from conftest import REPOSITORY

from results.records import Metric
from space.search_space import Candidate
from space.spec import ArchSpec
from workers.evaluate import Job
from workers.evaluator import Call, Context, evaluator
from workers.pool import Finished, RayPool
from workers.resources import NODE, Resources

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class StaySettings:
    """Stays for so long, or until the file is there; tells `log` when it came and went, and where."""

    log: str = ""
    stay_s: float = 0.0
    until: str = ""


@evaluator("stay", metrics=(Metric("is_alone", "maximize"),), settings=StaySettings, memory_mb=50)
def stay(model: ArchSpec, context: Context, settings: StaySettings) -> Mapping[str, float]:
    """Occupies a part of a node, or the whole."""
    import ray

    def note(event: str) -> None:
        node = ray.get_runtime_context().get_node_id()
        with open(settings.log, "a") as log:
            log.write(f"{event} {context.workdir.name} {node} {context.resources.accelerator_type}\n")

    note("came")
    time.sleep(settings.stay_s)
    while settings.until and not Path(settings.until).exists():
        time.sleep(0.05)
    note("went")
    return {"is_alone": float(context.resources.is_alone)}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    # Read once, when Ray is imported; if a pool of another file did that, its token is in the environment and serves here too.
    if "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {NODE: 1, "accelerator_type:H100": 1}})
    cluster.add_node(num_cpus=2, resources={NODE: 1, "accelerator_type:A100": 1})
    cluster.add_node(num_cpus=2, resources={"accelerator_type:T4": 1})
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def pools(address: str) -> Iterator[tuple[RayPool, RayPool]]:
    """Those of two studies."""
    made = RayPool(address=address), RayPool(address=address)
    yield made
    for pool in made:
        pool.close()


def job(folder: Path, number: int, resources: Resources, **settings) -> Job:
    return Job(
        trial=number,
        candidate=Candidate(model=faulty.classifier(number + 1)),
        calls=(Call("stay", StaySettings(log=str(folder / "log"), **settings)),),
        seed=0,
        data="digits",
        data_fingerprint="digits",
        workdir=folder / str(number),
        resources=resources,
    )


def finished(pool: RayPool, num_jobs: int) -> dict[int, float]:
    """Whether each job was alone."""
    found = {}
    while len(found) < num_jobs:
        for event in pool.poll(0.2):
            if isinstance(event, Finished):
                found[event.trial] = event.outcome.values["is_alone"]
    return found


def visits(folder: Path) -> list[list[str]]:
    return [line.split(" ") for line in (folder / "log").read_text().splitlines()]


def came(folder: Path, number: int) -> bool:
    return (folder / "log").exists() and any(visit[:2] == ["came", str(number)] for visit in visits(folder))


def wait_until_it_came(pool: RayPool, folder: Path, number: int) -> None:
    while not came(folder, number):
        pool.poll(0.1)


ORDINARY, WHOLE = Resources(memory_mb=50), Resources(memory_mb=50, whole_node=True)


def test_no_trial_of_any_study_runs_beside_one_that_has_its_node_alone(pools: tuple[RayPool, RayPool], tmp_path: Path):
    ordinary, timing = pools
    assert (ordinary.capacity(ORDINARY), timing.capacity(WHOLE)) == (4, 2)
    for number in range(3):
        ordinary.submit(job(tmp_path, number, ORDINARY, stay_s=0.5))
    for number in (10, 11):
        timing.submit(job(tmp_path, number, WHOLE, stay_s=0.5))
    for number in range(3, 6):
        ordinary.submit(job(tmp_path, number, ORDINARY, stay_s=0.5))
    assert finished(timing, 2) == {10: 1.0, 11: 1.0}
    assert set(finished(ordinary, 6).values()) == {0.0}
    present: dict[str, set[str]] = {}
    for event, number, node, _ in visits(tmp_path):
        there = present.setdefault(node, set())
        there.add(number) if event == "came" else there.remove(number)
        assert len(there) == 1 or not there & {"10", "11"}
    assert len(present) == 2


def test_each_kind_of_accelerator_is_waited_for_by_itself(pools: tuple[RayPool, RayPool], tmp_path: Path):
    _, timing = pools
    for number, kind in enumerate(("H100", "A100", "T4")):
        timing.submit(job(tmp_path, number, WHOLE.changed({"accelerator_type": kind}), stay_s=0.2))
    # No trial is kept off a node that declares nothing, and its row says so.
    assert finished(timing, 3) == {0: 1.0, 1: 1.0, 2: 0.0}
    nodes = {kind: node for _, _, node, kind in visits(tmp_path)}
    assert len(set(nodes.values())) == len(nodes) == 3


def test_one_that_has_waited_long_enough_runs_beside_the_others_and_says_so(pools: tuple[RayPool, RayPool], tmp_path: Path):
    ordinary, timing = pools
    ordinary.submit(job(tmp_path, 0, ORDINARY.changed({"accelerator_type": "H100"}), until=str(tmp_path / "end")))
    wait_until_it_came(ordinary, tmp_path, 0)
    timing.submit(job(tmp_path, 1, WHOLE.changed({"accelerator_type": "H100", "wait_s": 0.5})))
    assert finished(timing, 1) == {1: 0.0}
    (tmp_path / "end").touch()
    assert finished(ordinary, 1) == {0: 0.0}


def test_trials_of_one_study_do_not_end_each_others_waiting(pools: tuple[RayPool, RayPool], tmp_path: Path):
    _, timing = pools
    patient = WHOLE.changed({"accelerator_type": "H100", "wait_s": 3.0})
    for number in range(2):
        timing.submit(job(tmp_path, number, patient, stay_s=4.0))
    assert finished(timing, 2) == {0: 1.0, 1: 1.0}

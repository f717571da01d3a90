"""Where jobs run: in this process (`SerialPool`) or as plain Ray tasks on a cluster (`RayPool`).

A pool never holds more jobs than `capacity` says; the loop asks, submits, and polls for what happened.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from results.records import Failure, Outcome
from workers.data import DataSet, load_dataset
from workers.distributed import task_options
from workers.evaluate import Job, evaluate, import_for, poisons_device
from workers.resources import NODE, NODE_SHARE, Resources

LONG_WAIT_S = 5.0
"""After which the user is told what a trial waits for: its process starts within it."""


class PoolError(ValueError):
    """The workers, or the data they share, cannot be had: the message says what is missing and what to do."""


@dataclass(frozen=True)
class Finished:
    """A job has ended, one way or the other."""

    trial: int
    outcome: Outcome


@dataclass(frozen=True)
class Reported:
    """A running job has sent a point of a curve."""

    trial: int
    name: str
    value: float
    step: int


Event = Finished | Reported


class Pool(Protocol):
    """Runs jobs; every job submitted is reported `Finished` exactly once."""

    def check(self, resources: Resources) -> None:
        """Raise PoolError if no trial that takes these resources could run."""
        ...

    def capacity(self, resources: Resources) -> int:
        """How many jobs that take these resources may be in flight now; changes as nodes come and go."""
        ...

    def submit(self, job: Job) -> None: ...

    def poll(self, timeout_s: float) -> list[Event]:
        """What happened since the last call, waiting up to `timeout_s` for something to happen."""
        ...

    def awaits(self) -> str:
        """What has to happen before any job in flight can start; empty once one runs, and where there is none."""
        ...

    def close(self) -> None: ...


class SerialPool:
    """Runs one job at a time in this process. It cannot end a job that hangs, so time limits do not apply."""

    def __init__(self) -> None:
        self._queue: deque[Job] = deque()

    def check(self, resources: Resources) -> None: ...

    def capacity(self, resources: Resources) -> int:
        return 1

    def submit(self, job: Job) -> None:
        self._queue.append(job)

    def poll(self, timeout_s: float) -> list[Event]:
        if not self._queue:
            return []
        job = self._queue.popleft()
        events: list[Event] = []
        outcome = evaluate(job, lambda name, value, step: events.append(Reported(job.trial, name, value, step)))
        return [*events, Finished(job.trial, outcome)]

    def awaits(self) -> str:
        return ""

    def close(self) -> None:
        self._queue.clear()


@dataclass
class _Flight:
    job: Job
    num_losses: int = 0
    started_at: float | None = None
    timed_out: bool = False
    waits_since: float = field(default_factory=time.monotonic)
    gave_up_waiting: bool = False


@dataclass(kw_only=True)
class RayPool:
    """Runs jobs as Ray tasks, as many at a time as the cluster holds.

    A job's task takes the job's resources. With several processes, each process takes them. The task only coordinates and takes nothing:
    the processes would wait for what it holds.

    `address` is Ray's: "local" starts a cluster of this machine's cores for this process alone, "auto" joins the running
    one. Ray retries nothing (`max_retries=0`); a job whose worker or node died is resubmitted here, into the same
    workdir, at most `max_losses` times. `max_workers` caps the jobs in flight; a cluster that grows on demand is asked for room for that
    many.

    Nodes declare the custom resource `vitscale_node: 1`; a local cluster does. A job that wants a whole node takes all of it and any other
    job a share, whichever driver of the cluster sends them, so each of the first kind runs alone. One that has waited its `wait_s` runs
    beside the others. Where no node that a job fits on declares the resource, none of it is taken; where some do, the job goes to those.

    The data set of the jobs that need one is decoded by one task per image size and shared through the object store: on each
    node all workers read the same memory. Ray decodes it again when its node is lost.
    """

    address: str
    max_workers: int | None = None
    max_losses: int = 3
    _flights: dict[Any, _Flight] = field(default_factory=dict)
    _datasets: dict[tuple[str, int], Any] = field(default_factory=dict)
    _capacities: dict[Resources, tuple[float, int]] = field(default_factory=dict)
    _has_started: bool = False

    def __post_init__(self) -> None:
        self._owns_cluster = self.address == "local"
        _prepare_environment(self.address)
        import ray

        if not ray.is_initialized():
            _connect(self.address)
        self._mailbox: Any = ray.remote(num_cpus=0)(_Mailbox).options(scheduling_strategy=_on_this_node(), max_restarts=-1).remote()
        self._remote: Any = ray.remote(max_retries=0, max_calls=0)(_run_job)
        # Takes no CPU: with every core given to jobs it could never start, and they wait for it.
        self._load: Any = ray.remote(num_cpus=0)(_load_dataset)

    def check(self, resources: Resources) -> None:
        if self.capacity(resources):
            return
        if resources.processes > 1:
            raise PoolError(f"the cluster lacks the {resources} that one trial needs; nodes: {_describe_nodes()}")
        raise PoolError(f"no node of the cluster has the {resources} that one trial needs; nodes: {_describe_nodes()}")

    def capacity(self, resources: Resources) -> int:
        read_at, capacity = self._capacities.get(resources, (float("-inf"), 0))
        if time.monotonic() - read_at > 2.0:
            capacity = sum(_num_fitting(node, resources) for node in _nodes_for(resources)) // resources.processes
            if self.max_workers is not None:
                # A second job for the same whole node would wait for the first, and not for others.
                may_grow = not self._owns_cluster and not resources.whole_node
                capacity = self.max_workers if may_grow else min(capacity, self.max_workers)
            self._capacities[resources] = time.monotonic(), capacity
        return capacity

    def submit(self, job: Job) -> None:
        self._fly(_Flight(job))

    def _fly(self, flight: _Flight) -> None:
        flight.started_at = None
        flight.waits_since = time.monotonic()
        wants = flight.job.resources
        is_declared = any(NODE in node for node in _nodes_for(wants))
        share = 1.0 if wants.whole_node and not flight.gave_up_waiting else NODE_SHARE
        resources = replace(wants, node_share=share if is_declared else 0.0)
        takes = {"num_cpus": 0, "num_gpus": 0} if resources.processes > 1 else task_options(resources)
        job = replace(flight.job, resources=resources)
        self._flights[self._remote.options(**takes).remote(job, self._mailbox, self._dataset(job))] = flight

    def _dataset(self, job: Job) -> Any:
        """A reference to the data set: Ray starts the task when the set is loaded. None for a job that needs no data set."""
        if not job.needs_dataset:
            return None
        source = job.data, job.candidate.model.img_size
        if source not in self._datasets:
            self._datasets[source] = self._load.remote(*source, job.data_cache)
        return self._datasets[source]

    def _check_dataset(self, job: Job) -> None:
        """Raise PoolError if the data set could not be loaded for a reason that no other job would escape."""
        import ray
        from ray.exceptions import RayTaskError

        dataset = self._dataset(job)
        if dataset is None or not ray.wait([dataset], timeout=0)[0]:
            return
        try:
            ray.get(dataset)
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise PoolError(str(error.cause)) from error

    def poll(self, timeout_s: float) -> list[Event]:
        import ray

        if not self._flights:
            return []
        ready, _ = ray.wait(list(self._flights), num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(list(self._flights), num_returns=len(self._flights), timeout=0)
        events = self._read_mailbox()
        for ref in ready:
            if ref in self._flights:
                events += self._land(ref, self._flights.pop(ref))
        self._cancel_overdue()
        self._end_waiting()
        return events

    def _land(self, ref: Any, flight: _Flight) -> list[Event]:
        import ray
        from ray.exceptions import ObjectLostError, OutOfMemoryError, RayError, RayTaskError, TaskCancelledError

        trial = flight.job.trial
        try:
            return [Finished(trial, ray.get(ref))]
        except OutOfMemoryError as error:
            return [Finished(trial, Failure(kind="out_of_memory", message=_first_line(error), traceback=str(error)))]
        except RayTaskError as error:
            self._check_dataset(flight.job)
            return [Finished(trial, Failure(kind="error", message=_first_line(error.cause), traceback=str(error)))]
        except RayError as error:
            if flight.timed_out:
                message = f"not finished after its time limit of {flight.job.time_limit_s:g} s"
                return [Finished(trial, Failure(kind="timeout", message=message))]
            if flight.gave_up_waiting and isinstance(error, TaskCancelledError):
                self._fly(flight)
                return []
            if isinstance(error, ObjectLostError):
                self._datasets.clear()
            flight.num_losses += 1
            if flight.num_losses > self.max_losses:
                message = f"its worker or node died {flight.num_losses} times; last: {type(error).__name__}"
                return [Finished(trial, Failure(kind="lost", message=message, traceback=str(error)))]
            self._fly(flight)
            return []

    def _read_mailbox(self) -> list[Event]:
        import ray
        from ray.exceptions import RayActorError

        by_trial = {flight.job.trial: (ref, flight) for ref, flight in self._flights.items()}
        events: list[Event] = []
        try:
            letters = ray.get(self._mailbox.take.remote())
        except RayActorError:
            # Its process was killed and Ray starts another. The starting times are lost with it; time limits must still hold.
            letters = [("started", flight.job.trial) for flight in self._flights.values() if flight.started_at is None]
        for kind, trial, *rest in letters:
            if trial not in by_trial:
                continue
            ref, flight = by_trial[trial]
            if kind == "started":
                flight.started_at = time.monotonic()
                self._has_started = True
            elif kind == "reported":
                events.append(Reported(trial, *rest))
            else:
                self._flights.pop(ref)
                events.append(Finished(trial, rest[0]))
        return events

    def _cancel_overdue(self) -> None:
        import ray

        for ref, flight in self._flights.items():
            limit = flight.job.time_limit_s
            if limit and flight.started_at and not flight.timed_out and time.monotonic() - flight.started_at > limit:
                flight.timed_out = True
                ray.cancel(ref, force=True)

    def _end_waiting(self) -> None:
        """Let a job that has waited long enough for a whole node run beside the others."""
        import ray

        now = time.monotonic()
        # Jobs of this study that want the same wait for each other in turn, and only the first in line for those of other studies.
        ahead = {flight.job.resources for flight in self._flights.values() if flight.started_at is not None}
        for ref, flight in self._flights.items():
            resources = flight.job.resources
            if not resources.whole_node or flight.started_at is not None or flight.gave_up_waiting:
                continue
            if resources in ahead:
                flight.waits_since = now
            elif now - flight.waits_since > resources.wait_s:
                flight.gave_up_waiting = True
                ray.cancel(ref, force=True)
            ahead.add(resources)

    def awaits(self) -> str:
        import ray

        if not self._flights or any(flight.started_at is not None for flight in self._flights.values()):
            return ""
        datasets = list(self._datasets.values())
        if datasets and ray.wait(datasets, num_returns=len(datasets), timeout=0)[1]:
            return "the data"
        now, flights = time.monotonic(), self._flights.values()
        if self._has_started and any(flight.job.resources.whole_node and now - flight.waits_since > LONG_WAIT_S for flight in flights):
            return "a node to be free of other trials"
        return "" if self._has_started else "workers to start"

    def close(self) -> None:
        import ray

        for ref in self._flights:
            ray.cancel(ref, force=True)
        self._flights.clear()
        if self._owns_cluster:
            ray.shutdown()
        else:
            ray.kill(self._mailbox)


class _Mailbox:
    """Carries what running jobs say to the driver, in order."""

    def __init__(self) -> None:
        self._letters: list[tuple[Any, ...]] = []

    def put(self, *letter: Any) -> None:
        self._letters.append(letter)

    def take(self) -> list[tuple[Any, ...]]:
        letters, self._letters = self._letters, []
        return letters


def _load_dataset(source: str, img_size: int, cache: Path | None) -> DataSet:
    return load_dataset(source, img_size=img_size, cache=cache)


def _run_job(job: Job, mailbox: Any, dataset: DataSet | None) -> Outcome:
    # A fresh process takes seconds to import what its first job needs, which no time limit should count.
    import_for(job)
    mailbox.put.remote("started", job.trial)
    report: Callable[[str, float, int], None] = lambda name, value, step: mailbox.put.remote("reported", job.trial, name, value, step)  # noqa: E731
    outcome = evaluate(job, report, dataset)
    if poisons_device(outcome):
        import ray

        # The next job must not get this process, so it sends the outcome ahead and then ends itself.
        ray.get(mailbox.put.remote("finished", job.trial, outcome))
        os._exit(1)
    return outcome


def _prepare_environment(address: str) -> None:
    """Set what Ray reads once, when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Left alone, Ray writes a token for its local cluster into the home folder, and from then on every `ray start` of
    # the user demands it. A token in the environment protects this cluster and ends with it.
    if address == "local" and "RAY_AUTH_TOKEN" not in os.environ and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _connect(address: str) -> None:
    import logging

    import ray

    terminate = signal.getsignal(signal.SIGTERM)
    is_local = address == "local"
    try:
        ray.init(
            address=address,
            resources={NODE: 1} if is_local else None,
            include_dashboard=False if is_local else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        raise PoolError(f"Ray at {address!r} cannot be reached: {_first_line(error)}") from error
    # Ray replaces the caller's handler by one that exits on the spot, with trials in flight and runs open.
    signal.signal(signal.SIGTERM, terminate)


def _on_this_node() -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _alive_nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _nodes_for(resources: Resources) -> list[dict[str, float]]:
    """The nodes with room for a process of such a trial; those that declare `NODE` alone, where any of them does."""
    fitting = [node for node in _alive_nodes() if _num_fitting(node, resources)]
    return [node for node in fitting if NODE in node] or fitting


def _num_fitting(node: Mapping[str, float], resources: Resources) -> int:
    """Processes that a node has room for; those of one trial may be on several nodes."""
    if resources.accelerator_type and f"accelerator_type:{resources.accelerator_type}" not in node:
        return 0
    needs = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory_mb * 2**20}
    fitting = int(min((node.get(name, 0) / need for name, need in needs.items() if need), default=node.get("CPU", 0)))
    return min(fitting, 1) if resources.whole_node else fitting


def _describe_nodes() -> str:
    def describe(node: Mapping[str, float]) -> str:
        accelerators = [name.partition(":")[2] for name in node if name.startswith("accelerator_type:")]
        kind = f" ({', '.join(accelerators)})" if accelerators else ""
        return f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU{kind}, {node.get('memory', 0) / 2**20:.0f} MB"

    return "; ".join(map(describe, _alive_nodes()))


def _first_line(error: object) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:500]

"""What a trial takes of the cluster, as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from space.registry import SpecError, unknown_name

if TYPE_CHECKING:
    from workers.evaluator import Call


RESOURCES = "resources"
"""The name under which a candidate's settings hold changes to what its trial takes."""

NODE = "vitscale_node"
"""The custom resource of Ray, 1 on every node, of which a trial that wants its node alone takes all and any other trial a share."""
NODE_SHARE = 0.001
"""What an ordinary trial takes of it: any one keeps off a trial that wants all, and a thousand of them fit."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What each of a trial's `processes` takes: CPUs, GPUs (a part of one is allowed), memory in MB of 2^20 bytes.

    `accelerator_type` is a GPU as Ray names it, such as "H100"; empty allows any. A trial with `whole_node` waits until no other trial of
    any study runs on its node, at most `wait_s` seconds, and then runs beside them. `node_share` is what the pool gives it of `NODE`.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory_mb: int = 0
    processes: int = 1
    accelerator_type: str = ""
    whole_node: bool = False
    wait_s: float = 600.0
    node_share: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("cpus", 0), ("gpus", 0), ("memory_mb", 0), ("processes", 1), ("wait_s", 0), ("node_share", 0)):
            value = getattr(self, name)
            kinds = int if name in ("memory_mb", "processes") else int | float
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < float("inf"):
                raise SpecError(f"resources: {name} is {value!r}; allowed: {'whole ' if kinds is int else ''}numbers from {least}")
        if self.processes > 1 and 0 < self.gpus < 1:
            raise SpecError(f"resources: {self.processes} processes need a GPU each to exchange gradients; gpus is {self.gpus:g}")
        if not isinstance(self.accelerator_type, str):
            raise SpecError(f"resources: accelerator_type is {self.accelerator_type!r}; the name of a GPU is expected, such as 'H100'")

    def changed(self, changes: Mapping[str, Any]) -> Resources:
        """The same but for `changes`; raises SpecError for a field that does not exist or a value that is not allowed."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise unknown_name("field", name, known, "resources")
        return dataclasses.replace(self, **changes)

    @property
    def device(self) -> str:
        """The torch device that the trial computes on."""
        return "cuda" if self.gpus > 0 else "cpu"

    @property
    def is_alone(self) -> bool:
        """Whether the scheduler keeps other trials off the node."""
        return self.node_share == 1

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU", f"{self.gpus:g} GPU", f"{self.memory_mb} MB of memory"]
        parts += [f"an accelerator {self.accelerator_type}"] if self.accelerator_type else []
        each = f"{', '.join(parts[:-1])} and {parts[-1]}"
        return each if self.processes == 1 else f"{self.processes} times {each}"


def resources_of(calls: Iterable[Call], *, gpus: float = 0.0, processes: int = 1) -> Resources:
    """What a trial takes that makes these calls: the largest need of each kind.

    `gpus` and `processes` are the user's, and serve the evaluators that can use them: a trial of free evaluators takes no GPU, and
    one whose evaluators all compute in one process takes one process. A trial that measures nothing but time takes a whole node.
    """
    evaluators = [call.evaluator for call in calls]
    computing = [evaluator for evaluator in evaluators if not evaluator.is_free]
    return Resources(
        cpus=max((evaluator.cpus for evaluator in evaluators), default=1.0),
        gpus=max(gpus if computing else 0.0, *(evaluator.gpus for evaluator in evaluators), 0.0),
        memory_mb=max((evaluator.memory_mb for evaluator in evaluators), default=0),
        processes=processes if any(evaluator.uses_processes for evaluator in evaluators) else 1,
        whole_node=bool(computing) and all(evaluator.measures_time for evaluator in computing),
    )

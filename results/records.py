"""What a trial leaves behind: a `Measurement` or a `Failure`, both values with a JSON form."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Goal = Literal["minimize", "maximize"]
FailureKind = Literal["illegal", "error", "out_of_memory", "timeout", "non_finite", "rank_deficient", "lost", "unavailable"]

DETERMINISTIC_FAILURES: frozenset[str] = frozenset({"illegal", "error", "non_finite", "rank_deficient"})
"""Failures that the same candidate would meet again; an equal candidate is told the same without being run."""


UNITS = {
    "_pct": "%",
    "_auc": "%",
    "_nll": "nats",
    "_ms": "ms",
    "_img_s": "images/s",
    "_s": "s",
    "_mb": "MB",
    "_params_m": "millions",
    "_gmacs": "GMAC",
}
"""The unit of a metric by the ending of its name; the first ending that fits counts. An `_auc` is the mean accuracy over a curve."""


@dataclass(frozen=True)
class Metric:
    """A measured quantity: `goal` says which way is better.

    A `unit` that is not given follows from the name, and is "" if the name states none.
    """

    name: str
    goal: Goal
    summary: str = ""
    unit: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", self.unit or _unit_of(self.name))

    def to_json(self) -> dict[str, str]:
        """The arguments that make this metric again, without a unit that the name states: registered designs are named by this JSON."""
        stated = {} if self.unit == _unit_of(self.name) else {"unit": self.unit}
        return {"name": self.name, "goal": self.goal, "summary": self.summary, **stated}


COST_METRICS = ("gmacs", "params_m", "depth")
"""What a network costs, in the order that every view shows it."""


def stderr_name(metric: str) -> str:
    """The name under which an evaluator reports the standard error of a metric."""
    return f"{metric}_stderr"


def _unit_of(name: str) -> str:
    return next((unit for ending, unit in UNITS.items() if f"_{name}".endswith(ending)), "")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The metrics of one candidate and the circumstances they were measured under."""

    values: Mapping[str, float]
    elapsed_s: float
    device: str
    versions: Mapping[str, str]
    seed: int
    num_threads: int = 1
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a candidate has no measurement: a kind, one line, and the traceback where there is one."""

    kind: FailureKind
    message: str
    traceback: str = ""
    elapsed_s: float = field(default=0.0, compare=False)


Outcome = Measurement | Failure


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    return {"outcome": type(outcome).__name__, **asdict(outcome)}


def outcome_from_json(data: Mapping[str, Any]) -> Outcome:
    fields = {key: value for key, value in data.items() if key != "outcome"}
    if data["outcome"] == "Failure":
        return Failure(**fields)
    return Measurement(**{**fields, "warnings": tuple(fields.get("warnings", ()))})


def write_json_atomically(path: Path, data: Any) -> None:
    """Write `data` so that a crash at any moment leaves either the old file or the new one, whole."""
    write_bytes_atomically(path, json.dumps(data, indent=1).encode())


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that a crash at any moment leaves either the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with unfinished.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)

"""The contract of an evaluator: a plain function from a model to metrics, with its needs declared beside it.

    @evaluator("as_vit", metrics=(Metric("length_distortion", "maximize"), ...), settings=AsVitSettings)
    def as_vit(model: Model, context: Context, settings: AsVitSettings) -> Mapping[str, float]: ...

It may raise `EvaluationError` with a failure kind; anything else it raises is recorded as `error` with its traceback.
Equal calls give equal bits: it may depend on nothing but the model, the settings, the data, the seed and the number
of threads. An evaluator that measures time cannot promise that and declares `is_deterministic=False`; its measurements are never reused for
an equal candidate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, get_origin, get_type_hints

from results.records import FailureKind, Metric, stderr_name
from space.model import Model
from space.recipe import Recipe
from space.registry import Registry, SpecError, unknown_name
from space.spec import digest_of
from space.values import parse_value
from space.weights import Weights
from workers.resources import Resources

if TYPE_CHECKING:
    from workers.data import DataSet

ARTIFACTS = "artifacts"
"""The folder of a trial's work directory whose files go to MLflow."""

PROGRESS = "progress"
"""A report of this name is not a curve but the share of the trial that is done, from 0 to 1."""


class EvaluationError(Exception):
    """A candidate that cannot be measured, for a reason the evaluator knows."""

    def __init__(self, kind: FailureKind, message: str):
        super().__init__(message)
        self.kind: FailureKind = kind


def failure_kind(error: Exception) -> FailureKind:
    """What kind of failure a trial that ends with this exception is."""
    if isinstance(error, EvaluationError):
        return error.kind
    if isinstance(error, SpecError):
        return "illegal"
    # torch raises a bare RuntimeError when the host allocator fails, torch.OutOfMemoryError when the device's does.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return "out_of_memory"
    return "error"


class Report(Protocol):
    """Receives points of a curve while an evaluator runs."""

    def __call__(self, name: str, value: float, step: int) -> None: ...


def report_nothing(name: str, value: float, step: int) -> None:
    """The report of a caller that does not listen."""


@dataclass(frozen=True, kw_only=True)
class EarlierTrial:
    """A complete trial of an earlier phase: its number there, its files, the key and seed of its measurement, and what was measured."""

    number: int
    workdir: Path
    key: str
    values: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an evaluator may use beside the model.

    `data` names the images; `dataset` holds all of them for an evaluator that declares `needs_dataset`. `workdir` outlives a lost
    worker; what an evaluator leaves in its folder `artifacts` goes to MLflow with the trial. The network starts from `weights`, or from
    fresh ones if there are none; `workers.weights.load_weights` reads them. `earlier` holds the trials of earlier
    phases that the phase needs, best first; `continues` is the work directory of an earlier trial of the same training, to go on
    from. With `processes` above 1 the evaluator coordinates that many processes, each on a `device` of its own, and computes nothing
    itself.
    """

    seed: int
    data: str = "digits"
    dataset: DataSet | None = None
    recipe: Recipe | None = None
    weights: Weights | None = None
    earlier: Mapping[str, tuple[EarlierTrial, ...]] = field(default_factory=dict)
    continues: Path | None = None
    device: str = "cpu"
    resources: Resources = field(default_factory=Resources)
    workdir: Path = Path(".")
    report: Report = report_nothing
    warn: Callable[[str], None] = lambda message: None

    @property
    def processes(self) -> int:
        return self.resources.processes

    def best(self, phase: str) -> EarlierTrial:
        """The best trial of an earlier phase; raises SpecError if the phase of this trial does not need that one."""
        if phase not in self.earlier:
            raise unknown_name("earlier phase", phase, self.earlier, "what this phase needs")
        return self.earlier[phase][0]


@dataclass(frozen=True)
class NoSettings:
    """The settings of an evaluator that has none."""


Function = Callable[[Model, Context, Any], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """A registered function with what it measures and what it needs.

    `is_free` marks one that costs microseconds and needs no image: a study of free evaluators alone needs no cluster. `subject` says which
    network of a candidate it looks at: the real one that is reported, or the proxy that is scored in its place. `needs_dataset` asks for
    the whole labelled set, which workers share; `uses_data` alone means that the evaluator loads a sample itself. An evaluator that
    `uses_processes` spreads its work over the processes of the trial (`workers.distributed.on_devices`); any other runs in one of them.
    `weights` says what it does with those that a candidate starts from: one that ignores them looks at the architecture alone, and one
    that needs them takes their classifier too. Two trials that differ in nothing but the setting named by `continued_by` are one
    training, stopped at different points: the later may go on from the files of the earlier. One that `measures_time` wants its node
    alone: a trial of such evaluators takes a whole node. `check(model, recipe, settings)` is called
    before anything is measured, and raises SpecError for what the evaluator could never measure.
    """

    name: str
    function: Function
    metrics: tuple[Metric, ...]
    settings: type = NoSettings
    check: Callable[[Model, Recipe | None, Any], None] = lambda model, recipe, settings: None
    subject: Literal["model", "proxy"] = "model"
    is_free: bool = False
    uses_data: bool = False
    needs_dataset: bool = False
    uses_processes: bool = False
    weights: Literal["ignored", "optional", "needed"] = "ignored"
    continued_by: str = ""
    is_deterministic: bool = True
    measures_time: bool = False
    cpus: float = 1.0
    gpus: float = 0.0
    memory_mb: int = 1000

    def parse_settings(self, assignments: Mapping[str, str]) -> Any:
        """Settings from `{field: text}`; raises SpecError naming the field and what is allowed."""
        hints = get_type_hints(self.settings)
        values: dict[str, Any] = {}
        for name, text in assignments.items():
            if name not in hints:
                raise unknown_name("setting", name, hints, f"evaluator {self.name!r}")
            values[name] = parse_value(text, hints[name], f"{self.name}.{name}")
        try:
            return self.settings(**values)
        except ValueError as error:
            raise SpecError(f"evaluator {self.name!r}: {error}") from error


evaluators: Registry[Evaluator] = Registry("evaluator", package="workers.evaluators", renamed={"short_train": "train"})


def scores() -> dict[str, str]:
    """Every score of an untrained network, and every count of a network, by the name of its metric: the evaluator that measures it."""
    found: dict[str, str] = {}
    for name in evaluators.names():
        declared = evaluators.get(name)
        if declared.subject == "proxy" or declared.is_free:
            metrics = {metric.name for metric in declared.metrics}
            found |= dict.fromkeys(metrics - {stderr_name(metric) for metric in metrics}, name)
    return found


def by_todays_names(settings: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, dict[str, Any]]:
    """`{evaluator: {setting: value}}` with the evaluators' present names; raises SpecError for a setting that two names of one give."""
    merged: dict[str, dict[str, Any]] = {}
    for name, chosen in settings.items():
        together = merged.setdefault(evaluators.todays_name(name), {})
        if twice := sorted(together.keys() & chosen.keys()):
            raise SpecError(f"{where}: {evaluators.todays_name(name)}.{twice[0]} is given twice, under the evaluator's old and new name")
        together.update(chosen)
    return merged


def evaluator(name: str, **declared: Any) -> Callable[[Function], Function]:
    """Register a function as the evaluator `name`; keywords are the fields of `Evaluator`."""

    def register(function: Function) -> Function:
        evaluators.add((name,), Evaluator(name=name, function=function, **declared))
        return function

    return register


@dataclass(frozen=True)
class Call:
    """An evaluator by name with its settings: what a phase lists and a measurement's identity holds."""

    name: str
    settings: Any = field(default_factory=NoSettings)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", evaluators.todays_name(self.name))

    @property
    def evaluator(self) -> Evaluator:
        return evaluators.get(self.name)

    def to_json(self) -> dict[str, Any]:
        """The name and the settings, without those that change no number: `field(metadata={"changes_numbers": False})`.

        A setting that was added after the first measurements, `field(metadata={"added_later": True})`, is included only if it differs from
        its default: earlier measurements keep their keys.
        """
        values = {
            each.name: getattr(self.settings, each.name) for each in dataclasses.fields(self.settings) if _is_told(each, self.settings)
        }
        return {"name": evaluators.stored_name(self.name), "settings": values}

    @property
    def digest(self) -> str:
        return digest_of(self.to_json())

    def check(self, model: Model, recipe: Recipe | None, weights: Weights | None) -> None:
        """Raise SpecError for what the evaluator could never measure; called before any work."""
        self.evaluator.check(model, recipe, self.settings)
        if self.evaluator.weights == "needed" and weights is None:
            raise SpecError(f"{self.name} needs --weights: a network with fresh weights knows nothing")
        if self.evaluator.weights == "needed" and weights is not None and not weights.has_classifier:
            raise SpecError(f"{self.name} needs a classifier for {model.num_classes} classes, and {weights.path.name} has none")

    def changed(self, settings: Mapping[str, Any]) -> Call:
        """The same call with some settings of a trial's own; raises SpecError for one that does not exist or is not allowed."""
        if not settings:
            return self
        where, hints = f"settings of evaluator {self.name!r}", get_type_hints(type(self.settings))
        for name, value in settings.items():
            if name not in hints:
                raise unknown_name("setting", name, hints, where)
            if not _is_of_type(value, hints[name]):
                raise SpecError(f"{where}: {name} is {value!r}; {_type_name(hints[name])} is expected")
        # A whole number given for a float is the same measurement.
        typed = {name: float(value) if hints[name] is float else value for name, value in settings.items()}
        try:
            return Call(self.name, dataclasses.replace(self.settings, **typed))
        except ValueError as error:
            raise SpecError(f"{where}: {error}") from error


def _is_told(field: dataclasses.Field[Any], settings: Any) -> bool:
    """Whether a setting stands in the identity of a call."""
    if field.metadata.get("added_later") and getattr(settings, field.name) == field.default:
        return False
    return field.metadata.get("changes_numbers", True)


def _is_of_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    return type(value) is hint or (hint is float and type(value) is int)


def _type_name(hint: Any) -> str:
    return f"one of {', '.join(map(str, get_args(hint)))}" if get_origin(hint) is Literal else hint.__name__

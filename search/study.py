"""What a study is: phases over search spaces, each one Optuna study, and the run-level settings they are made with."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from results.answers import Question
from results.paths import RunPaths
from results.records import Metric
from search.budget import UNLIMITED, Budget
from search.named_models import named_model
from search.strategy import Problem, Proposer, strategies
from space.model import Model
from space.recipe import Recipe
from space.registry import Registry, SpecError, unknown_name
from space.search_space import Candidate, SearchSpace
from space.weights import Weights
from workers.evaluator import Call, by_todays_names, evaluators, scores
from workers.resources import Resources, resources_of

if TYPE_CHECKING:
    import optuna

    from results.effects.design import Design

FITTED = 2
"""The defaults of studies whose networks have the classes of their data; those before are 1."""

CONVERGING = 3
"""The defaults of ablations whose trainings on digits are long enough to converge."""

REPLACING = 4
"""The defaults of studies whose own scores are not measured where the user's objectives replace them."""

SETTINGS_ATTRIBUTE = "settings"
IDENTITY_ATTRIBUTE = "study_id"
DEFAULT_DATA = "digits"
RESULT_ATTRIBUTE = "result"
DESIGNS_ATTRIBUTE = "designs"


class PhaseStopped(RuntimeError):
    """The phase cannot go on by itself; the message says why. What was measured is kept."""


class SettingsError(ValueError):
    """A run-level setting that cannot work, or that differs from what the study was created with."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What changes from run to run. None leaves the choice to the study.

    `img_size` is that of the reported networks and `proxy_img_size` that at which they are scored, both in pixels.
    `evaluator_settings` holds `--set evaluator.field=text` as `{evaluator: {field: text}}`.
    `num_classes` is that of the networks; `search.preparation` takes it from the data where nobody says it. `defaults` numbers the
    defaults of the time when the study was created, which it keeps. `budget` is what the reported networks may cost. `gpus` are those
    of each of a trial's `processes`. `weights` is a file that the network named by the user starts from, or a folder of such files.
    `evaluators` are measured beside the study's own, and `objectives` stand in the place of its own; both are names, or a text of names
    separated by commas. `options` are the study's own flags, an instance of its class of them.
    """

    study: str
    runs: Path
    name: str | None = None
    num_trials: int | None = None
    seed: int = 0
    img_size: int | None = None
    proxy_img_size: int | None = None
    num_classes: int | None = None
    defaults: int = REPLACING
    data: str = DEFAULT_DATA
    weights: Path | None = None
    budget: Budget = UNLIMITED
    strategy: str | None = None
    evaluators: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()
    evaluator_settings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    gpus: float = 0.0
    processes: int = 1
    time_limit_s: float | None = None
    storage: str | None = None
    tracking_uri: str | None = None
    options: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "evaluator_settings", by_todays_names(self.evaluator_settings, "--set"))
        object.__setattr__(self, "evaluators", tuple(map(evaluators.todays_name, _names(self.evaluators, "--evaluators"))))
        object.__setattr__(self, "objectives", _names(self.objectives, "--objectives"))

    @property
    def study_name(self) -> str:
        return self.name or self.study

    def num_classes_or(self, own: int) -> int:
        """The classes of the networks of a study that has `own` where nothing says otherwise, and had always before `FITTED`."""
        return self.num_classes or own if self.defaults >= FITTED else own

    def model(self, text: str) -> Model:
        """The model that a flag names, with its own image size and classes; raises SpecError for what names none."""
        return named_model(text, self.tracking_uri or RunPaths(self.runs).mlflow_uri)

    def weights_for(self, model: Model, name: str) -> Weights | None:
        """What the network that the user calls `name` starts from; raises ValueError for a file that is not of this network."""
        if self.weights is None:
            return None
        from workers.weights import weights_from  # imports torch, which listing studies should not

        return weights_from(Path(self.weights).expanduser(), model, name)

    def call(self, evaluator: str) -> Call:
        """The evaluator with this run's settings for it; raises SpecError for a setting it does not have."""
        evaluator = evaluators.todays_name(evaluator)
        return Call(evaluator, evaluators.get(evaluator).parse_settings(self.evaluator_settings.get(evaluator, {})))

    def calls(self, *own: str) -> tuple[Call, ...]:
        """A study's own evaluators, then those that the user adds, each with this run's settings for it.

        A score that is an objective brings its evaluator along, so that `--objectives nsc` says enough. It stands in the place of the
        study's own scores: one of those that takes time and is no objective is not measured.
        """
        names = list(dict.fromkeys([*own, *self.evaluators]))
        measured = {metric.name for name in names for metric in evaluators.get(name).metrics}
        if missing := [metric for metric in self.objectives if metric not in measured]:
            known = scores()
            names += dict.fromkeys(known[metric] for metric in missing if metric in known)
            if not known.keys() >= set(missing):
                # The phase refuses the objective, and names what it could be.
                return tuple(map(self.call, names))
        if self.objectives and self.defaults >= REPLACING:
            names = [name for name in names if name in self.evaluators or not self._is_replaced(name)]
        return tuple(map(self.call, names))

    def _is_replaced(self, evaluator: str) -> bool:
        declared = evaluators.get(evaluator)
        is_objective = any(metric.name in self.objectives for metric in declared.metrics)
        return declared.subject == "proxy" and not declared.is_free and not is_objective


def _names(given: str | Sequence[str], flag: str) -> tuple[str, ...]:
    """The names in a text or a sequence; raises SettingsError for one that is empty or stands there twice."""
    names = tuple(name.strip() for name in (given.split(",") if isinstance(given, str) else given))
    if "" in names or len(set(names)) < len(names):
        raise SettingsError(f"{flag} {','.join(names)!r}: different names are expected, separated by commas")
    return names


@dataclass(frozen=True)
class Need:
    """What the trials of a phase are given of an earlier one: its best trial, by the first objective, or all that are complete."""

    phase: str
    which: Literal["best", "all"] = "best"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One Optuna study: a space, what is measured, what counts, and what decides what to try next.

    Either a `strategy` proposes `num_trials` trials one by one, or `propose` makes a proposer that works in rounds and
    ends by itself, from what the earlier phases found. `needs` says which trials of earlier phases the evaluators are given.
    `resources` are what each trial takes; None takes what the evaluators declare, with the user's GPUs and processes for those that
    can use them. `trials_also_take` are the changes to them that trials have of their own. `plan` says what a proposer will do, and its
    limits. Where `failures_are_data`, a network that cannot be measured is a result like any other, and many of them in a row do not stop
    the phase.
    """

    name: str
    space: SearchSpace
    evaluators: tuple[Call, ...]
    objectives: tuple[str, ...]
    budget: Budget = UNLIMITED
    strategy: str | None = None
    num_trials: int | None = None
    propose: Callable[[Mapping[str, optuna.Study]], Proposer] | None = None
    needs: tuple[Need, ...] = ()
    resources: Resources | None = None
    trials_also_take: tuple[Mapping[str, Any], ...] = ()
    plan: str = ""
    failures_are_data: bool = False

    def __post_init__(self) -> None:
        if (self.strategy is None) == (self.propose is None):
            raise SpecError(f"phase {self.name!r} needs either a strategy or a proposer")
        if (self.strategy is None) != (self.num_trials is None):
            raise SpecError(f"phase {self.name!r}: a strategy needs num_trials, a proposer ends by itself")
        self._refuse_one_name_for_two_values()
        for name in self.objectives:
            if name.startswith("test_"):
                raise SpecError(
                    f"objective {name}: test images are for what is reported, and a selection that looks at them makes that too good; "
                    f"take val_{name.removeprefix('test_')}"
                )
            if name not in self.metrics:
                measuring = ", ".join(call.name for call in self.evaluators)
                raise unknown_name("objective", name, self.metrics, f"phase {self.name!r}, which measures by {measuring}")

    def _refuse_one_name_for_two_values(self) -> None:
        for one, other in itertools.combinations(self.evaluators, 2):
            measured = {metric.name: metric for metric in one.evaluator.metrics}
            shared = [metric for metric in other.evaluator.metrics if metric.name in measured]
            # What a free evaluator counts is exact, and another may state it too: parameters are parameters.
            is_exact = one.evaluator.is_free != other.evaluator.is_free
            clashes = [metric.name for metric in shared if not is_exact or measured[metric.name] != metric]
            if clashes:
                raise SpecError(
                    f"phase {self.name!r}: {', '.join(clashes)} would be measured twice, by {one.to_json()} and by {other.to_json()}, and "
                    "one would overwrite the other. Measure one of them in a phase of its own, or make its setting an axis of the space"
                )

    def trial_resources(self, run: RunSettings) -> Resources:
        """What each trial takes, when the user asks for `run`'s GPUs and processes."""
        return self.resources or resources_of(self.evaluators, gpus=run.gpus, processes=run.processes)

    def all_resources(self, run: RunSettings) -> tuple[Resources, ...]:
        """Everything that some trial takes, as far as that is known before the first."""
        common = self.trial_resources(run)
        return (common, *dict.fromkeys(common.changed(changes) for changes in self.trials_also_take))

    @cached_property
    def example(self) -> Candidate:
        """The candidate at the first point of the space."""
        return self.space.decode(self.space.first_point())

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        return {metric.name: metric for call in self.evaluators for metric in call.evaluator.metrics}

    @property
    def goals(self) -> tuple[Metric, ...]:
        """The objectives with the direction that is better."""
        return tuple(self.metrics[name] for name in self.objectives)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Phases in the order they run; a phase may read what earlier ones found.

    `designs` says, by phase, which contrasts of its cells are tested: told and stored before the first trial, reported at the end.
    `question` is what the study as a whole answers at its end. `notes` are told the user before the run.
    """

    phases: tuple[Phase, ...]
    designs: Mapping[str, Design] = field(default_factory=dict)
    question: Question | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        earlier: list[str] = []
        for phase in self.phases:
            if unknown := [need.phase for need in phase.needs if need.phase not in earlier]:
                raise SpecError(f"phase {phase.name!r} needs {', '.join(unknown)}, which no earlier phase is called")
            earlier.append(phase.name)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The evaluators of all phases."""
        return tuple(call for phase in self.phases for call in phase.evaluators)

    def phase(self, name: str) -> Phase:
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise SpecError(f"no phase {name!r}; phases: {', '.join(phase.name for phase in self.phases)}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The flags that a study has of its own: a frozen subclass with a field for each. This class itself is for a study without any.

    Raises SpecError for a number outside the bound that its field declares. A subclass whose `__post_init__` checks more calls this one
    first.
    """

    def __post_init__(self) -> None:
        for declared in dataclasses.fields(self):
            value, flag = getattr(self, declared.name), flag_of(declared.name)
            at_least, above = declared.metadata.get("at_least"), declared.metadata.get("above")
            if at_least is not None and not at_least <= value < math.inf:
                raise SpecError(f"{flag} is {value:g}; at least {at_least} is expected")
            if above is not None and not above < value < math.inf:
                raise SpecError(f"{flag} is {value:g}; a number above {above} is expected")


@dataclass(frozen=True, kw_only=True)
class FineTuning(Options):
    """The flags of a study that trains networks, for those that start from trained weights."""

    layer_decay: float = field(
        default=1.0, metadata={"help": "a layer learns so many times as fast as the one after it; for --weights", "above": 0}
    )
    freeze: int = field(default=0, metadata={"help": "the first blocks that stay as they are; for --weights", "at_least": 0})


def flag_of(field_name: str) -> str:
    return f"--{field_name.replace('_', '-')}"


class Method:
    """A registered study: makes its phases from a run's settings; `options` is the class of the flags it has of its own."""

    def __init__(self, make: Callable[[RunSettings], Study], options: type[Options]):
        self.options = options
        self.__doc__ = make.__doc__
        self._make = make

    def __call__(self, run: RunSettings) -> Study:
        """The study; raises SettingsError for evaluators and objectives of the user's that it does not take."""
        made = self._make(run if run.options is not None else dataclasses.replace(run, options=self.options()))
        for name in run.evaluators:
            if name not in (call.name for call in made.calls):
                raise SettingsError(f"--evaluators {name}: study {run.study!r} measures by its own evaluators alone")
        if run.objectives and run.objectives not in (phase.objectives for phase in made.phases):
            raise SettingsError(f"--objectives {','.join(run.objectives)}: study {run.study!r} has objectives of its own alone")
        return made


studies: Registry[Method] = Registry("study", package="search.studies")


def study(name: str, *, options: type[Options] = Options) -> Callable[[Callable[[RunSettings], Study]], Callable[[RunSettings], Study]]:
    """Register a function `(RunSettings) -> Study` as the study `name`.

    `options` is a frozen keyword-only dataclass derived from `Options`. Its fields, each with a default, become the study's own flags.
    A field is `str`, `int`, `float`, `bool` or, for a flag that may be repeated, `tuple[str, ...]`. Its metadata declares the rest:
    `field(default=3, metadata={"help": "paired trainings", "at_least": 0})`. "help" explains the flag, "metavar" is what its help puts
    behind it, and "at_least" or "above" is the lower bound of a finite number, which `Options` checks. An instance arrives as
    `RunSettings.options`.
    """

    def register(make: Callable[[RunSettings], Study]) -> Callable[[RunSettings], Study]:
        studies.add((name,), Method(make, options))
        return make

    return register


def phase_settings(phase: Phase, run: RunSettings, data_fingerprint: str) -> dict[str, Any]:
    """What a phase's measurements depend on: stored with its Optuna study and compared when it is opened again."""
    uses_data = any(call.evaluator.uses_data for call in phase.evaluators)
    example = phase.example
    # Keys that came later stand only where they say something, so that older studies still compare equal.
    recipe = {"recipe": dataclasses.replace(example.recipe, seed=0).to_json()} if example.recipe else {}
    weights = {"weights": example.weights.identity} if example.weights else {}
    resources = phase.trial_resources(run)
    processes = {"processes": resources.processes} if resources.processes > 1 else {}
    accelerator = {"accelerator_type": resources.accelerator_type} if resources.accelerator_type else {}
    fitted = {"defaults": run.defaults, "num_classes": example.model.num_classes} if run.defaults >= FITTED else {}
    return {
        "study": run.study,
        "space": phase.space.to_json(),
        "objectives": [[metric.name, metric.goal] for metric in phase.goals],
        "evaluators": [call.to_json() for call in phase.evaluators],
        "img_size": example.model.img_size,
        "proxy_img_size": example.scored.img_size,
        "data": data_fingerprint if uses_data else None,
        "seed": run.seed,
        "device": resources.device,
        **recipe,
        **processes,
        **accelerator,
        **weights,
        **fitted,
    }


def open_phase(name: str, phase: Phase, run: RunSettings, data_fingerprint: str, storage: optuna.storages.BaseStorage) -> optuna.Study:
    """The phase's Optuna study, created or resumed.

    Raises SettingsError naming every difference when it was created with other settings.
    """
    import optuna

    # As the storage will give it back: a tuple is a list there.
    wanted = json.loads(json.dumps(phase_settings(phase, run, data_fingerprint)))
    _refuse_name_of_another_method(name, run.study, storage)
    opened = optuna.create_study(
        study_name=name,
        storage=storage,
        directions=[metric.goal for metric in phase.goals],
        sampler=make_sampler(phase, run.seed),
        load_if_exists=True,
    )
    stored = opened.user_attrs.get(SETTINGS_ATTRIBUTE)
    if stored is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            opened.set_metric_names(list(phase.objectives))
        opened.set_user_attr(IDENTITY_ATTRIBUTE, uuid.uuid4().hex)
        opened.set_user_attr(SETTINGS_ATTRIBUTE, wanted)
    elif differences := list(_differences(_comparable(stored, phase), _comparable(wanted, phase))):
        raise SettingsError(
            f"study {name!r} was created with other settings: {'; '.join(differences)}. "
            "Run it with the settings it has, under another --name, or begin anew with --fresh (the old study is kept)"
        )
    return opened


def _comparable(settings: Mapping[str, Any], phase: Phase) -> dict[str, Any]:
    """Settings as they are compared."""
    compared = dict(settings)
    space = settings["space"]
    # By name, so that a difference names its axis.
    compared["space"] = {**space, "axes": {axis["name"]: axis for axis in space["axes"]}}
    if recipe := settings.get("recipe"):
        # It is stored without its defaults, which a difference should name.
        compared["recipe"] = dataclasses.asdict(Recipe.from_json(recipe))
    if not any(call.evaluator.uses_processes for call in phase.evaluators):
        # Stored once with every phase, and no number of this one depends on it.
        compared.pop("processes", None)
    if all(call.evaluator.is_free for call in phase.evaluators):
        compared.pop("device", None)
    return compared


def _refuse_name_of_another_method(name: str, method: str, storage: optuna.storages.BaseStorage) -> None:
    import optuna

    study_name = name.rpartition("/")[0]
    for other in optuna.get_all_study_names(storage):
        if other.rpartition("/")[0] == study_name:
            owner = optuna.load_study(study_name=other, storage=storage).user_attrs.get(SETTINGS_ATTRIBUTE, {}).get("study", method)
            if owner != method:
                raise SettingsError(f"{study_name!r} is a study of {owner!r}, not of {method!r}; use another --name")


def make_sampler(phase: Phase, seed: int) -> optuna.samplers.BaseSampler:
    problem = Problem(space=phase.space, goals=phase.goals, budget=phase.budget, seed=seed, num_trials=phase.num_trials)
    return strategies.get(phase.strategy or "random")(problem)


def _differences(stored: Any, wanted: Any, where: str = ""):
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in sorted(stored.keys() | wanted.keys()):
            yield from _differences(stored.get(key), wanted.get(key), f"{where}.{key}" if where else key)
    elif isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted):
        for index, pair in enumerate(zip(stored, wanted, strict=True)):
            yield from _differences(*pair, f"{where}[{index}]")
    elif stored != wanted:
        yield f"{where} was {_short(stored)}, now {_short(wanted)}" + _explained(where, stored, wanted)


def _explained(where: str, stored: Any, wanted: Any) -> str:
    from workers.data import BY_CONTENT  # imports NumPy, which listing studies should not

    is_older = where == "data" and BY_CONTENT in str(wanted) and BY_CONTENT not in str(stored)
    return " (data is known by the bytes of its files since November 2026, before by their names and sizes)" if is_older else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""The speed of many networks where they run: latency beside an anchor network, for every execution that the command line names.

    search/run.py profile --models 'deit_*,timm:vit_*_patch16_224' --precision fp32,bf16 --execution eager,compile --gpus 1

Every network is measured once under every combination of the settings, each trial alone on its node. One network, now and without a
study: `search/run.py evaluate MODEL --evaluators profile`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from results.answers import Question
from results.formats import count
from search.fixed_points import grid, refuse_flags_of_a_search
from search.model_list import ListedModel, listed_models
from search.study import DEFAULT_DATA, Options, Phase, RunSettings, SettingsError, Study, study
from space.registry import SpecError
from space.search_space import Axis, Candidate, SearchSpace
from space.spec import digest_of
from space.values import parse_value
from workers.evaluator import Call
from workers.resources import RESOURCES, resources_of

PROFILE, THROUGHPUT, ROW = "profile", "throughput", "row"
KINDS = {"precision": str, "execution": str, "memory_format": str, "batch_size": int, "threads": int}
"""The settings of an execution that may have several values, with the type of one."""


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(Options):
    """Which networks, and how each of them is run."""

    models: str = field(
        default="*",
        metadata={"help": "what MODEL may be, separated by commas, and patterns over the catalogue (deit_*) and timm (timm:vit_*_224)"},
    )
    precision: str = field(default="", metadata={"metavar": "A,B", "help": "fp32, bf16, fp16; default: fp32"})
    execution: str = field(default="", metadata={"metavar": "A,B", "help": "eager, compile, cuda_graph; default: eager"})
    memory_format: str = field(default="", metadata={"metavar": "A,B", "help": "contiguous, channels_last; default: contiguous"})
    batch_size: str = field(default="", metadata={"metavar": "A,B", "help": "images in a batch; default: 1"})
    threads: str = field(default="", metadata={"metavar": "A,B", "help": "threads of the CPU; default: 1"})
    accelerators: str = field(default="", metadata={"metavar": "A,B", "help": "kinds of GPU as Ray names them, such as H100; default: any"})
    throughput: bool = field(default=False, metadata={"help": "measure also the images a second at the best batch size"})
    wait_s: float = field(
        default=600.0, metadata={"help": "seconds that a trial waits for other trials to leave its node; then it says so", "at_least": 0}
    )


@dataclass(frozen=True)
class _Row:
    """A network under one combination of settings."""

    network: ListedModel
    settings: Mapping[str, Mapping[str, Any]]
    setting: str
    label: str


@study("profile", options=ProfileOptions)
def profile(run: RunSettings) -> Study:
    """Measure latency and throughput of many networks, beside an anchor network, each alone on its node."""
    options: ProfileOptions = run.options
    refuse_flags_of_a_search(run, "every network of the list is profiled")
    calls = run.calls(PROFILE, *([THROUGHPUT] if options.throughput else []))
    if run.data != DEFAULT_DATA and not any(call.evaluator.uses_data for call in calls):
        raise SettingsError(f"--data {run.data} means nothing here: speed is measured on random images; --img-size says how large they are")
    combinations = _combinations(options, run, calls)
    listed = listed_models(options.models, run, img_size=run.img_size, num_classes=run.num_classes)
    is_one = len(combinations) == 1
    rows = [
        _Row(network, settings, setting, network.name if is_one else f"{network.name} ({setting})")
        for settings, setting in combinations
        for network in listed.models
    ]
    kinds = [settings[RESOURCES] for settings, _ in combinations if RESOURCES in settings]
    phase = Phase(
        name=PROFILE,
        space=_space(rows),
        evaluators=calls,
        objectives=run.objectives or ("latency_ms",),
        propose=grid([{ROW: row} for row in range(len(rows))]),
        resources=replace(resources_of(calls, gpus=run.gpus), wait_s=options.wait_s),
        trials_also_take=tuple(kinds),
        plan=f"{count(len(listed.models), 'network')}, each measured once{'' if is_one else f' in {len(combinations)} ways'}",
        failures_are_data=True,
    )
    question = Question(
        kind="profile", parameters={"rows": [{"label": row.label, "name": row.network.name, "setting": row.setting} for row in rows]}
    )
    return Study(phases=(phase,), notes=listed.notes, question=question)


def _combinations(options: ProfileOptions, run: RunSettings, calls: tuple[Call, ...]) -> list[tuple[dict[str, dict[str, Any]], str]]:
    """The settings of a trial by evaluator, and in words; raises SpecError for a value that is not allowed."""
    given = {name: _values(name, getattr(options, name), kind) for name, kind in KINDS.items() if getattr(options, name)}
    kinds = _values("accelerators", options.accelerators, str) if options.accelerators else [None]
    if options.accelerators and not run.gpus:
        raise SettingsError(f"--accelerators {options.accelerators}: kinds of GPU need --gpus, such as --gpus 1")
    found = []
    for accelerator, *values in itertools.product(kinds, *given.values()):
        chosen = dict(zip(given, values, strict=True))
        own = {name: value for name, value in chosen.items() if name != "batch_size"}
        settings = {call.name: chosen if call.name == PROFILE else own for call in calls if call.name in (PROFILE, THROUGHPUT)}
        changed = [call.changed(settings[call.name]).settings for call in calls if call.name in settings]
        for one in changed:
            one.check_device("cuda" if run.gpus else "cpu")
        taken = {RESOURCES: {"accelerator_type": accelerator}} if accelerator else {}
        found.append(({**{name: own for name, own in settings.items() if own}, **taken}, _in_words(changed[0], accelerator)))
    return found


def _values(name: str, text: str, kind: type) -> list[Any]:
    flag = f"--{name.replace('_', '-')}"
    values = [parse_value(value.strip(), kind, flag) for value in text.split(",")]
    if "" in values or len(set(values)) < len(values):
        raise SpecError(f"{flag} {text!r}: different values are expected, separated by commas")
    return values


def _in_words(settings: Any, accelerator: str | None) -> str:
    parts = [accelerator, settings.precision, settings.execution, f"batch {settings.batch_size}"]
    parts += [settings.memory_format] if settings.memory_format != "contiguous" else []
    parts += [count(settings.threads, "thread")] if settings.threads else []
    return ", ".join(part for part in parts if part)


def _space(rows: list[_Row]) -> SearchSpace:
    """One axis, the row of the table."""

    def decode(params: Mapping[str, Any]) -> Candidate:
        row = rows[params[ROW]]
        return Candidate(model=row.network.model, settings=row.settings, label=row.label)

    identity = digest_of([[row.network.model.digest, row.settings] for row in rows])
    return SearchSpace(name=f"profile/{identity}", axes=(Axis(name=ROW, choices=range(len(rows))),), decode=decode)

"""What is settled before a study runs, and said: the classes of its networks, its data, its phases with their limits, doubts."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results.paths import RunPaths
from search.description import WIDTH
from search.study import DEFAULT_DATA, FITTED, SETTINGS_ATTRIBUTE, Phase, RunSettings, SettingsError, Study, studies
from workers.data import check_source, count_classes, summarize
from workers.evaluate import subject_of
from workers.evaluator import Call


def fitted(run: RunSettings, *, fresh: bool) -> RunSettings:
    """`run` with the number of classes of its networks, as `classes_of` decides.

    A study that exists keeps the defaults it was created with, unless it is begun anew (`fresh`). Raises SettingsError for a
    `num_classes` that such a study or the training cannot have.
    """
    stored = None if fresh else _stored_settings(run)
    if stored is not None:
        run = dataclasses.replace(run, defaults=stored.get("defaults", 1))
    if run.num_classes is not None and run.defaults < FITTED:
        raise SettingsError(
            f"--num-classes {run.num_classes}: study {run.study_name!r} was created before there was this flag and keeps its classes. "
            "Leave it out, use another --name, or begin anew with --fresh (the old study is kept)"
        )
    # Which score stands in the place of the study's own says nothing about the classes: they follow the data that the study would read.
    reading = run if run.num_classes else dataclasses.replace(run, objectives=())
    return dataclasses.replace(run, num_classes=classes_of(studies.get(run.study)(reading).calls, run.data, run.num_classes))


def classes_of(calls: Sequence[Call], data: str, asked: int | None) -> int | None:
    """The number of classes of the networks that are measured by `calls`; None leaves them their own.

    It is `asked`, else that of data that the networks are trained on or that the user names: the digits, which stand where no data is
    named, are then only images to score with. Data whose labels name fewer than two classes decide nothing. Raises SettingsError if a
    network with `asked` classes is to be trained on data with another number of them.
    """
    # A score of the proxy reads labels, and a network may have more classes than those.
    trains = any(call.evaluator.needs_dataset and call.evaluator.subject == "model" for call in calls)
    reads_named_data = data != DEFAULT_DATA and any(call.evaluator.uses_data for call in calls)
    if not (trains or reads_named_data):
        return asked
    num_classes = count_classes(check_source(data))
    if asked is None:
        return num_classes if num_classes > 1 else None
    if trains and asked != num_classes:
        raise SettingsError(f"--num-classes {asked}: data {data!r} has {num_classes} classes, and a network is trained on all of them")
    return asked


def _stored_settings(run: RunSettings) -> dict[str, Any] | None:
    """The settings of a phase of the study as they were stored when it was created; None if there is no such study."""
    import optuna

    from search.storage import open_storage

    location = run.storage or str(RunPaths(run.runs).journal)
    file = location.removeprefix("sqlite:///")
    if "://" not in file and not Path(file).exists():
        return None
    storage = open_storage(location)
    for name in optuna.get_all_study_names(storage):
        if name.rpartition("/")[0] == run.study_name:
            stored = optuna.load_study(study_name=name, storage=storage).user_attrs.get(SETTINGS_ATTRIBUTE)
            if stored is not None:
                return stored
    return None


def data_summary(study: Study, run: RunSettings) -> str:
    """One line about the data that the study reads, known without opening an image; empty if it reads none."""
    reading = [(call, phase.example) for phase in study.phases for call in phase.evaluators if call.evaluator.uses_data]
    if not reading:
        return ""
    sizes = {subject_of(call, example).img_size for call, example in reading}
    return summarize(run.data, sizes, with_parts=any(call.evaluator.needs_dataset for call, _ in reading))


def announcements(study: Study, run: RunSettings, given: RunSettings) -> list[str]:
    """What the run will do, once for phases that do the same, and what is doubtful in it; `given` are the settings before `fitted`."""
    phases: dict[str, list[str]] = {}
    for phase in study.phases:
        phases.setdefault(_plan(phase, run, given), []).append(phase.name)
    lines = [wrapped(f"{run.study_name}/{', '.join(names)}: {plan}") for plan, names in phases.items()]
    lines += dict.fromkeys(phase.example.weights.summary for phase in study.phases if phase.example.weights)
    doubts = dict.fromkeys(doubt for phase in study.phases if phase.example.recipe for doubt in phase.example.recipe.doubts)
    return [*lines, *(f"warning: {doubt}" for doubt in doubts)]


def wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def _plan(phase: Phase, run: RunSettings, given: RunSettings) -> str:
    model, scored = phase.example.model, phase.example.scored
    trials = phase.plan or "as many trials as its proposer wants"
    if phase.num_trials is not None:
        trials = f"{phase.num_trials} trials ({'default, ' if given.num_trials is None else ''}--trials) proposed by {phase.strategy}"
    limits = f"; limits {phase.budget}" if phase.strategy and not phase.budget.is_empty else ""
    origin = (
        "--num-classes" if given.num_classes is not None else "of the data" if run.num_classes == model.num_classes else "the study's own"
    )
    scoring = f", scored at {scored.img_size} px (--proxy-img-size)" if scored.img_size != model.img_size else ""
    return f"{trials}{limits}; networks for {model.img_size} px (--img-size){scoring} and {model.num_classes} classes ({origin})"

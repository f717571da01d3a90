"""What is settled before a study runs, and said: the classes of its networks, its data, its phases with their limits, doubts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from results.paths import RunPaths
from search.study import FITTED, SETTINGS_ATTRIBUTE, Phase, RunSettings, SettingsError, Study, studies
from workers.data import check_source, count_classes, summarize
from workers.evaluate import subject_of


def fitted(run: RunSettings, *, fresh: bool) -> RunSettings:
    """`run` with the classes of its data, if it reads data and `num_classes` does not say otherwise.

    A study that exists keeps the defaults it was created with, unless it is begun anew (`fresh`). Data whose labels name fewer than two
    classes leave the study its own number. Raises SettingsError for a `num_classes` that such a study or the training cannot have.
    """
    stored = None if fresh else _stored_settings(run)
    if stored is not None:
        run = dataclasses.replace(run, defaults=stored.get("defaults", 1))
    if run.num_classes is not None and run.defaults < FITTED:
        raise SettingsError(
            f"--num-classes {run.num_classes}: study {run.study_name!r} was created before there was this flag and keeps its classes. "
            "Leave it out, use another --name, or begin anew with --fresh (the old study is kept)"
        )
    study = studies.get(run.study)(run)
    if not any(call.evaluator.uses_data for call in study.calls):
        return run
    num_classes = count_classes(check_source(run.data))
    if run.num_classes is None:
        return dataclasses.replace(run, num_classes=num_classes) if num_classes > 1 else run
    if any(call.evaluator.needs_dataset for call in study.calls):
        check_num_classes(run.num_classes, run.data, num_classes)
    return run


def check_num_classes(asked: int, data: str, num_classes: int) -> None:
    """Raise SettingsError if a network with `asked` classes is to be trained on data with another number of them."""
    if asked != num_classes:
        raise SettingsError(f"--num-classes {asked}: data {data!r} has {num_classes} classes, and a network is trained on all of them")


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
    """What the run will do, phase by phase, and what is doubtful in it; `given` are the settings before `fitted`."""
    lines = [f"{run.study_name}/{phase.name}: {_plan(phase, run, given)}" for phase in study.phases]
    doubts = dict.fromkeys(doubt for phase in study.phases if phase.example.recipe for doubt in phase.example.recipe.doubts)
    return [*lines, *(f"warning: {doubt}" for doubt in doubts)]


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

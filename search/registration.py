"""What a study tests, said and kept before its first trial."""

from __future__ import annotations

import optuna
from optuna.trial import TrialState

from results.effects.design import Contrast, Design
from search.study import DESIGNS_ATTRIBUTE


def register(study: optuna.Study, design: Design) -> list[str]:
    """Keep the design with the phase's Optuna study; returns the lines that tell the user what is tested.

    Each entry holds `design`, its `digest` and `num_trials`, the complete trials that were there when it came. None is ever
    overwritten, so that a design that was changed after a look at the data shows as such; the last one is the present one.
    """
    registered = study.user_attrs.get(DESIGNS_ATTRIBUTE, [])
    lines = _lines(study.study_name, design)
    if registered and registered[-1]["digest"] == design.digest:
        return lines
    num_trials = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    if registered:
        trials = "1 trial" if num_trials == 1 else f"{num_trials} trials"
        lines.append(f"  the design was {registered[-1]['digest']}, now {design.digest}, with {trials} there")
    entry = {"digest": design.digest, "num_trials": num_trials, "design": design.to_json()}
    study.set_user_attr(DESIGNS_ATTRIBUTE, [*registered, entry])
    return lines


def _lines(phase: str, design: Design) -> list[str]:
    primary = [contrast for contrast in design.contrasts if contrast.is_primary]
    num_secondary = len(design.contrasts) - len(primary)
    secondary = "1 secondary contrast" if num_secondary == 1 else f"{num_secondary} secondary contrasts"
    outcomes = ", ".join(outcome.name for outcome in design.outcomes)
    return [
        f"{phase} tests design {design.digest} on {outcomes}: {secondary} and, primary,",
        *(f"  {contrast.factor}: {contrast.text} on {contrast.outcome}, {_published(contrast)}" for contrast in primary),
    ]


def _published(contrast: Contrast) -> str:
    if not contrast.source:
        return "nothing published"
    size = "" if contrast.published is None else f" {contrast.published:+g}"
    return f"published{size} ({contrast.source})"

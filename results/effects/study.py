"""The effects of a study, read from its MLflow runs alone.

Every parent run holds `designs.json`, the designs by phase; `merge_designs` makes one of all. The parameters of a trial name its
cell: `factor`, the level under the name of that factor, and `seed`. A trial that reused an earlier measurement has its files in
the earlier trial's run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from results.curves import CURVE_NAMES, Curve
from results.effects.design import Contrast, Design
from results.effects.predictions import Cell, CellKey, Predictions, read_predictions
from results.effects.table import TestKey, effects_table, levels_table
from results.formats import count
from results.mlflow_store import DESIGNS_FILE, FINAL_STATUSES, PARENT_TAG, StudyRuns, fetch_artifact, read_artifact

if TYPE_CHECKING:
    import pandas as pd

    from results.mlflow_store import MlflowClient, Run

EFFECTS_FILE = "effects.csv"
PREDICTIONS_FILES = ("predictions.npz", "robustness.npz")


@dataclass(frozen=True, kw_only=True)
class RobustnessCurves:
    """The curves of each level of a factor, by level and curve name; `chance_pct` is the accuracy of random guessing."""

    curves: Mapping[str, Mapping[str, Curve]]
    chance_pct: float


@dataclass(frozen=True, kw_only=True)
class Effects:
    """The effects of a phase, and how its design was registered.

    `design` is merged from all that were registered; `digests` names those, oldest first. `num_looks` is how often
    effects were shown before more trials came, this report included. `robustness` holds the factors with curves; `notes` names
    what could not be read.
    """

    study_name: str
    phase: str
    design: Design
    digests: tuple[str, ...]
    table: pd.DataFrame
    levels: pd.DataFrame
    num_looks: int
    robustness: Mapping[str, RobustnessCurves]
    notes: tuple[str, ...] = ()

    @property
    def is_measured(self) -> bool:
        """Whether any contrast has a seed in all its arms."""
        return bool((self.table["n_seeds"] > 0).any())

    @property
    def registration(self) -> str:
        """Which tests were registered before the first trial of their arms, and which after."""
        parts = [f"design {' and then '.join(self.digests)}"]
        for factor, rows in self.table.groupby("factor", sort=False):
            late = rows.loc[rows["num_trials_before"] > 0, "num_trials_before"]
            if len(late):
                num_trials = ("up to " if late.max() > 1 else "") + count(late.max(), "trial")
                parts.append(f"{factor}: {len(late)} of {len(rows)} tests registered after {num_trials} of their arms")
            else:
                parts.append(f"{factor} registered before its first trial")
        if self.num_looks > 1:
            parts.append(f"effects were looked at {self.num_looks} times or more while trials came; the p-values do not account for that")
        return "; ".join([*parts, *self.notes])


def load_effects(runs: StudyRuns) -> tuple[Effects, ...]:
    """The effects of every design of a study.

    An artifact that cannot be read is left out and named: a design in `notes`, a trial in the `missing` of its rows.
    """
    order = {parent.info.run_id: place for place, parent in enumerate(runs.parents)}
    registered, notes = _read_designs(runs.client, runs.parents)
    found = []
    for phase, designs in registered.items():
        own = [run for run in runs.trials if run.data.tags.get("phase") == phase and run.info.status in FINAL_STATUSES]
        finished = [run for run in own if run.info.status == "FINISHED"]
        cells, absent = read_cells(runs.client, own)
        design = merge_designs(list(designs.values()))
        before = _num_trials_before(
            design, designs, [(_cell_key(run), order.get(run.data.tags.get(PARENT_TAG, ""), -1)) for run in finished]
        )
        found.append(
            Effects(
                study_name=runs.study_name,
                phase=phase,
                design=design,
                digests=tuple(dict.fromkeys(one.digest for one in designs.values())),
                table=effects_table(cells, design, absent=absent, num_trials_before=before),
                levels=levels_table(cells, design, absent=absent),
                num_looks=_num_looks(runs.client, runs.parents, finished),
                robustness=_robustness(cells, design),
                notes=notes,
            )
        )
    return tuple(found)


def _read_designs(client: MlflowClient, parents: Sequence[Run]) -> tuple[dict[str, dict[int, Design]], tuple[str, ...]]:
    """The designs by phase and by the position of the parent that registered them; and notes on unreadable ones."""
    registered: dict[str, dict[int, Design]] = {}
    notes = []
    for place, parent in enumerate(parents):
        try:
            text = read_artifact(client, parent, DESIGNS_FILE)
            designs = {phase: Design.from_json(data) for phase, data in (json.loads(text) if text else {}).items()}
        except Exception as error:  # a damaged file or a failed download: the other designs count
            notes.append(f"{DESIGNS_FILE} of run {parent.info.run_id} is unreadable ({_reason(error)})")
            continue
        for phase, design in designs.items():
            registered.setdefault(phase, {})[place] = design
    return registered, tuple(notes)


def merge_designs(designs: Sequence[Design]) -> Design:
    """One design that holds every factor, outcome and contrast of `designs`, which are ordered from oldest to newest.

    Of each factor, the contrasts of the newest design come first; contrasts that it dropped follow and are not primary. `alpha`
    and `margin_pct` are those of the newest design.
    """
    newest = designs[-1]
    contrasts: list[Contrast] = []
    for factor in dict.fromkeys(factor for design in designs for factor in design.factors):
        kept: dict[str, Contrast] = {}
        for design in reversed(designs):
            for contrast in design.contrasts:
                if contrast.factor == factor:
                    kept.setdefault(contrast.text, replace(contrast, is_primary=contrast.is_primary and not _has_primary(kept)))
        contrasts += kept.values()
    outcomes = {outcome.name: outcome for design in designs for outcome in design.outcomes}
    outcomes |= {outcome.name: outcome for outcome in newest.outcomes}
    return replace(newest, contrasts=tuple(contrasts), outcomes=tuple(outcomes.values()))


def _has_primary(kept: Mapping[str, Contrast]) -> bool:
    return any(contrast.is_primary for contrast in kept.values())


def _num_trials_before(
    design: Design, registered: Mapping[int, Design], finished: Sequence[tuple[CellKey | None, int]]
) -> dict[TestKey, int]:
    """By test, the number of trials of its arms that finished before the invocation that registered it in its present form."""
    counts = {}
    for contrast in design.contrasts:
        levels = (contrast.baseline, *contrast.levels)
        arms = [place for key, place in finished if key is not None and key[0] == contrast.factor and key[1] in levels]
        for outcome in design.outcomes:
            first = min(place for place, one in registered.items() if _is_registered(contrast, outcome.name, design, one))
            counts[contrast.factor, contrast.text, outcome.name] = sum(place < first for place in arms)
    return counts


def _is_registered(contrast: Contrast, outcome: str, design: Design, earlier: Design) -> bool:
    """Whether the earlier design has this test with the same direction, alpha and margin, and as primary if it is primary now."""
    return (
        (earlier.alpha, earlier.margin_pct) == (design.alpha, design.margin_pct)
        and any(known.name == outcome for known in earlier.outcomes)
        and any(
            (one.factor, one.levels, one.baseline) == (contrast.factor, contrast.levels, contrast.baseline)
            and (one.outcome, one.alternative) == (contrast.outcome, contrast.alternative)
            and (one.is_primary or not contrast.is_primary)
            for one in earlier.contrasts
        )
    )


def _cell_key(run: Run) -> CellKey | None:
    """The cell of a trial; None if its parameters name no cell, or if it failed before it had parameters."""
    params = run.data.params
    factor = params.get("factor")
    if factor not in params or "seed" not in params:
        return None
    return factor, params[factor], int(params["seed"])


def read_cells(client: MlflowClient, trials: Sequence[Run]) -> tuple[list[Cell], dict[CellKey, str]]:
    """The cells of a phase, each from its first finished trial, and by cell the reason why others have no predictions."""
    by_number = {int(run.data.tags["trial"]): run for run in trials}
    cells: dict[CellKey, Cell] = {}
    absent: dict[CellKey, str] = {}
    predictions: dict[int, Predictions | str] = {}
    for number, run in sorted(by_number.items()):
        key = _cell_key(run)
        if key is None or key in cells:
            continue
        if run.info.status == "FAILED":
            absent.setdefault(key, f"failed: {run.data.tags.get('failure_kind', 'error')}")
            continue
        source = int(run.data.tags.get("reused_from", number))
        if source not in predictions:
            predictions[source] = read_run_predictions(client, by_number[source]) if source in by_number else f"trial {source} is gone"
        measured = predictions[source]
        if isinstance(measured, str):
            absent[key] = measured
        else:
            cells[key] = Cell(factor=key[0], level=key[1], seed=key[2], predictions=measured)
    return list(cells.values()), {key: reason for key, reason in absent.items() if key not in cells}


def read_run_predictions(client: MlflowClient, run: Run) -> Predictions | str:
    """The predictions of a trial, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            present = [fetch_artifact(client, run, name, Path(folder)) for name in PREDICTIONS_FILES]
            return read_predictions(Path(folder) / PREDICTIONS_FILES[0]) if present[0] else f"no {PREDICTIONS_FILES[0]}"
        except Exception as error:  # A damaged file or a failed download costs one trial, not the report.
            return f"unreadable: {_reason(error)}"


def _reason(error: Exception) -> str:
    line = str(error).strip().split("\n")[0]
    # A ValueError was raised on purpose and its message says enough.
    return line if type(error) is ValueError and line else f"{type(error).__name__}: {line}"


def _num_looks(client: MlflowClient, parents: Sequence[Run], finished: Sequence[Run]) -> int:
    """How many earlier invocations finished trials and then showed effects, plus this report."""
    with_trials = [parent for parent in parents if any(run.data.tags.get(PARENT_TAG) == parent.info.run_id for run in finished)]
    return 1 + sum(read_artifact(client, parent, EFFECTS_FILE) is not None for parent in with_trials[:-1])


def _robustness(cells: Sequence[Cell], design: Design) -> dict[str, RobustnessCurves]:
    """The curves of the factors that have any. A trial whose curve has other levels than the first trial's is left out."""
    found = {}
    for factor in design.factors:
        own = [cell for cell in cells if cell.factor == factor]
        levels = dict.fromkeys(level for one in design.contrasts if one.factor == factor for level in (one.baseline, *one.levels))
        curves: dict[str, dict[str, Curve]] = {}
        for name in CURVE_NAMES:
            with_curve = [cell for cell in own if name in cell.predictions.curves]
            for level in levels:
                steps = with_curve[0].predictions.curves[name][0] if with_curve else np.zeros(0)
                stored = [cell.predictions.curves[name] for cell in with_curve if cell.level == level]
                if same := [accuracy for found_steps, accuracy in stored if np.array_equal(found_steps, steps)]:
                    curves.setdefault(level, {})[name] = (steps, np.stack(same))
        if curves:
            found[factor] = RobustnessCurves(curves=curves, chance_pct=100 / own[0].predictions.num_classes)
    return found

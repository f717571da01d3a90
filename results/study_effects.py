"""The effects of a study, from its MLflow runs alone: which designs were named before it ran, and what came of them.

A parent run holds `designs.json`, by phase; the newest one counts. A trial's run is the cell that its parameters name: `factor`,
the level under the name of that factor, and `seed`. Its files are those it was measured with: a trial that was given the
measurement of an earlier one is read from that one's run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.effects import Cell, Design, Predictions, effects_table, effects_text, format_effect, read_predictions
from results.forest import write_html, write_png
from results.tracking import DESIGNS_FILE, PARENT_TAG, fetch_artifact, read_artifact

if TYPE_CHECKING:
    import pandas as pd

EFFECTS_FILE = "effects.csv"
PREDICTIONS_FILES = ("predictions.npz", "robustness.npz")


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What came of a phase's design.

    `num_looks` counts the times that effects were shown with data that had grown since, the present one included, and
    `num_trials_before` the trials that were there when the design was registered. With one look and no such trial the p-values
    mean what they say.
    """

    phase: str
    design: Design
    table: pd.DataFrame
    num_looks: int
    num_trials_before: int

    @property
    def text(self) -> str:
        """Every contrast on the outcomes that contrasts are about; the table has the others too."""
        outcomes = {contrast.outcome for contrast in self.design.contrasts}
        own = self.table.loc[[outcome in outcomes for outcome in self.table["outcome"]]]
        num_others = len(self.table) - len(own)
        others = f"{num_others} rows on other outcomes: --html, or {EFFECTS_FILE} of the parent run\n" if num_others else ""
        return f"{self.registration}\n\n{effects_text(own)}{others}"

    @property
    def is_measured(self) -> bool:
        """Whether any contrast has a seed in all its arms."""
        return bool((self.table["n_seeds"] > 0).any())

    @property
    def markdown(self) -> str:
        """The primary contrasts as a table of Markdown."""
        lines = ["| primary contrast | outcome | effect | 95 % interval | p | seeds | verdict |", "|---|---|---:|---|---:|---:|---|"]
        for row in self.table.loc[self.table["is_primary"]].to_dict("records"):
            numbers = ["-", "-", "-"]
            if row["n_seeds"]:
                numbers = [format_effect(row["effect"], row["unit"]), interval_text(row), f"{row['p']:.2g}"]
            cells = [f"{row['factor']}: {row['contrast']}", row["outcome"], *numbers, str(row["n_seeds"]), row["verdict"]]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    @property
    def registration(self) -> str:
        """What was fixed beforehand, and what was not."""
        before = f"when {self.num_trials_before} trials were there" if self.num_trials_before else "before the first trial"
        parts = [f"design {self.design.digest}, registered {before}"]
        if self.num_looks > 1:
            parts.append(f"the data came in {self.num_looks} looks, which the p-values do not account for")
        return "; ".join(parts)


def interval_text(row: Mapping[str, Any]) -> str:
    """The ends of an effect's interval."""
    return f"[{format_effect(row['low'], row['unit'])}, {format_effect(row['high'], row['unit'])}]"


def load_effects(client: Any, parents: Sequence[Any], trials: Sequence[Any]) -> tuple[Effects, ...]:
    """The effects of every design; `parents` and `trials` are the study's runs in the order they began."""
    registered = [(parent, json.loads(text)) for parent in parents if (text := read_artifact(client, parent, DESIGNS_FILE))]
    found = []
    for phase, data in (registered[-1][1] if registered else {}).items():
        finished = [run for run in trials if run.data.tags["phase"] == phase and run.info.status == "FINISHED"]
        design = Design.from_json(data)
        began = min(parent.info.start_time for parent, designs in registered if designs.get(phase) == data)
        found.append(
            Effects(
                phase=phase,
                design=design,
                table=effects_table(read_cells(client, finished), design),
                num_looks=_num_looks(client, parents, finished),
                num_trials_before=sum(run.info.start_time < began for run in finished),
            )
        )
    return tuple(found)


def read_cells(client: Any, finished: Sequence[Any]) -> list[Cell]:
    """The cells among the finished trials of a phase, the first trial of each."""
    by_number = {int(run.data.tags["trial"]): run for run in finished}
    cells: dict[tuple[str, str, int], Cell] = {}
    predictions: dict[int, Predictions | None] = {}
    for number, run in sorted(by_number.items()):
        params = run.data.params
        factor = params.get("factor")
        if factor is None or factor not in params:
            continue
        source = int(run.data.tags.get("reused_from", number))
        if source not in predictions:
            predictions[source] = _read_predictions(client, by_number[source]) if source in by_number else None
        measured = predictions[source]
        if measured is not None:
            key = factor, params[factor], int(params["seed"])
            cells.setdefault(key, Cell(factor=key[0], level=key[1], seed=key[2], predictions=measured))
    return list(cells.values())


def _read_predictions(client: Any, run: Any) -> Predictions | None:
    with tempfile.TemporaryDirectory() as folder:
        present = [fetch_artifact(client, run, name, Path(folder)) for name in PREDICTIONS_FILES]
        return read_predictions(Path(folder) / PREDICTIONS_FILES[0]) if present[0] else None


def _num_looks(client: Any, parents: Sequence[Any], finished: Sequence[Any]) -> int:
    """Invocations under which trials ended and after which effects were shown, and the present one."""
    with_trials = [parent for parent in parents if any(run.data.tags.get(PARENT_TAG) == parent.info.run_id for run in finished)]
    return 1 + sum(read_artifact(client, parent, EFFECTS_FILE) is not None for parent in with_trials[:-1])


def write_files(effects: Sequence[Effects], folder: Path, study: str) -> list[Path]:
    """Table, design and forest plot of each design; the first one's names are plain, the others end in their phase."""
    files = []
    for index, one in enumerate(effects):
        suffix = f"_{one.phase}" if index else ""
        table, design = folder / f"effects{suffix}.csv", folder / f"effects{suffix}.json"
        one.table.to_csv(table, index=False)
        design.write_text(json.dumps(one.design.to_json(), indent=1))
        files += [table, design]
        if one.is_measured:
            png, html = folder / f"forest{suffix}.png", folder / f"forest{suffix}.html"
            write_png(one.table, png, f"{study}/{one.phase}")
            write_html(one.table, html, f"{study}/{one.phase}")
            files += [png, html]
    return files

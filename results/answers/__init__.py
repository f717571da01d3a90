"""What a study as a whole answers, beyond the leaderboards of its phases.

A study asks a `Question` before its first trial; it is stored with the study's parent run. The module of this package that has the name
of its kind answers it, from the ledger alone:

    def answer(results: StudyResults, parameters: Mapping[str, Any]) -> Answer: ...

Every view shows the answer: the end of a run, `python -m results.leaderboard`, the page, MLflow.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from results.study_results import StudyResults


@dataclass(frozen=True, kw_only=True)
class Question:
    """`kind` is the name of a module in `results.answers`; `parameters` are JSON, and hold what the ledger does not."""

    kind: str
    parameters: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "parameters": dict(self.parameters)}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`text` is for a terminal of 80 columns and ends with the answer in words; `table` holds every number behind it.

    `summary` is the same as JSON for a script. `draw` writes the figure as PNG; `figure` is its interactive form for a page, and `legend`
    the symbol, colour and text of each of its series (`results.figures.web.legend`).
    """

    title: str
    text: str
    table: pd.DataFrame
    summary: Mapping[str, Any]
    figure: Figure | None = None
    legend: tuple[tuple[str, str, str], ...] = ()
    draw: Callable[[Path], None] | None = None


def answer(question: Question, results: StudyResults) -> Answer:
    """The answer that the study's measurements so far give; raises ValueError if they are too few for any."""
    return importlib.import_module(f"results.answers.{question.kind}").answer(results, question.parameters)

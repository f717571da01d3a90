"""What the parent run of a study is given in MLflow: tables, pages, figures, and a description that MLflow's pages show."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from results.answers import Answer
from results.effects.study import Effects
from results.figures import forest, leaderboard, robustness
from results.mlflow_store import MlflowTracker
from results.page import write_html
from results.report import StudyReport, load_report
from results.text import markdown


def attach_leaderboard(tracker: MlflowTracker) -> StudyReport:
    """Give the tracker's parent run the leaderboard as CSV, HTML and PNG, and a description that shows its head."""
    report = load_report(tracker.uri, tracker.study_name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report.results.frame.to_csv(folder / "leaderboard.csv", index=False)
        write_html(report, folder / "leaderboard.html")
        leaderboard.write_png(report.results, folder / "leaderboard.png")
        if report.answer:
            _write_answer(report.answer, folder)
        try:
            _write_effects(report.effects, folder)
        except Exception as error:  # the measurements are shown even if the effects cannot be
            report = report.without_effects(error)
        tracker.attach(description=markdown(report), files=sorted(folder.iterdir()))
    _summarize(report, tracker)
    return report


def _summarize(report: StudyReport, tracker: MlflowTracker) -> None:
    """Of each phase: how many networks were measured, and the one that ranks first.

    A phase with a design compares levels over seeds, so none of its trials, single seeds, is summarized.
    """
    metrics: dict[str, float] = {}
    params: dict[str, str] = {}
    for phase in report.results.phases:
        metrics[f"num_measured/{phase}"] = len(report.results.phase(phase))
        first = {} if phase in report.results.designed else report.results.first(phase)
        for name, value in first.items():
            (params if isinstance(value, str) else metrics)[f"best/{phase}/{name}"] = value
    tracker.summarize(metrics=metrics, params=params)


def _write_answer(answer: Answer, folder: Path) -> None:
    (folder / "answer.txt").write_text(f"{answer.title}\n\n{answer.text}\n")
    (folder / "answer.json").write_text(json.dumps(dict(answer.summary), indent=1))
    answer.table.to_csv(folder / "answer.csv", index=False)
    if answer.draw:
        answer.draw(folder / "answer.png")


def _write_effects(effects: Sequence[Effects], folder: Path) -> None:
    """Write the files of each design: tables of effects and levels, the design, the forest plot, the robustness curves of each factor.

    The files of the first design have plain names; those of the other designs end in their phase. With several factors, the names of the
    curves end in the factor.
    """
    for index, one in enumerate(effects):
        suffix = f"_{one.phase}" if index else ""
        one.table.to_csv(folder / f"effects{suffix}.csv", index=False)
        one.levels.to_csv(folder / f"levels{suffix}.csv", index=False)
        (folder / f"effects{suffix}.json").write_text(json.dumps(one.design.to_json(), indent=1))
        if one.is_measured:
            title = f"{one.study_name}/{one.phase}"
            forest.write_png(one.table, folder / f"forest{suffix}.png", title)
            forest.write_html(one.table, folder / f"forest{suffix}.html", title)
        for factor, measured in one.robustness.items():
            of_factor = f"_{factor}" if len(one.design.factors) > 1 else ""
            title = f"{one.study_name}/{one.phase}: robustness, {factor}, mean over seeds with 95 % interval"
            for write, kind in ((robustness.write_png, "png"), (robustness.write_html, "html")):
                write(measured.curves, folder / f"robustness{suffix}{of_factor}.{kind}", title=title, chance_pct=measured.chance_pct)

"""A study for a terminal, and its short description in Markdown."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING

from results.columns import TEXT_WIDTH, Column, fitted
from results.effects.text import effects_markdown, effects_summary
from results.formats import TIMING_MARKS, count, format_tau, format_value, shortened_in_the_middle, timing_marks
from results.records import stderr_name
from results.study_results import COST_METRICS, agreement, family

if TYPE_CHECKING:
    import pandas as pd

    from results.report import StudyReport
    from results.study_results import StudyResults

SHORT_DIGEST = 8
LEAST_LABEL_WIDTH = 24
TIMED = ("latency_ms",)
FLAGS = ("is_noisy", "is_alone")
"""Shown as marks of what was timed, not as columns."""


def print_results(report: StudyReport, top: int, place: str = "", *, width: int = TEXT_WIDTH, wide: bool = False) -> None:
    """Print the head of every phase's table, the family it grew, what the expensive scores add, and the effects of its design.

    Tables leave out the columns that do not fit `width` characters, unless `wide`. `place` are the flags that the commands which are
    named need to find the study (`results.paths.place_flags`).
    """
    results = report.results
    command = f"python -m results.leaderboard {results.provenance.study_name}{place}"
    if not results.phases:
        num_failed = sum(sum(kinds.values()) for kinds in results.num_failed.values())
        print(f"study {results.provenance.study_name!r} has no finished trial yet ({num_failed} failed)")
    for phase in results.phases:
        print(_wrapped(f"{results.provenance.study_name}/{phase}: {results.summary(phase)}", width) + "\n")
        if phase in results.designed:
            continue
        print(text_table(results, phase, top, command, sys.maxsize if wide else width) + "\n")
        if text := family_text(results, phase, width):
            print(f"the family, in the order it grew:\n{text}\n")
        if text := agreement_text(agreement(results, phase), width):
            print(f"what the scores add over what costs nothing:\n{text}\n")
    print_effects(report, place, width=width, wide=wide)
    print_answer(report)


def print_effects(report: StudyReport, place: str = "", *, width: int = TEXT_WIDTH, wide: bool = False) -> None:
    """Print the effects of the study's designs, or why they cannot be stated."""
    command = f"python -m results.leaderboard {report.results.provenance.study_name}{place}"
    for effects in report.effects:
        print(effects_summary(effects, command, width=sys.maxsize if wide else width))
    if report.effects_failure:
        print(_wrapped(report.effects_failure, width))


def print_answer(report: StudyReport) -> None:
    """Print what the study answers, or why it cannot yet; nothing for a study without a question."""
    if report.answer:
        print(f"{report.answer.title}\n\n{report.answer.text}\n")
    elif report.answer_failure:
        print(report.answer_failure)


def text_table(results: StudyResults, phase: str, top: int, command: str, width: int) -> str:
    """The best of a phase; below it what was left out, and the `command` that shows it."""
    rows = results.phase(phase)
    shown = rows.head(top)
    lines, left_out = fitted(_columns(results, phase, shown, is_wide=width == sys.maxsize), width)
    notes = ["* on the Pareto front"] if any(shown["is_front"]) else []
    notes += [TIMING_MARKS] if any(map(timing_marks, shown.to_dict("records"))) else []
    flags = ""
    if len(rows) > top:
        notes.append(count(len(rows) - top, "more row"))
        flags += f" --top {len(rows)}"
    if left_out:
        notes.append(f"left out for {width} columns: {', '.join(left_out)}")
        flags += " --wide"
    if notes:
        lines.append(_wrapped("; ".join(notes), min(width, TEXT_WIDTH)))
    if flags:
        # Not wrapped: it can be pasted.
        lines.append(f"all: {command} --phase {phase}{flags}")
    return "\n".join(lines)


def _columns(results: StudyResults, phase: str, rows: pd.DataFrame, *, is_wide: bool) -> list[Column]:
    """The columns of a phase's table, those that matter most first."""
    names = results.metric_names(phase)
    errors = {stderr_name(name) for name in names} & set(names)
    digests = [digest if is_wide else digest[:SHORT_DIGEST] for digest in rows["digest"]]
    columns = [
        Column("rank", [f"{rank}{'*' if is_front else ' '}" for rank, is_front in zip(rows["rank"], rows["is_front"], strict=True)]),
        Column("label", list(rows["label"]), is_text=True, at_most=LEAST_LABEL_WIDTH),
        Column("digest", digests, is_text=True),
    ]
    metrics = []
    for name in [name for name in names if name not in (*errors, *FLAGS)] + [name for name in ("elapsed_s",) if name in rows]:
        cells = [format_value(value) for value in rows[name]]
        if name in TIMED:
            cells = [f"{cell}{marks}" for cell, marks in zip(cells, map(timing_marks, rows.to_dict("records")), strict=True)]
        if stderr_name(name) in errors:
            spread = [format_value(value, digits=2) for value in rows[stderr_name(name)]]
            cells = [f"{cell} ±{error}" for cell, error in zip(cells, spread, strict=True)]
        metrics.append(Column(name, cells))
    known_before = [metric.name for metric in results.objectives.get(phase, ())] + list(COST_METRICS)
    num_first = sum(column.title in known_before for column in metrics)
    return [*columns, *metrics[:num_first], Column("trial", [str(number) for number in rows["trial"]]), *metrics[num_first:]]


def agreement_text(table: pd.DataFrame, width: int = TEXT_WIDTH) -> str:
    """The agreement table, a line for each expensive score and baseline."""
    lines = []
    for score, rows in table.groupby("score", sort=False):
        lines.append(_wrapped(f"{score}, Kendall's tau-b [95 % bootstrap interval], n = {rows['n'].max()}:", width))
        names = rows["baseline"].str.len().max()
        lines += [f"    {row['baseline']:<{names}}  {format_tau(row)}" for row in rows.to_dict("records")]
    return "\n".join(lines)


def family_text(results: StudyResults, phase: str, width: int = TEXT_WIDTH) -> str:
    """The networks a phase yields, in the order it found them; empty if it marked none."""
    rows = family(results.phase(phase))
    names = [name for name in (*COST_METRICS, *(metric.name for metric in results.objectives.get(phase, ()))) if name in rows]
    lines = []
    for row in rows.to_dict("records"):
        values = ", ".join(f"{name} {format_value(row[name])}" for name in names)
        scored = f" (scored: {str(row['proxy_digest'])[:SHORT_DIGEST]})" if row.get("proxy_digest") else ""
        digests = f"{row['digest'][:SHORT_DIGEST]}{scored}"
        label = shortened_in_the_middle(row["label"], max(width - 7 - len(digests), LEAST_LABEL_WIDTH))
        lines += [f"{int(row['family_step']):>3}  {label}  {digests}", _wrapped(values, width, indent=5)]
    return "\n".join(lines)


def _wrapped(text: str, width: int, *, indent: int = 0) -> str:
    spaces = " " * indent
    return textwrap.fill(text, width, initial_indent=spaces, subsequent_indent=spaces, break_long_words=False, break_on_hyphens=False)


def markdown(report: StudyReport, top: int = 5) -> str:
    """A short description of the study with the head of each phase's leaderboard."""
    results = report.results
    blocks = [f"## {results.provenance.study_name}"]
    for phase in results.phases:
        blocks.append(f"### {phase}")
        if phase in results.designed:
            blocks.append(results.summary(phase))
            continue
        names = [metric.name for metric in results.objectives.get(phase, ())]
        rows = results.phase(phase)
        names += [name for name in COST_METRICS if name in rows and name not in names]
        lines = [f"| rank | label | digest | {' | '.join(names)} |", "|---:|---|---|" + "---:|" * len(names)]
        for row in rows.head(top).to_dict("records"):
            label = str(row["label"]).replace("|", "\\|")
            cells = [f"{row['rank']}{'*' if row['is_front'] else ''}", label, f"`{row['digest'][:SHORT_DIGEST]}`"]
            lines.append(f"| {' | '.join([*cells, *(format_value(row[name]) for name in names)])} |")
        blocks += [results.summary(phase) + " (* on the Pareto front)", "\n".join(lines)]
    for effects in report.effects:
        blocks += [f"### effects: {effects.phase}", effects.registration + ".", effects_markdown(effects)]
    if report.effects_failure:
        blocks.append(report.effects_failure)
    if report.answer:
        blocks.insert(1, f"### {report.answer.title}\n\n```\n{report.answer.text}\n```")
    provenance = [f"- {title}: {text}" for title, text in results.provenance.lines() if title not in ("study", "store")]
    return "\n\n".join([*blocks, "\n".join(provenance), "The whole table: `leaderboard.csv`, `leaderboard.html` among the artifacts."])

"""A study for a terminal of 120 columns, and its short description in Markdown."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from results.effects.text import TEXT_WIDTH, effects_markdown, effects_summary
from results.formats import count, format_tau, format_value, shortened
from results.records import stderr_name
from results.study_results import COST_METRICS, agreement, family

if TYPE_CHECKING:
    import pandas as pd

    from results.report import StudyReport
    from results.study_results import StudyResults

SHORT_DIGEST = 8


def print_results(report: StudyReport, top: int, place: str = "") -> None:
    """Print the head of every phase's table, the family it grew, what the expensive scores add, and the effects of its design.

    `place` are the flags that the commands which are named need to find the study (`results.paths.place_flags`).
    """
    results = report.results
    if not results.phases:
        num_failed = sum(sum(kinds.values()) for kinds in results.num_failed.values())
        print(f"study {results.provenance.study_name!r} has no finished trial yet ({num_failed} failed)")
    for phase in results.phases:
        print(textwrap.fill(f"{results.provenance.study_name}/{phase}: {results.summary(phase)}", TEXT_WIDTH) + "\n")
        print(text_table(results, phase, top, place) + "\n")
        if text := family_text(results, phase):
            print(f"the family, in the order it grew:\n{text}\n")
        if text := agreement_text(agreement(results, phase)):
            print(f"what the expensive scores add over what costs nothing:\n{text}\n")
    for effects in report.effects:
        print(effects_summary(effects))
    if report.effects_failure:
        print(report.effects_failure)
    print_answer(report)


def print_answer(report: StudyReport) -> None:
    """Print what the study answers, or why it cannot yet; nothing for a study without a question."""
    if report.answer:
        print(f"{report.answer.title}\n\n{report.answer.text}\n")
    elif report.answer_failure:
        print(report.answer_failure)


def text_table(results: StudyResults, phase: str, top: int, place: str = "") -> str:
    """The best of a phase for a terminal of 120 columns."""
    rows = results.phase(phase)
    names = results.metric_names(phase)
    errors = {stderr_name(name) for name in names} & set(names)
    shown = rows.head(top)
    columns = [
        ("rank", [f"{rank}{'*' if is_front else ' '}" for rank, is_front in zip(shown["rank"], shown["is_front"], strict=True)]),
        ("digest", [digest[:SHORT_DIGEST] for digest in shown["digest"]]),
        ("trial", [str(number) for number in shown["trial"]]),
    ]
    label_width = min(max([len(label) for label in shown["label"]], default=5), 46)
    left = TEXT_WIDTH - label_width - sum(max(map(len, [title, *cells])) + 2 for title, cells in columns)
    num_hidden = 0
    for name in [name for name in names if name not in errors] + [name for name in ("elapsed_s",) if name in shown]:
        cells = [format_value(value) for value in shown[name]]
        if stderr_name(name) in errors:
            spread = [format_value(value, digits=2) for value in shown[stderr_name(name)]]
            cells = [f"{cell} ±{error}" for cell, error in zip(cells, spread, strict=True)]
        width = max(map(len, [name, *cells])) + 2
        if width > left:
            num_hidden += 1
            continue
        left -= width
        columns.append((name, cells))
    columns.insert(1, ("label", [shortened(label, label_width) for label in shown["label"]]))
    lines = []
    widths = [max(map(len, [title, *cells])) for title, cells in columns]
    for cells in [[title for title, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]:
        aligned = [
            cell.ljust(width) if title in ("label", "digest") else cell.rjust(width)
            for cell, width, (title, _) in zip(cells, widths, columns, strict=True)
        ]
        lines.append("  ".join(aligned).rstrip())
    notes, command = ["* on the Pareto front"], f"python -m results.leaderboard {results.provenance.study_name}{place}"
    if len(rows) > top:
        notes.append(f"{count(len(rows) - top, 'more row')}: {command} --top {len(rows)}")
    if num_hidden:
        notes.append(f"{count(num_hidden, 'more column')}: {command} --csv FILE")
    return "\n".join([*lines, *textwrap.wrap("; ".join(notes), TEXT_WIDTH, break_on_hyphens=False)])


def agreement_text(table: pd.DataFrame) -> str:
    """The agreement table, a line per expensive score, at most 120 columns."""
    lines = []
    for score, rows in table.groupby("score", sort=False):
        lines.append(f"{score}, Kendall's tau-b [95 % bootstrap interval], n = {rows['n'].max()}:")
        lines += [f"    {row['baseline']:<32}{format_tau(row)}" for row in rows.to_dict("records")]
    return "\n".join(lines)


def family_text(results: StudyResults, phase: str) -> str:
    """The networks a phase yields, in the order it found them; empty if it marked none."""
    rows = family(results.phase(phase))
    names = [name for name in (*COST_METRICS, *(metric.name for metric in results.objectives.get(phase, ()))) if name in rows]
    lines = []
    for row in rows.to_dict("records"):
        values = ", ".join(f"{name} {format_value(row[name])}" for name in names)
        scored = f" (scored: {str(row['proxy_digest'])[:SHORT_DIGEST]})" if row.get("proxy_digest") else ""
        lines.append(f"{int(row['family_step']):>3}  {shortened(row['label'], 60)}  {row['digest'][:SHORT_DIGEST]}{scored}\n     {values}")
    return "\n".join(lines)


def markdown(report: StudyReport, top: int = 5) -> str:
    """A short description of the study with the head of each phase's leaderboard."""
    results = report.results
    blocks = [f"## {results.provenance.study_name}"]
    for phase in results.phases:
        names = [metric.name for metric in results.objectives.get(phase, ())]
        rows = results.phase(phase)
        names += [name for name in COST_METRICS if name in rows and name not in names]
        lines = [f"| rank | label | digest | {' | '.join(names)} |", "|---:|---|---|" + "---:|" * len(names)]
        for row in rows.head(top).to_dict("records"):
            label = str(row["label"]).replace("|", "\\|")
            cells = [f"{row['rank']}{'*' if row['is_front'] else ''}", label, f"`{row['digest'][:SHORT_DIGEST]}`"]
            lines.append(f"| {' | '.join([*cells, *(format_value(row[name]) for name in names)])} |")
        blocks += [f"### {phase}", results.summary(phase) + " (* on the Pareto front)", "\n".join(lines)]
    for effects in report.effects:
        blocks += [f"### effects: {effects.phase}", effects.registration + ".", effects_markdown(effects)]
    if report.effects_failure:
        blocks.append(report.effects_failure)
    if report.answer:
        blocks.insert(1, f"### {report.answer.title}\n\n```\n{report.answer.text}\n```")
    provenance = [f"- {title}: {text}" for title, text in results.provenance.lines() if title not in ("study", "store")]
    return "\n\n".join([*blocks, "\n".join(provenance), "The whole table: `leaderboard.csv`, `leaderboard.html` among the artifacts."])

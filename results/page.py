"""The leaderboard as one HTML page: figures, sortable tables, provenance. It loads nothing from anywhere."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.effects.text import published_sources, reading_notes
from results.figures import forest, leaderboard, web
from results.figures.leaderboard import MAX_PLOTTED, Panel
from results.formats import format_effect, format_interval, format_loss_fall, format_mean, format_tau, format_value
from results.records import stderr_name
from results.study_results import agreement, family
from results.text import SHORT_DIGEST

if TYPE_CHECKING:
    from results.effects.study import Effects
    from results.report import StudyReport
    from results.study_results import StudyResults

MAX_ROWS = 1000
"""Rows of a table; beyond this a browser sorts slowly, and nobody reads on."""

STYLE = """
.scroll { overflow: auto; max-height: 640px; border: 1px solid var(--grid); border-radius: 8px; }
.scroll > pre { margin: 0; padding: 12px 16px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; width: 100%; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { position: sticky; top: 0; background: var(--wash); font-weight: 600; }
th.sortable { cursor: pointer; user-select: none; } th.sortable:hover { color: var(--front); }
th[aria-sort=ascending]::after { content: " \\25B4"; } th[aria-sort=descending]::after { content: " \\25BE"; }
td.text, th.text { text-align: left; } td.code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 12px; }
tr.front td:first-child { box-shadow: inset 3px 0 var(--front); } tr.front td:first-child { font-weight: 700; }
td.wrap { text-align: left; white-space: normal; min-width: 20ch; } td.verdict { min-width: 40ch; }
tbody tr:hover { background: var(--wash); } .error { color: var(--soft); font-size: 12px; }
.narrow { display: inline-block; max-width: 100%; } .narrow table { width: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; font-size: 13px; margin: 12px 0 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
input { font: inherit; font-size: 13px; padding: 5px 10px; border: 1px solid var(--grey); border-radius: 6px; width: 280px;
  margin: 0 0 8px; background: var(--paper); color: inherit; }
input::placeholder { color: var(--soft); opacity: 1; }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.board")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const isNumber = !head.classList.contains("text");
    const compare = (a, b) => isNumber
      ? (a === "" ? 1 : b === "" ? -1 : (ascending ? 1 : -1) * (a - b))
      : (ascending ? 1 : -1) * a.localeCompare(b);
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  }));
  const filter = document.getElementById(table.dataset.filter);
  filter.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.dataset.search.includes(wanted);
  });
}
"""


def write_html(report: StudyReport, path: Path) -> None:
    """One page that needs nothing else."""
    path.write_text(render(report), encoding="utf-8")


def render(report: StudyReport) -> str:
    """The page's text."""
    results = report.results
    grid = {row[0].phase: row for row in leaderboard.panels(results)}
    provenance = "".join(f"<dt>{escape(title)}</dt><dd>{escape(text)}</dd>" for title, text in results.provenance.lines())
    sections = "".join(_section(results, phase, grid.get(phase, [])) for phase in results.phases) or "<p>No finished trial yet.</p>"
    effects = "".join(_effects(one) for one in report.effects)
    if report.effects_failure:
        effects += f"<p>{escape(report.effects_failure)}.</p>"
    body = f"<dl>{provenance}</dl>{_answer(report)}{effects}{sections}"
    return web.page(f"{results.provenance.study_name}: leaderboard", body, style=STYLE, script=SCRIPT)


def _section(results: StudyResults, phase: str, row: list[Panel]) -> str:
    parts = [f"<h2>{escape(phase)}</h2><p>{escape(results.summary(phase))}</p>"]
    if row:
        parts.append(leaderboard.charts(row))
        num_points = len(results.phase(phase))
        if num_points > MAX_PLOTTED:
            parts.append(f"<p>Drawn are the front and the {MAX_PLOTTED} best of {num_points} measurements.</p>")
    if text := _family(results, phase):
        parts.append(f"<h3>The family, in the order it grew</h3>{text}")
    parts.append(_board(results, phase))
    if text := _agreement(results, phase):
        parts.append(f"<h3>What the expensive scores add</h3>{text}")
    return "".join(parts)


def _answer(report: StudyReport) -> str:
    if report.answer is None:
        return f"<p>{escape(report.answer_failure)}</p>" if report.answer_failure else ""
    title = escape(report.answer.title)
    chart = web.charts([web.chart(report.answer.figure, "")], web.legend(report.answer.legend)) if report.answer.figure else ""
    return f'<h2>{title}</h2>{chart}<div class="scroll"><pre>{escape(report.answer.text)}</pre></div>'


def _effects(effects: Effects) -> str:
    """Mean and spread of every level, the forest plot, and a row per contrast, primary ones first."""
    figure = forest.charts(effects.table) if effects.is_measured else ""
    names = ("effect", "95 % interval", "p", "Holm p", "90 % interval", "MDE", "published", "seeds")
    heads = "".join(f'<th class="text">{name}</th>' for name in ("contrast", "outcome", "verdict"))
    heads += "".join(f"<th>{name}</th>" for name in names)
    lines = []
    for row in effects.table.to_dict("records"):
        cells = ["-"] * len(names)
        if row["n_seeds"]:
            unit = row["unit"]
            side = "" if row["alternative"] == "two-sided" else " one-sided"
            cells = [f"{format_effect(row['effect'], unit)} {unit}", format_interval(row["low"], row["high"], unit)]
            cells += [format_value(row["p"], 2) + side, format_value(row["p_holm"], 2)]
            cells.append(format_interval(row["low_90"], row["high_90"], unit))
            cells += [format_effect(row["mde"], unit).lstrip("+"), format_effect(row["published"], unit), str(row["n_seeds"])]
        head = f'<td class="wrap">{escape(row["factor"])}: {escape(row["contrast"])}</td><td class="text">{escape(row["outcome"])}</td>'
        head += f'<td class="wrap verdict">{escape(row["verdict"])}</td>'
        primary = ' class="front"' if row["is_primary"] else ""
        lines.append(f"<tr{primary}>{head}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    reading = f"A red edge marks primary contrasts; {'; '.join(reading_notes(effects.table))}"
    notes = (effects.registration, reading, *published_sources(effects.table))
    note = "".join(f"<p>{escape(line)}.</p>" for line in notes)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<h2>Effects: {escape(effects.phase)}</h2>{note}{_levels(effects)}{figure}<div class="scroll">{table}</div>'


def _levels(effects: Effects) -> str:
    outcomes = list(dict.fromkeys(effects.levels["outcome"]))
    lines = []
    for _, rows in effects.levels.groupby(["factor", "level"], sort=False):
        cells = "".join(f"<td>{format_mean(row['mean'], row['sd'], row['unit'])}</td>" for row in rows.to_dict("records"))
        first = rows.iloc[0]
        text = f'<td class="text">{escape(first["factor"])}: {escape(first["level"])}</td>'
        cells += f"<td>{format_loss_fall(first)}</td><td>{first['n_seeds']}</td>"
        lines.append(f'<tr>{text}{cells}<td class="text">{escape(first["missing"])}</td></tr>')
    heads = '<th class="text">level: mean ± sd over seeds</th>' + "".join(f"<th>{escape(name)}</th>" for name in outcomes)
    heads += '<th>loss still fell</th><th>seeds</th><th class="text">missing</th>'
    return f'<div class="scroll narrow"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _board(results: StudyResults, phase: str) -> str:
    rows = results.phase(phase)
    columns = [*results.metric_names(phase), *(["elapsed_s"] if "elapsed_s" in rows else [])]
    errors = {stderr_name(name) for name in columns} & set(columns)
    columns = [name for name in columns if name not in errors]
    has_proxy = "proxy_digest" in rows
    heads = _head("rank") + _head("network", "text") + _head("digest", "text") + (_head("scored", "text") if has_proxy else "")
    heads += _head("trial") + "".join(_head(name) for name in columns)
    lines = []
    for row in rows.head(MAX_ROWS).to_dict("records"):
        cells = [_cell(row["rank"]), f'<td class="text code">{escape(str(row["label"]))}</td>', _digest(row["digest"])]
        if has_proxy:
            cells.append(_digest(row["proxy_digest"]))
        cells.append(_cell(row["trial"]))
        cells += [_cell(row[name], row[stderr_name(name)] if stderr_name(name) in errors else None) for name in columns]
        searched = escape(f"{row['label']} {row['digest']} {row.get('proxy_digest') or ''}".lower(), quote=True)
        is_front = ' class="front"' if row["is_front"] else ""
        lines.append(f'<tr{is_front} data-search="{searched}">{"".join(cells)}</tr>')
    capped = f" Shown are the {MAX_ROWS} best of {len(rows)}; the CSV has all." if len(rows) > MAX_ROWS else ""
    note = f"<p>A red edge marks the Pareto front. Click a heading to sort.{capped}</p>"
    identity = f"filter-{escape(phase, quote=True)}"
    return (
        f'<h3>All measurements</h3>{note}<input id="{identity}" type="search" placeholder="filter by network or digest">'
        f'<div class="scroll"><table class="board" data-filter="{identity}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _family(results: StudyResults, phase: str) -> str:
    rows = family(results.phase(phase))
    if not len(rows):
        return ""
    has_proxy = "proxy_digest" in rows
    names = results.metric_names(phase)
    errors = {stderr_name(name) for name in names}
    names = [name for name in names if name not in errors]
    columns = [
        ("step", False),
        ("network", True),
        ("digest", True),
        *([("scored", True)] if has_proxy else []),
        *((name, False) for name in names),
    ]
    heads = "".join(f"<th{' class=text' if is_text else ''}>{escape(name)}</th>" for name, is_text in columns)
    lines = []
    for row in rows.to_dict("records"):
        cells = [_cell(row["family_step"]), f'<td class="text code">{escape(str(row["label"]))}</td>', _digest(row["digest"])]
        if has_proxy:
            cells.append(_digest(row["proxy_digest"]))
        lines.append(f"<tr>{''.join(cells)}{''.join(_cell(row[name]) for name in names)}</tr>")
    note = "<p>Scores are those of the scored network (the narrow proxy), costs those of the reported one.</p>" if has_proxy else ""
    return f'{note}<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _agreement(results: StudyResults, phase: str) -> str:
    table = agreement(results, phase)
    if not len(table):
        return ""
    scores, baselines = list(dict.fromkeys(table["score"])), list(dict.fromkeys(table["baseline"]))
    found = {(row["score"], row["baseline"]): row for row in table.to_dict("records")}
    heads = '<th class="text">score</th>' + "".join(f"<th>{escape(name)}</th>" for name in baselines) + "<th>n</th>"
    lines = []
    for score in scores:
        cells = "".join(f"<td>{format_tau(found[score, baseline])}</td>" for baseline in baselines)
        lines.append(f'<tr><td class="text">{escape(score)}</td>{cells}<td>{found[score, baselines[0]]["n"]}</td></tr>')
    note = (
        "<p>Kendall's tau-b [95 % bootstrap interval over networks] between each score and what costs nothing to know."
        " Near +1 or -1 the score orders networks as the cheap number does and adds little; near 0 it says something else.</p>"
    )
    rows = "".join(lines)
    return f'{note}<div class="scroll narrow"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _head(name: str, kind: str = "") -> str:
    return f'<th class="sortable {kind}">{escape(name)}</th>'


def _cell(value: Any, error: Any = None) -> str:
    key = "" if value is None or value != value else repr(float(value))
    spread = f' <span class="error">± {format_value(error, digits=2)}</span>' if error is not None and error == error else ""
    return f'<td data-value="{key}">{format_value(value)}{spread}</td>'


def _digest(digest: Any) -> str:
    return f'<td class="text code" title="{digest}">{str(digest)[:SHORT_DIGEST]}</td>' if isinstance(digest, str) else "<td></td>"

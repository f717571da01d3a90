"""The figures of a study: each objective against what the network costs, with the fronts.

PNG by matplotlib for papers and README, the same panels by plotly for the page. There are two fronts. The line is the best score of all
networks with at most so many MACs; the filled points are the networks on the Pareto front of all objectives. Where networks differ in no
cost, scores stand over the trials, and the line is the best so far.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from results.figures import web
from results.figures.style import BEST, FAMILY, FRONT, GREY, GRID, INK, LINE, PAPER, SOFT, STYLE
from results.formats import count, format_value
from results.pareto import pareto_front, to_minimize
from results.records import Metric, stderr_name

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from matplotlib.axes import Axes

    from results.study_results import StudyResults

MAX_PLOTTED = 5000
MAX_HOVER_PARAMS = 16
LOG_TICKS = (1.0, 2.0, 5.0)
AXIS_TITLES = {
    "gmacs": "GMACs",
    "params_m": "parameters (millions)",
    "depth": "depth (blocks)",
    "val_top1_pct": "validation accuracy (%)",
    "test_top1_pct": "test accuracy (%)",
    "length_distortion": "length distortion $L^E$",
    "ntk_condition": "NTK condition number $\\kappa$",
}


@dataclass(frozen=True)
class Panel:
    """One objective of a phase over one cost, or over "trial", and the rows that have both."""

    phase: str
    cost: str
    metric: Metric
    rows: pd.DataFrame

    @property
    def better(self) -> str:
        return "higher is better" if self.metric.goal == "maximize" else "lower is better"

    @property
    def line(self) -> str:
        """What the line along the best is called."""
        return "best so far" if self.cost == "trial" else "best at this cost"

    @property
    def error(self) -> str | None:
        name = stderr_name(self.metric.name)
        return name if name in self.rows else None

    def cost_front(self) -> pd.DataFrame:
        """The best score at each cost, cheapest first."""
        costs = to_minimize(self.rows[[self.cost, self.metric.name]].to_numpy(dtype=float), ["minimize", self.metric.goal])
        return self.rows.loc[pareto_front(costs)].sort_values(by=self.cost)

    def is_log(self, name: str, ratio: float) -> bool:
        values = self.rows[name].to_numpy(dtype=float)
        return bool(values.min() > 0 and values.max() / values.min() > ratio)


def panels(results: StudyResults) -> list[list[Panel]]:
    """A row per phase: its first two objectives, or its only one over MACs and over parameters.

    A number that is the same for all networks is no cost to draw them over.
    """
    grid = []
    for phase in results.phases:
        rows = results.phase(phase)
        metrics = [metric for metric in results.objectives.get(phase, ()) if metric.name in rows]
        costs = [name for name in ("gmacs", "params_m") if name in rows and len(set(rows[name].dropna())) > 1] or ["trial"]
        pairs = [(costs[0], metric) for metric in metrics[:2]]
        if len(metrics) == 1 and len(costs) > 1:
            pairs.append((costs[1], metrics[0]))
        row = [Panel(phase, cost, metric, _drawn(rows.dropna(subset=[cost, metric.name]))) for cost, metric in pairs]
        if row := [panel for panel in row if len(panel.rows)]:
            grid.append(row)
    return grid


def _drawn(rows: pd.DataFrame) -> pd.DataFrame:
    """All rows; of more than `MAX_PLOTTED`, only the front, the family and the best."""
    if len(rows) <= MAX_PLOTTED:
        return rows
    is_kept = rows["is_front"].to_numpy(dtype=bool) | (np.arange(len(rows)) < MAX_PLOTTED)
    if "family_step" in rows:
        is_kept |= rows["family_step"].notna().to_numpy()
    return rows.loc[is_kept]


def write_png(results: StudyResults, path: Path) -> None:
    """The panels at README width (1800 pixels)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = panels(results)
    with rc_context({**STYLE, "mathtext.fontset": "dejavuserif"}):
        num_columns = max((len(row) for row in grid), default=1)
        figure = Figure(figsize=(11, 0.8 + 4.1 * max(len(grid), 1)), dpi=164, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(max(len(grid), 1), num_columns, squeeze=False)
        for row_axes, row in zip(axes, grid or [[]], strict=True):
            for axis, panel in zip(row_axes, row, strict=False):
                _draw(axis, panel)
            for axis in row_axes[len(row) :]:
                axis.set_axis_off()
        handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        if handles:
            figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
        figure.suptitle(
            f"{results.provenance.study_name}: {len(results.frame)} measurements on {', '.join(results.provenance.devices) or 'no device'}",
            fontsize=13,
            fontweight="bold",
            x=0.01,
            ha="left",
        )
        figure.savefig(path, format="png", metadata={"Source": results.provenance.study_name})


def _draw(axis: Axes, panel: Panel) -> None:
    name, rows, front = panel.metric.name, panel.rows, panel.cost_front()
    x, y = panel.cost, name
    size = 26 if len(rows) < 300 else 12
    axis.set_axisbelow(True)
    axis.grid(color=GRID, linewidth=0.8)
    axis.scatter(rows[x], rows[y], s=size, c=GREY, alpha=0.65, linewidths=0, label="measured")
    best_so_far = front[y].iloc[-1]
    right = rows[x].max()
    axis.step([*front[x], right], [*front[y], best_so_far], where="post", color=LINE, linewidth=1.4, label=panel.line, zorder=3)
    members = rows.loc[rows["is_front"]]
    if panel.error and len(members) <= 60:
        axis.errorbar(members[x], members[y], yerr=members[panel.error], fmt="none", ecolor=FRONT, elinewidth=0.9, alpha=0.6, zorder=3)
    axis.scatter(members[x], members[y], s=size * 1.5, c=FRONT, edgecolors="white", linewidths=0.5, label="Pareto front", zorder=4)
    if "family_step" in rows:
        family = rows.dropna(subset=["family_step"]).sort_values(by="family_step")
        axis.plot(
            family[x], family[y], color=FAMILY, linewidth=1.8, marker="D", markersize=5.5, label="family", zorder=5, mec="white", mew=0.7
        )
    best = rows.loc[rows["rank"] == 1]
    axis.scatter(best[x], best[y], s=190, marker="*", c=BEST, edgecolors=INK, linewidths=0.8, label="rank 1", zorder=6)
    if panel.is_log(x, 10):
        _log_axis(axis.set_xscale, axis.xaxis)
    if panel.is_log(y, 20):
        axis.set_yscale("log")
    axis.set_xlabel(AXIS_TITLES.get(x, x))
    axis.set_ylabel(AXIS_TITLES.get(y, y))
    axis.set_title(f"{panel.phase}: {panel.better}", fontsize=10.5, loc="left", color=SOFT)


def _log_axis(set_scale: Any, axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=LOG_TICKS))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def charts(row: Sequence[Panel]) -> str:
    """The panels of one phase as HTML; hovering names the network and its parameters."""
    shown = [
        ("circle", GREY, "measured"),
        *(("line", LINE, line) for line in dict.fromkeys(panel.line for panel in row)),
        ("circle", FRONT, "Pareto front"),
        *([("diamond", FAMILY, "family")] if any("family_step" in panel.rows for panel in row) else []),
        ("star", BEST, "rank 1"),
    ]
    return web.charts((web.chart(panel_figure(panel), _html_title(panel.metric.name), panel.better) for panel in row), web.legend(shown))


def panel_figure(panel: Panel) -> go.Figure:
    """One panel, interactive."""
    import plotly.graph_objects as go

    x, y, rows, front = panel.cost, panel.metric.name, panel.rows, panel.cost_front()

    def points(shown: pd.DataFrame, title: str, mode: str = "markers", **look: Any) -> Any:
        text = _hover(shown, panel)
        places = {"x": shown[x].tolist(), "y": shown[y].tolist()}
        return go.Scatter(**places, name=title, mode=mode, text=text, hovertemplate="%{text}<extra></extra>", **look)

    members = rows.loc[rows["is_front"]]
    bars: dict[str, Any] = (
        {"error_y": {"type": "data", "array": members[panel.error].tolist(), "thickness": 1, "width": 0}} if panel.error else {}
    )
    traces = [
        points(rows, "measured", marker={"color": GREY, "size": 7, "opacity": 0.65}),
        go.Scatter(
            x=[*front[x], rows[x].max()],
            y=[*front[y], front[y].iloc[-1]],
            name=panel.line,
            mode="lines",
            line={"color": LINE, "width": 1.6, "shape": "hv"},
            hoverinfo="skip",
        ),
        points(members, "Pareto front", marker={"color": FRONT, "size": 10, "line": {"color": PAPER, "width": 1}}, **bars),
    ]
    if "family_step" in rows:
        family = rows.dropna(subset=["family_step"]).sort_values(by="family_step")
        marker = {"color": FAMILY, "size": 9, "symbol": "diamond"}
        traces.append(points(family, "family", "lines+markers", marker=marker, line={"color": FAMILY, "width": 2}))
    star = {"color": BEST, "size": 16, "symbol": "star", "line": {"color": INK, "width": 1}}
    traces.append(points(rows.loc[rows["rank"] == 1], "rank 1", marker=star))
    figure = go.Figure(traces, layout=web.LAYOUT)
    figure.update_xaxes(title=_html_title(x), **web.AXIS, **(_log_ticks(rows[x].to_numpy(dtype=float)) if panel.is_log(x, 10) else {}))
    figure.update_yaxes(**web.AXIS, **(_log_ticks(rows[y].to_numpy(dtype=float)) if panel.is_log(y, 20) else {}))
    return figure


def _log_ticks(values: np.ndarray) -> dict[str, Any]:
    """A logarithmic axis with full numbers at its ticks; plotly's own show 0.5 as a small 5."""
    from matplotlib.ticker import LogLocator

    ticks = list(LogLocator(subs=LOG_TICKS).tick_values(values.min(), values.max()))
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _hover(rows: pd.DataFrame, panel: Panel) -> list[str]:
    texts = []
    for row in rows.to_dict("records"):
        score = format_value(row[panel.metric.name])
        if panel.error:
            score += f" ± {format_value(row[panel.error], digits=2)}"
        chosen = [f"{name} = {value}" for name, value in json.loads(row["params"]).items()]
        lines = [f"{row['digest']}  rank {row['rank']}, trial {row['trial']}"]
        lines += [f"{panel.metric.name} {score}", f"{panel.cost} {format_value(row[panel.cost])}"]
        lines.append(", ".join(chosen[:MAX_HOVER_PARAMS]))
        if len(chosen) > MAX_HOVER_PARAMS:
            lines.append(f"and {count(len(chosen) - MAX_HOVER_PARAMS, 'more parameter')}")
        texts.append(web.hover_text(str(row["label"]), lines))
    return texts


def _html_title(name: str) -> str:
    return AXIS_TITLES.get(name, escape(name)).replace("$L^E$", "L<sup>E</sup>").replace("$\\kappa$", "κ")

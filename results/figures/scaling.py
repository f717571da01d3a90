"""Scaling laws: the measured points, the fitted curve and its 95 % band, for papers (PNG) and for a browser (HTML).

Several laws share one panel, as a fit of ours and a published curve; their labels tell them apart. A law of two variables is drawn as
measured over fitted values.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from results.figures import web
from results.figures.style import BLUE, BROWN, FAMILY, FRONT, GRID, OLIVE, PAPER, SOFT, STYLE, VIOLET
from results.records import write_bytes_atomically
from results.scaling_laws.law import Law

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOURS = (FRONT, FAMILY, BLUE, VIOLET, BROWN, OLIVE)
NUM_CURVE_POINTS = 60
MAX_TICKS = 8
"""Up to so many distinct x are ticks of their own; more of them get a logarithmic axis's."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """`x` and `y` are a law's points, `line_x` and `line_y` its curve, `low` and `high` the band, nan where there is none."""

    label: str
    colour: str
    x: np.ndarray
    y: np.ndarray
    line_x: np.ndarray
    line_y: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def has_band(self) -> bool:
        return bool(np.isfinite(self.low).any())


def write_png(laws: Mapping[str, Law], path: Path, *, title: str) -> None:
    """The figure at README width; raises ValueError if the laws are not of the same variables."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    drawn = _drawn(laws)
    x_title, y_title = _titles(laws)
    with rc_context(STYLE):
        figure = Canvas(figsize=(9, 5.2), dpi=164, layout="constrained")
        FigureCanvasAgg(figure)
        axis: Any = figure.subplots()
        axis.set_axisbelow(True)
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_xscale("log")
        for one in drawn:
            if one.has_band:
                axis.fill_between(one.line_x, one.low, one.high, color=one.colour, alpha=0.15, linewidth=0)
            axis.plot(one.line_x, one.line_y, color=one.colour, linewidth=1.8)
            axis.scatter(one.x, one.y, s=30, color=one.colour, edgecolors=PAPER, linewidths=0.7, label=one.label, zorder=3)
        if ticks := _ticks(laws):
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
            axis.set_xticks([], minor=True)
        axis.set_xlabel(x_title, color=SOFT)
        axis.set_ylabel(y_title, color=SOFT)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    write_bytes_atomically(path, buffer.getvalue())


def write_html(laws: Mapping[str, Law], path: Path, *, title: str) -> None:
    """The same as a page that loads nothing; hovering over a point shows its numbers."""
    drawn = _drawn(laws)
    entries = [("circle", one.colour, one.label) for one in drawn]
    bands = [("band", GRID, "95 % interval of the curve")] if any(one.has_band for one in drawn) else []
    body = web.charts([web.chart(page_figure(laws), escape(_titles(laws)[1]))], web.legend([*entries, *bands]))
    write_bytes_atomically(path, web.page(title, body).encode())


def page_figure(laws: Mapping[str, Law]) -> Figure:
    """The figure for a page."""
    from plotly.graph_objects import Figure

    x_title, y_title = _titles(laws)
    figure = Figure(layout=web.LAYOUT)
    drawn = _drawn(laws)
    # The colours of a page are variables, which know no transparency: bands lie below everything else.
    for one in drawn:
        if one.has_band:
            edge = {"mode": "lines", "line": {"width": 1, "dash": "dot", "color": one.colour}, "hoverinfo": "skip"}
            figure.add_scatter(x=one.line_x.tolist(), y=one.low.tolist(), **edge)
            figure.add_scatter(x=one.line_x.tolist(), y=one.high.tolist(), fill="tonexty", fillcolor=GRID, **edge)
    for one in drawn:
        figure.add_scatter(x=one.line_x.tolist(), y=one.line_y.tolist(), mode="lines", line={"color": one.colour}, hoverinfo="skip")
        figure.add_scatter(
            x=one.x.tolist(),
            y=one.y.tolist(),
            mode="markers",
            marker={"color": one.colour, "size": 8},
            hovertemplate=f"{escape(x_title)} %{{x:.4g}}<br>{escape(y_title)} %{{y:.4g}}<extra>{escape(one.label)}</extra>",
        )
    ticks = _ticks(laws)
    figure.update_xaxes(
        type="log", title=x_title, **web.AXIS, **({"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]} if ticks else {})
    )
    figure.update_yaxes(**web.AXIS)
    return figure


def _drawn(laws: Mapping[str, Law]) -> list[Drawn]:
    if len({(law.points.x_names, law.points.y_name) for law in laws.values()}) != 1:
        raise ValueError("laws of one figure have the same variables, got " + "; ".join(dict.fromkeys(map(_variables, laws.values()))))
    parts = _along_one_variable if _num_variables(laws) == 1 else _measured_over_fitted
    return [Drawn(label=label, colour=COLOURS[place % len(COLOURS)], **parts(law)) for place, (label, law) in enumerate(laws.items())]


def _variables(law: Law) -> str:
    return f"{law.points.y_name} over {', '.join(law.points.x_names)}"


def _num_variables(laws: Mapping[str, Law]) -> int:
    return len(next(iter(laws.values())).points.x_names)


def _along_one_variable(law: Law) -> dict[str, np.ndarray]:
    x = law.points.x[:, 0]
    line_x = np.geomspace(x.min(), x.max(), NUM_CURVE_POINTS)
    return {"x": x, "y": law.points.y, "line_x": line_x, "line_y": law.curve(line_x[:, None]), **_band(law, line_x[:, None])}


def _measured_over_fitted(law: Law) -> dict[str, np.ndarray]:
    fitted = law.curve(law.points.x)
    order = np.argsort(fitted)
    return {"x": fitted, "y": law.points.y, "line_x": fitted[order], "line_y": fitted[order], **_band(law, law.points.x[order])}


def _band(law: Law, x: np.ndarray) -> dict[str, np.ndarray]:
    intervals = [law.interval_at(at) for at in x]
    low = np.array([np.nan if one.low is None else one.low for one in intervals])
    high = np.array([np.nan if one.high is None else one.high for one in intervals])
    return {"low": low, "high": high}


def _titles(laws: Mapping[str, Law]) -> tuple[str, str]:
    law = next(iter(laws.values()))
    y = law.points.y_name
    return (law.points.x_names[0], y) if len(law.points.x_names) == 1 else (f"{y}, fitted: {law.form.formula}", f"{y}, measured")


def _ticks(laws: Mapping[str, Law]) -> list[float]:
    if _num_variables(laws) == 2:
        return []
    distinct = np.unique(np.concatenate([law.points.x[:, 0] for law in laws.values()])).tolist()
    return distinct if len(distinct) <= MAX_TICKS else []

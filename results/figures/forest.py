"""The forest plot of an ablation: a panel per outcome, a row per contrast, each effect with its interval.

PNG by matplotlib for papers and README, the same by plotly for a page. Diamonds are primary contrasts; a filled mark is an
effect whose test rejects (Holm-corrected where it is not primary) and whose interval excludes 0, a hollow one any other. A cross is an
effect of arms that had not converged.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from results.figures import web
from results.figures.style import BEST, FRONT, GRID, INK, PAPER, SOFT, STYLE
from results.formats import format_effect, format_interval, format_p

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from matplotlib.axes import Axes

MAX_COLUMNS = 3
LABEL_WIDTH = 32
PAGE_LABEL_WIDTH = 24
"""Characters of a line of a label on a page, where a telephone leaves little room beside it."""

ROW_PIXELS = 36
NAMES = {"primary": "primary contrast", "other": "other contrast", "published": "published effect", "margin": "margin of no harm"}
NOTE = "filled: the test rejects (Holm-corrected if not primary) and the interval excludes 0; a cross: an arm had not converged"


def _places(table: pd.DataFrame) -> dict[tuple[str, str], int]:
    """The line of each (factor, contrast); (factor, "") is the line of the factor's name."""
    places: dict[tuple[str, str], int] = {}
    line = 0
    for factor, rows in table.groupby("factor", sort=False):
        for contrast in ("", *dict.fromkeys(rows["contrast"])):
            places[str(factor), contrast] = line
            line += 1
    return places


def _panels(table: pd.DataFrame) -> list[pd.DataFrame]:
    """The measured rows of each outcome that has any; raises ValueError when none has."""
    measured = table.loc[table["n_seeds"] > 0]
    if not len(measured):
        raise ValueError("no contrast has been measured yet: there is nothing to draw")
    return [rows for _, rows in measured.groupby("outcome", sort=False)]


def _better(rows: pd.DataFrame) -> str:
    return f"{'right' if rows['goal'].iloc[0] == 'maximize' else 'left'} is better"


def _short(contrast: str) -> str:
    """The contrast with a mean over many levels shortened to their number: a row has room for two lines."""
    found = re.fullmatch(r"mean\((.+)\)( - .+)", contrast)
    levels = found[1].split(", ") if found else []
    return f"mean of {len(levels)} levels{found[2]}" if found and len(levels) > 2 else contrast


def _axis_title(rows: pd.DataFrame) -> str:
    return f"effect ({rows['unit'].iloc[0]})" if rows["unit"].iloc[0] else "effect"


def write_png(table: pd.DataFrame, path: Path, title: str) -> None:
    """Draw a table of `effects_table` at README width (1800 pixels)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places, panels = _places(table), _panels(table)
    num_columns = min(len(panels), MAX_COLUMNS)
    num_rows = math.ceil(len(panels) / num_columns)
    with rc_context({**STYLE, "axes.spines.left": False}):
        height = 1.2 + num_rows * (0.9 + 0.33 * len(places))
        figure = Figure(figsize=(11, height), dpi=164, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
        for index, axis in enumerate(axes.flat):
            if index < len(panels):
                _draw(axis, panels[index], places)
            else:
                axis.set_axis_off()
        for axis in axes[:, 0]:
            labels = ["\n".join(textwrap.wrap(_short(contrast) or factor, LABEL_WIDTH)) for factor, contrast in places]
            axis.set_yticks(list(places.values()), labels)
            for (_, contrast), label in zip(places, axis.get_yticklabels(), strict=True):
                label.set_fontweight("normal" if contrast else "bold")
        handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        shown = {name: handles[name] for name in NAMES.values() if name in handles}
        legend = figure.legend(
            list(shown.values()), list(shown), loc="outside lower center", ncols=len(shown), frameon=False, fontsize=10, title=NOTE
        )
        legend.get_title().set(fontsize=10, color=SOFT)
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
        figure.savefig(path, format="png")


def _draw(axis: Axes, rows: pd.DataFrame, places: dict[tuple[str, str], int]) -> None:
    axis.set_axisbelow(True)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    margin = rows["margin"].iloc[0]
    if margin == margin:
        axis.axvspan(-margin, margin, color=GRID, alpha=0.6, linewidth=0, zorder=0, label=NAMES["margin"])
    axis.axvline(0, color=INK, linewidth=1, zorder=1)
    for row in rows.to_dict("records"):
        y = places[row["factor"], row["contrast"]]
        kind, color, marker, size = ("primary", FRONT, "D", 8) if row["is_primary"] else ("other", INK, "o", 7)
        marker = marker if row["is_converged"] is not False else "x"
        axis.plot([row["low"], row["high"]], [y, y], color=color, linewidth=1.7, solid_capstyle="butt", zorder=3)
        axis.plot(
            row["effect"],
            y,
            marker=marker,
            markersize=size,
            markerfacecolor=color if row["is_shown"] else PAPER,
            markeredgecolor=color,
            markeredgewidth=1.5,
            linestyle="none",
            label=NAMES[kind],
            zorder=4,
        )
        if row["published"] == row["published"]:
            look = {"marker": "|", "markersize": 17, "markeredgewidth": 3.2, "linestyle": "none", "color": BEST}
            axis.plot(row["published"], y, **look, label=NAMES["published"], zorder=2)
        axis.text(1.01, y, f"n={row['n_seeds']}", transform=axis.get_yaxis_transform(), va="center", fontsize=8.5, color=SOFT)
    for (_, contrast), y in places.items():
        if not contrast and y:
            axis.axhline(y - 0.5, color=GRID, linewidth=1, zorder=0)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(places) - 0.4, -0.6)
    axis.margins(x=0.06)
    axis.locator_params(axis="x", nbins=6)
    axis.set_xlabel(_axis_title(rows))
    axis.set_title(f"{rows['outcome'].iloc[0]}: {_better(rows)}", fontsize=10.5, loc="left", color=SOFT)


def charts(table: pd.DataFrame) -> str:
    """The panels as HTML; hovering tells an effect's numbers and its verdict. Raises ValueError when nothing has been measured."""
    measured = table.loc[table["n_seeds"] > 0]
    shown = [
        ("diamond", FRONT, NAMES["primary"]),
        *([("circle", INK, NAMES["other"])] if not measured["is_primary"].all() else []),
        *([("bar", BEST, NAMES["published"])] if measured["published"].notna().any() else []),
        *([("band", GRID, NAMES["margin"])] if measured["margin"].notna().any() else []),
    ]
    panels = [web.chart(figure, escape(outcome), better) for outcome, better, figure in panel_figures(table)]
    return web.charts(panels, web.legend(shown) + f"<p>{NOTE}.</p>")


def panel_figures(table: pd.DataFrame) -> Iterator[tuple[str, str, go.Figure]]:
    """Each outcome, in which direction it gets better, and its interactive figure; raises ValueError when nothing has been measured."""
    import plotly.graph_objects as go

    places = _places(table)
    labels = [_page_label(factor, contrast) for factor, contrast in places]
    for rows in _panels(table):
        figure = go.Figure(layout=web.LAYOUT | {"height": 90 + ROW_PIXELS * len(places)})
        for kind, chosen in (("other", rows.loc[~rows["is_primary"]]), ("primary", rows.loc[rows["is_primary"]])):
            if len(chosen):
                figure.add_traces(_traces(chosen, kind, [places[key] for key in zip(chosen["factor"], chosen["contrast"], strict=True)]))
        # After the traces: plotly leaves lines out of a panel that is still empty.
        margin = rows["margin"].iloc[0]
        if margin == margin:
            figure.add_vrect(-margin, margin, fillcolor=GRID, opacity=0.6, layer="below", line_width=0)
        figure.add_vline(0, line={"color": INK, "width": 1}, layer="below")
        figure.update_xaxes(title=_axis_title(rows), rangemode="tozero", nticks=6, **web.AXIS)
        lines = {"tickvals": list(places.values()), "ticktext": labels, "range": [len(places) - 0.4, -0.6]}
        figure.update_yaxes(**web.AXIS | {"showgrid": False, "ticks": ""}, **lines)
        yield str(rows["outcome"].iloc[0]), _better(rows), figure


def _page_label(factor: str, contrast: str) -> str:
    lines = [escape(line) for line in textwrap.wrap(_short(contrast), PAGE_LABEL_WIDTH)]
    return "<br>".join(lines) or f"<b>{escape(factor)}</b>"


def _traces(rows: pd.DataFrame, kind: str, y: list[int]) -> list[go.Scatter]:
    """The published effects, if any, then the measured ones; `y` is the line of each row."""
    import plotly.graph_objects as go

    color, symbol = (FRONT, "diamond") if kind == "primary" else (INK, "circle")
    effects = go.Scatter(
        x=rows["effect"].tolist(),
        y=y,
        mode="markers",
        marker={
            "symbol": ["x-thin" if is_converged is False else symbol for is_converged in rows["is_converged"]],
            "size": 11,
            "color": [color if is_shown else PAPER for is_shown in rows["is_shown"]],
            "line": {"color": color, "width": 2},
        },
        error_x={
            "type": "data",
            "array": (rows["high"] - rows["effect"]).tolist(),
            "arrayminus": (rows["effect"] - rows["low"]).tolist(),
            "color": color,
            "thickness": 2,
            "width": 0,
        },
        name=NAMES[kind],
        text=_hover(rows),
        hovertemplate="%{text}<extra></extra>",
    )
    is_published = rows["published"].notna().to_numpy()
    if not is_published.any():
        return [effects]
    published = go.Scatter(
        x=rows.loc[is_published, "published"].tolist(),
        y=[place for place, is_known in zip(y, is_published, strict=True) if is_known],
        mode="markers",
        marker={"symbol": "line-ns", "size": 22, "line": {"color": BEST, "width": 4}},
        name=NAMES["published"],
        text=[web.hover_text("published", [source]) for source in rows.loc[is_published, "source"]],
        hovertemplate="%{text}<br>%{x:+}<extra></extra>",
    )
    return [published, effects]


def _hover(rows: pd.DataFrame) -> list[str]:
    texts = []
    for row in rows.to_dict("records"):
        effect = format_effect(row["effect"], row["unit"])
        interval = format_interval(row["low"], row["high"], row["unit"])
        lines = [f"{row['outcome']} {effect} {row['unit']} {interval}"]
        lines.append(f"{format_p(row)}; {row['n_seeds']} seeds, {row['n_images']} images")
        texts.append(web.hover_text(f"{row['factor']}: {row['contrast']}", [*lines, row["verdict"]]))
    return texts


def write_html(table: pd.DataFrame, path: Path, title: str) -> None:
    """A page of its own; raises ValueError when nothing has been measured."""
    note = "<p>Effects with their intervals over seeds and test images.</p>"
    path.write_text(web.page(title, note + charts(table)), encoding="utf-8")

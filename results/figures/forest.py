"""The forest plot of an ablation: a panel per outcome, a row per contrast, each effect with its interval.

PNG by matplotlib for papers and README, the same by plotly for a page. Diamonds are primary contrasts; a filled mark is an
effect whose test rejects (Holm-corrected where it is not primary) and whose interval excludes 0, a hollow one any other. A cross is an
effect of arms that had not converged.
"""

from __future__ import annotations

import math
import re
import textwrap
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.figures.style import BEST, FRONT, GREY, GRID, INK, SOFT, STYLE
from results.formats import format_effect, format_interval, format_p

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from matplotlib.axes import Axes

MAX_COLUMNS = 3
LABEL_WIDTH = 32
ROW_PIXELS = 34
GAP_PIXELS = 100
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


def _heading(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return f"{first['outcome']}: {'right' if first['goal'] == 'maximize' else 'left'} is better"


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
            markerfacecolor=color if row["is_shown"] else "white",
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
    axis.set_title(_heading(rows), fontsize=10.5, loc="left", color=SOFT)


def interactive_figure(table: pd.DataFrame) -> go.Figure:
    """The panels; hovering tells an effect's numbers and its verdict."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    places, panels = _places(table), _panels(table)
    num_columns = min(len(panels), MAX_COLUMNS)
    num_rows = math.ceil(len(panels) / num_columns)
    headings = [escape(_heading(rows)) for rows in panels]
    panel_height = 60 + ROW_PIXELS * len(places)
    figure: Any = make_subplots(
        rows=num_rows,
        cols=num_columns,
        shared_yaxes=True,
        subplot_titles=headings,
        horizontal_spacing=0.03,
        vertical_spacing=GAP_PIXELS / (num_rows * (panel_height + GAP_PIXELS)),
    )
    shown: set[str] = set()
    for index, rows in enumerate(panels):
        at = {"row": index // num_columns + 1, "col": index % num_columns + 1}
        for kind, chosen in (("other", rows.loc[~rows["is_primary"]]), ("primary", rows.loc[rows["is_primary"]])):
            if not len(chosen):
                continue
            color, symbol = (FRONT, "diamond") if kind == "primary" else (INK, "circle")
            y = [places[key] for key in zip(chosen["factor"], chosen["contrast"], strict=True)]
            published = chosen["published"].notna().to_numpy()
            if published.any():
                ticks = {"symbol": "line-ns", "size": 22, "line": {"color": BEST, "width": 4}}
                figure.add_trace(
                    go.Scatter(
                        x=chosen.loc[published, "published"].tolist(),
                        y=[place for place, is_known in zip(y, published, strict=True) if is_known],
                        mode="markers",
                        marker=ticks,
                        name=NAMES["published"],
                        legendgroup="published",
                        showlegend="published" not in shown,
                        text=[escape(source) for source in chosen.loc[published, "source"]],
                        hovertemplate="published %{x:+}<br>%{text}<extra></extra>",
                    ),
                    **at,
                )
                shown.add("published")
            fill = [color if is_shown else "white" for is_shown in chosen["is_shown"]]
            symbols = ["x-thin" if is_converged is False else symbol for is_converged in chosen["is_converged"]]
            figure.add_trace(
                go.Scatter(
                    x=chosen["effect"].tolist(),
                    y=y,
                    mode="markers",
                    marker={"symbol": symbols, "size": 11, "color": fill, "line": {"color": color, "width": 2}},
                    error_x={
                        "type": "data",
                        "array": (chosen["high"] - chosen["effect"]).tolist(),
                        "arrayminus": (chosen["effect"] - chosen["low"]).tolist(),
                        "color": color,
                        "thickness": 2,
                        "width": 0,
                    },
                    name=NAMES[kind],
                    legendgroup=kind,
                    showlegend=kind not in shown,
                    text=_hover(chosen),
                    hovertemplate="%{text}<extra></extra>",
                ),
                **at,
            )
            shown.add(kind)
        # After the traces: plotly leaves lines out of a panel that is still empty.
        margin = rows["margin"].iloc[0]
        if margin == margin:
            figure.add_vrect(-margin, margin, fillcolor=GRID, opacity=0.6, layer="below", line_width=0, **at)
        figure.add_vline(0, line={"color": INK, "width": 1}, layer="below", **at)
        axis_look = {"gridcolor": GRID, "zeroline": False, "linecolor": GREY, "ticks": "outside", "tickcolor": GREY}
        figure.update_xaxes(title=_axis_title(rows), rangemode="tozero", **axis_look, **at)
    labels = [
        "<br>".join(escape(part) for part in textwrap.wrap(_short(contrast), LABEL_WIDTH)) if contrast else f"<b>{escape(factor)}</b>"
        for factor, contrast in places
    ]
    figure.update_yaxes(
        tickmode="array",
        tickvals=list(places.values()),
        ticktext=labels,
        range=[len(places) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
        automargin=True,
    )
    figure.update_annotations(font={"size": 13, "color": SOFT})
    figure.update_layout(
        height=num_rows * (panel_height + GAP_PIXELS) + 40,
        margin={"l": 20, "r": 20, "t": 80, "b": 60},
        paper_bgcolor="white",
        plot_bgcolor="white",
        font={"family": "system-ui, sans-serif", "color": INK, "size": 13},
        legend={"orientation": "h", "y": 1, "yanchor": "top", "yref": "container", "x": 0},
        hoverlabel={"bgcolor": "white", "bordercolor": GREY, "font": {"family": "ui-monospace, monospace", "size": 12}},
    )
    return figure


def _hover(rows: pd.DataFrame) -> list[str]:
    texts = []
    for row in rows.to_dict("records"):
        effect = format_effect(row["effect"], row["unit"])
        lines = [f"<b>{escape(row['factor'])}: {escape(row['contrast'])}</b>"]
        interval = format_interval(row["low"], row["high"], row["unit"])
        lines.append(f"{escape(row['outcome'])} {effect} {escape(row['unit'])} {interval}")
        lines.append(f"{format_p(row)}; {row['n_seeds']} seeds, {row['n_images']} images")
        lines += [escape(line) for line in textwrap.wrap(row["verdict"], 70)]
        texts.append("<br>".join(lines))
    return texts


def write_html(table: pd.DataFrame, path: Path, title: str) -> None:
    """A page that loads nothing from anywhere; some five megabytes, most of them plotly's script."""
    from plotly.offline import get_plotlyjs

    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]}
    figure = interactive_figure(table).to_html(full_html=False, include_plotlyjs=False, config=config)
    style = f"body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; margin: 0 auto; padding: 32px 28px; max-width: 1280px; }}"
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>{style}</style>'
        f"<script>{get_plotlyjs()}</script></head><body><h1>{escape(title)}</h1>"
        f"<p>Effects with their intervals over seeds and test images; {NOTE}.</p>{figure}</body></html>\n",
        encoding="utf-8",
    )

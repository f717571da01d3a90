"""How well each score ranks trained networks: tau over all pairs and over pairs of equal size, a line for each score."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.figures import web
from results.figures.style import FRONT, GREY, GRID, INK, SOFT, STYLE
from results.records import write_bytes_atomically
from results.score_quality import Estimate, ScoreQuality, Verdict

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SERIES = (("all pairs", "tau", GREY), ("pairs of equal size", "tau_equal_size", FRONT))


def ordered(verdict: Verdict) -> list[ScoreQuality]:
    """The scores with a tau, the best at equal size first."""
    shown = [one for one in verdict.qualities if one.tau.is_defined]
    return sorted(shown, key=lambda one: one.tau_equal_size.value if one.tau_equal_size.is_defined else -2.0, reverse=True)


def page_figure(verdict: Verdict) -> Figure:
    """The figure for a page; hovering over a point shows its interval."""
    from plotly.graph_objects import Figure

    rows = ordered(verdict)
    figure = Figure(layout=web.LAYOUT | {"height": 110 + 26 * len(rows)})
    for title, name, colour in SERIES:
        found: list[tuple[str, Estimate]] = [(_label(one), getattr(one, name)) for one in rows if getattr(one, name).is_defined]
        figure.add_scatter(
            x=[estimate.value for _, estimate in found],
            y=[label for label, _ in found],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [estimate.high - estimate.value for _, estimate in found],
                "arrayminus": [estimate.value - estimate.low for _, estimate in found],
                "thickness": 1.5,
                "color": colour,
            },
            mode="markers",
            name=title,
            marker={"color": colour, "size": 9},
            hovertemplate="%{y}: %{x:+.2f} [%{customdata[0]:+.2f}, %{customdata[1]:+.2f}]<extra>" + title + "</extra>",
            customdata=[(estimate.low, estimate.high) for _, estimate in found],
        )
    figure.add_vline(x=0, line={"color": GREY, "width": 1})
    figure.update_yaxes(**web.AXIS | {"showgrid": False, "ticks": "", "autorange": "reversed"})
    figure.update_xaxes(title=f"Kendall's tau-b with {verdict.target}", **web.AXIS)
    return figure


def write_png(verdict: Verdict, path: Path) -> None:
    """The figure at README width."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    rows = ordered(verdict)
    with rc_context(STYLE):
        figure = Canvas(figsize=(9, 1.6 + 0.3 * len(rows)), dpi=164, layout="constrained")
        FigureCanvasAgg(figure)
        axis: Any = figure.subplots()
        axis.set_axisbelow(True)
        axis.grid(axis="x", color=GRID, linewidth=0.8)
        axis.axvline(0, color=INK, linewidth=0.8)
        for shift, (title, name, colour) in zip((-0.14, 0.14), SERIES, strict=True):
            found = [(number + shift, getattr(one, name)) for number, one in enumerate(rows) if getattr(one, name).is_defined]
            places, estimates = [place for place, _ in found], [estimate for _, estimate in found]
            axis.hlines(places, [one.low for one in estimates], [one.high for one in estimates], color=colour, linewidth=1.6)
            axis.scatter([one.value for one in estimates], places, s=34, color=colour, label=title, zorder=3)
        axis.set_yticks(range(len(rows)), [_label(one) for one in rows])
        axis.invert_yaxis()
        axis.set_xlabel(f"Kendall's tau-b with {verdict.target}, 95 % interval over {verdict.num_networks} networks", color=SOFT)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle("Which scores rank trained networks", fontsize=13, fontweight="bold", x=0.01, ha="left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    write_bytes_atomically(path, buffer.getvalue())


def _label(one: ScoreQuality) -> str:
    return f"{one.score} (costs nothing)" if one.is_trivial else one.score

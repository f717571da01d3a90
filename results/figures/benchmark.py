"""Accuracy over cost of the networks of a benchmark: the finalists with their intervals, their front, and what went out before."""

from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.figures import web
from results.figures.style import FRONT, GREY, GRID, INK, LINE, SOFT, STYLE
from results.records import write_bytes_atomically

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from results.answers.benchmark import Comparison, Finalist

LOG_FROM = 8
"""The axis of the cost is logarithmic where the dearest network costs more than so many times the cheapest."""

NOTE_WIDTH = 130
OUT = "went out in an earlier round, at its accuracy then"
LEGEND = (
    ("circle", FRONT, "finalist on the front"),
    ("circle", INK, "other finalist"),
    ("line", LINE, "front"),
    ("diamond", GREY, OUT),
)


def _ordered_front(compared: Comparison) -> list[Finalist]:
    return sorted((one for one in compared.finalists if one.is_front), key=lambda one: one.costs[compared.cost])


def _reach(one: Finalist) -> tuple[float, float]:
    """How far the interval of the accuracy goes down and up; 0 without one."""
    return (one.val.value - one.val.low, one.val.high - one.val.value) if math.isfinite(one.val.low) else (0.0, 0.0)


def _colour(one: Finalist) -> str:
    return FRONT if one.is_front else INK


def page_figure(compared: Comparison) -> Figure:
    """The figure for a page; hovering over a point names its network."""
    from plotly.graph_objects import Figure

    figure, cost = Figure(layout=web.LAYOUT | {"height": 460}), compared.cost
    front = _ordered_front(compared)
    figure.add_scatter(
        x=[one.costs[cost] for one in front],
        y=[one.val.value for one in front],
        mode="lines",
        line={"color": LINE, "width": 1.5, "shape": "hv"},
        hoverinfo="skip",
    )
    hover = f"%{{text}}<br>{cost} %{{x:.3g}}, validation %{{y:.1f}} %<extra></extra>"
    figure.add_scatter(
        x=[one.costs[cost] for one in compared.stopped],
        y=[one.val_top1_pct for one in compared.stopped],
        text=[f"{one.name}, stopped after epoch {one.epochs}" for one in compared.stopped],
        mode="markers",
        marker={"color": GREY, "size": 9, "symbol": "diamond"},
        hovertemplate=hover,
    )
    for colour in (INK, FRONT):
        shown = [one for one in compared.finalists if _colour(one) == colour]
        down, up = ([_reach(one)[side] for one in shown] for side in (0, 1))
        figure.add_scatter(
            x=[one.costs[cost] for one in shown],
            y=[one.val.value for one in shown],
            text=[f"{one.name}, test {one.test} %" for one in shown],
            error_y={"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.5, "color": colour},
            mode="markers",
            marker={"color": colour, "size": 10},
            hovertemplate=hover,
        )
    figure.update_xaxes(title=cost, type="log", **web.AXIS)
    figure.update_yaxes(title="validation accuracy (%)", **web.AXIS)
    return figure


def _floor(compared: Comparison) -> float:
    """The lowest accuracy that is drawn: a little below the finalists."""
    lowest = min(one.val.value - _reach(one)[0] for one in compared.finalists)
    return lowest - max((100 - lowest) / 4, 1.0)


def write_png(compared: Comparison, path: Path) -> None:
    """The figure at README width, every network by its name; those that were far below the finalists are only named."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    cost, front, floor = compared.cost, _ordered_front(compared), _floor(compared)
    out = [one for one in compared.stopped if one.val_top1_pct > floor]
    named = [(one.name, one.costs[cost], one.val.value, _colour(one)) for one in compared.finalists]
    named += [(f"{one.name} (epoch {one.epochs})", one.costs[cost], one.val_top1_pct, SOFT) for one in out]
    costs = [x for _, x, _, _ in named]
    is_log = max(costs) > LOG_FROM * min(costs)
    with rc_context(STYLE):
        figure = Canvas(figsize=(9, 5.2), dpi=164, layout="constrained")
        FigureCanvasAgg(figure)
        axis: Any = figure.subplots()
        axis.set_axisbelow(True)
        axis.grid(color=GRID, linewidth=0.8)
        if is_log:
            axis.set_xscale("log")
        axis.step(
            [one.costs[cost] for one in front], [one.val.value for one in front], where="post", color=LINE, linewidth=1.4, label="front"
        )
        for one in compared.finalists:
            place = one.costs[cost], one.val.value
            axis.errorbar(
                *place, yerr=[[reach] for reach in _reach(one)], fmt="o", color=_colour(one), markersize=7, elinewidth=1.5, zorder=3
            )
        axis.scatter([], [], s=49, color=FRONT, label="finalist on the front")
        axis.scatter([], [], s=49, color=INK, label="other finalist")
        if out:
            axis.scatter([one.costs[cost] for one in out], [one.val_top1_pct for one in out], s=40, color=GREY, marker="D", label=OUT)
        middle = math.sqrt(min(costs) * max(costs)) if is_log else (min(costs) + max(costs)) / 2
        # From left to right above and below in turn, so that neighbours keep apart.
        for index, (name, x, y, colour) in enumerate(sorted(named, key=lambda each: each[1])):
            side, place = ("left", 8) if x <= middle else ("right", -8)
            height, lift = ("top", -5) if index % 2 else ("bottom", 5)
            axis.annotate(name, (x, y), (place, lift), textcoords="offset points", ha=side, va=height, fontsize=9, color=colour)
        axis.margins(x=0.1)
        axis.set_ylim(floor, 100 + (100 - floor) / 20)
        axis.set_xlabel(cost, color=SOFT)
        axis.set_ylabel("validation accuracy (%)", color=SOFT)
        below = [f"{one.name} ({one.val_top1_pct:.0f} % after epoch {one.epochs})" for one in compared.stopped if one not in out]
        if below:
            text = textwrap.fill(f"below: {', '.join(below)}", NOTE_WIDTH, break_on_hyphens=False)
            axis.set_title(text, fontsize=9, loc="left", color=SOFT)
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=10)
        title = f"Accuracy over {cost}, with 95 % intervals over seeds and images"
        figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    write_bytes_atomically(path, buffer.getvalue())

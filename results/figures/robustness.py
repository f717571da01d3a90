"""Accuracy of networks over the levels of a corruption, a panel for each corruption: PNG for papers, SVGs in HTML for the browser.

`results/curves.py` says what a curve is.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from results.curves import Curve, Curves, area_pct, mean_and_half_width
from results.figures import web
from results.figures.style import BEST, BLUE, BROWN, FAMILY, FRONT, GREY, GRID, INK, OLIVE, PAPER, SOFT, STYLE, VIOLET
from results.records import write_bytes_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {
    "patch_mix_coarse": ("Patch-mix, coarse grid", "foreign cells (%)"),
    "patch_mix_fine": ("Patch-mix, fine grid", "foreign cells (%)"),
    "patch_drop": ("Patch drop", "dropped cells (%)"),
    "permutation": ("Patch permutation", "shuffled tiles"),
}
COLOURS = (FAMILY, FRONT, BEST, INK, VIOLET, BLUE, BROWN, OLIVE)
MAX_AREAS = 6
"""Areas are written into the panels only for this many networks or fewer."""

SVG = "http://www.w3.org/2000/svg"


def write_png(curves: Curves, path: Path, *, title: str, chance_pct: float) -> None:
    """The figure at README width (1800 pixels), the mean over seeds with the band of its interval."""
    with _style():
        figure = _figure(curves, title, chance_pct)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    write_bytes_atomically(path, buffer.getvalue())


def write_html(curves: Curves, path: Path, *, title: str, chance_pct: float) -> None:
    """The same panels as a page that loads nothing; hovering over a point shows its network, level and accuracy."""
    with _style():
        panels = [web.drawing(_svg(curves, name, chance_pct), PANELS[name][0]) for name in _names(curves)]
    shown = [("line" if _dashes(number) == "-" else "dashes", _colour(number), label) for number, label in enumerate(curves)]
    legend = web.legend([*shown, ("dashes", GREY, "chance")])
    write_bytes_atomically(path, web.page(title, web.charts(panels, legend)).encode())


def _svg(curves: Curves, name: str, chance_pct: float) -> str:
    """One panel, as wide as there is room, with a hover text for each point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.9), layout="constrained")
    axis = figure.subplots()
    _draw_panel(axis, curves, name, chance_pct)
    axis.set_ylabel("test accuracy (%)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    drawing = ElementTree.fromstring(buffer.getvalue())
    drawing.attrib["width"] = "100%"
    del drawing.attrib["height"]  # it follows from the view box
    for label, of_network in curves.items():
        if name in of_network:
            points = drawing.iterfind(f".//*[@id='{_group(name, label)}']//{{{SVG}}}use")
            for point, text in zip(points, _hover(name, label, of_network[name]), strict=True):
                ElementTree.SubElement(point, f"{{{SVG}}}title").text = text
    return ElementTree.tostring(drawing, encoding="unicode")


def _figure(curves: Curves, title: str, chance_pct: float) -> Figure:
    from matplotlib.figure import Figure

    names = _names(curves)
    num_legend_rows = -(-(len(curves) + 1) // 4)
    figure = Figure(figsize=(11, 4.1 + 0.2 * num_legend_rows), dpi=164, layout="constrained")
    axes = dict(zip(names, figure.subplots(1, len(names), sharey=True, squeeze=False)[0], strict=True))
    for name, axis in axes.items():
        axis.set_title(PANELS[name][0], fontsize=10.5, loc="left", color=SOFT)
        _draw_panel(axis, curves, name, chance_pct)
    axes[names[0]].set_ylabel("test accuracy (%)")
    handles = {label: handle for axis in axes.values() for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    shown = [*curves, "chance"]
    figure.legend([handles[label] for label in shown], shown, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    return figure


def _names(curves: Curves) -> list[str]:
    """The panels that some network has a curve for."""
    return [name for name in PANELS if any(name in of_network for of_network in curves.values())]


def _draw_panel(axis: Axes, curves: Curves, name: str, chance_pct: float) -> None:
    axis.set_axisbelow(True)
    axis.grid(color=GRID, linewidth=0.8)
    axis.axhline(chance_pct, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), label="chance")
    axis.set_xlabel(PANELS[name][1])
    axis.set_ylim(0, 102)
    for number, (label, of_network) in enumerate(curves.items()):
        if name in of_network:
            _draw(axis, name, label, of_network[name], _colour(number), _dashes(number))
            if len(curves) <= MAX_AREAS:
                _write_area(axis, of_network[name], _colour(number), len(curves) - number)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _dashes(number: int) -> str:
    return "-" if number < len(COLOURS) else "--"


def _draw(axis: Axes, name: str, label: str, curve: Curve, colour: str, dashes: str) -> None:
    levels = curve[0]
    mean, half_width = mean_and_half_width(curve[1])
    if half_width is not None:
        axis.fill_between(levels, mean - half_width, mean + half_width, color=colour, alpha=0.15, linewidth=0)
    axis.plot(levels, mean, color=colour, linestyle=dashes, linewidth=1.8, label=label, zorder=3)
    points = axis.scatter(levels, mean, s=30, c=colour, edgecolors=PAPER, linewidths=0.7, zorder=4, clip_on=False)
    points.set_gid(_group(name, label))
    ticks = levels if name == "permutation" else np.arange(0, levels[-1] + 1, 10 if levels[-1] <= 60 else 20)
    axis.set_xticks(ticks, [_level_text(name, level) for level in ticks])


def _write_area(axis: Axes, curve: Curve, colour: str, line: int) -> None:
    # Curves start high and end low, so the lower left, above chance, is free for the text.
    mean, half_width = mean_and_half_width(area_pct(*curve)[:, None])
    text = f"area {mean[0]:.1f}" + ("" if half_width is None else f" ± {half_width[0]:.1f}")
    x, y = 0.04, 0.1 + 0.055 * line
    axis.plot(x, y, marker="s", markersize=5, color=colour, transform=axis.transAxes, zorder=6)
    white = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
    axis.text(x + 0.03, y, text, transform=axis.transAxes, fontsize=9, va="center", bbox=white, zorder=5)


def _group(name: str, label: str) -> str:
    return f"points-{name}-{label.encode().hex()}"


def _hover(name: str, label: str, curve: Curve) -> list[str]:
    mean, half_width = mean_and_half_width(curve[1])
    errors = [" %"] * len(mean) if half_width is None else [f" ± {error:.2f} %, mean of {len(curve[1])} seeds" for error in half_width]
    heading, level_title = PANELS[name]
    return [
        f"{label}\n{heading}, {level_title}: {_level_text(name, level)}\naccuracy {value:.2f}{error}"
        for level, value, error in zip(curve[0], mean, errors, strict=True)
    ]


def _level_text(name: str, level: float) -> str:
    return f"{2**level:.0f}" if name == "permutation" else f"{level:.3g}"


def _style() -> Any:
    from matplotlib import rc_context

    return rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": "vitscale"})

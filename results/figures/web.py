"""What all pages share: the frame, the reader's colours, charts and their legends. A page loads nothing from anywhere.

A chart is one panel, and a grid places as many beside each other as the window has room for. Titles and legends are text of the page,
not of the drawing: they wrap where a drawing would overlap. Figures are made in the colours of print (`results/figures/style.py`); here
each of them becomes a variable of the page's style, whose value is another one in the dark.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

from results.figures.style import GREY, GRID, INK, PALETTE, PAPER, SOFT

if TYPE_CHECKING:
    import plotly.graph_objects as go

HOVER_WIDTH = 44
"""Characters of a hover text's line: a telephone has room for no more."""

AXIS: dict[str, Any] = {"gridcolor": GRID, "zeroline": False, "linecolor": GREY, "ticks": "outside", "tickcolor": GREY, "automargin": True}
LAYOUT: dict[str, Any] = {
    "template": "none",
    "height": 380,
    "margin": {"l": 10, "r": 16, "t": 30, "b": 10},
    "paper_bgcolor": PAPER,
    "plot_bgcolor": PAPER,
    "font": {"family": "system-ui, sans-serif", "color": INK, "size": 12},
    "showlegend": False,
    "modebar": {"bgcolor": PAPER, "color": SOFT, "activecolor": INK},
    "hoverlabel": {"bgcolor": PAPER, "bordercolor": GREY, "font": {"family": "ui-monospace, monospace", "size": 12, "color": INK}},
}
"""plotly's layout of every chart; its height is in pixels."""

SYMBOLS = {
    "circle": '<circle cx="8" cy="8" r="4.5"/>',
    "diamond": '<path d="M8 2l6 6-6 6-6-6z"/>',
    "star": '<path d="M8 1l2 4.8 5 .4-3.8 3.4 1.2 5L8 11.9l-4.4 2.7 1.2-5L1 6.2l5-.4z"/>',
    "line": '<path d="M0 8h16"/>',
    "dashes": '<path d="M0 8h16" stroke-dasharray="4 3"/>',
    "bar": '<path d="M8 1v14"/>',
    "band": '<rect x="1" y="3" width="14" height="10"/>',
}

STYLE = """
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--paper); max-width: 1400px;
  margin: 0 auto; padding: 28px clamp(12px, 2vw, 28px) 56px; overflow-wrap: break-word; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 44px 0 4px; } h3 { font-size: 15px; margin: 28px 0 8px; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 92ch; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 350px), 1fr)); gap: 20px 28px; margin: 8px 0; }
figure { margin: 0; min-width: 0; } figure use { cursor: crosshair; }
figcaption { font-size: 13px; } figcaption sup { line-height: 0; } figcaption span { color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 20px; list-style: none; margin: 12px 0 4px; padding: 0; font-size: 13px; }
.legend svg { width: 16px; height: 16px; margin-right: 6px; vertical-align: -3px; stroke-width: 1.6; }
"""

SCRIPT = """
const figures = [...document.querySelectorAll("figure:has(> .chart)")];
const config = {displaylogo: false, responsive: true, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]};
// A finger that moves over a chart scrolls the page.
const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const page = getComputedStyle(document.documentElement);
  for (const figure of figures) {
    const text = figure.querySelector("script").textContent;
    const {data, layout} = JSON.parse(text.replace(/var\\((--\\w+)\\)/g, (_, name) => page.getPropertyValue(name).trim()));
    Plotly.react(figure.querySelector(".chart"), data, {...layout, dragmode}, config);
  }
}
dark.addEventListener("change", draw);
draw();
"""


def page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """The text of a page; some five megabytes where it has charts, most of them plotly's script."""
    from plotly.offline import get_plotlyjs

    plotly = f"<script>{get_plotlyjs()}</script>" if 'class="chart"' in body else ""
    scripts = (SCRIPT if plotly else "") + script
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>{_variables()}{STYLE}{style}</style>{plotly}</head><body><h1>{escape(title)}</h1>{body}"
        f"{f'<script>{scripts}</script>' if scripts else ''}</body></html>\n"
    )


def chart(figure: go.Figure, title: str, better: str = "") -> str:
    """One panel under its title, which is HTML; `better` says in which direction it gets better."""
    text = in_page_colours(figure.to_json() or "").replace("<", "\\u003c")
    return _figure(f'<div class="chart"></div><script type="application/json">{text}</script>', title, better)


def drawing(svg: str, title: str) -> str:
    """One panel that is drawn already, under its title, which is HTML."""
    return _figure(in_page_colours(svg), title)


def _figure(content: str, title: str, better: str = "") -> str:
    aside = f" <span>{escape(better)}</span>" if better else ""
    return f"<figure><figcaption>{title}{aside}</figcaption>{content}</figure>"


def charts(panels: Iterable[str], legend: str) -> str:
    """Panels beside each other, as many as there is room for, under their legend."""
    return f'{legend}<div class="charts">{"".join(panels)}</div>'


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """Of each entry its symbol, colour and text."""
    items = []
    for symbol, colour, text in entries:
        edge = INK if symbol == "star" else colour
        look = in_page_colours(f"fill: {colour}; stroke: {edge}")
        items.append(f'<li><svg viewBox="0 0 16 16" style="{look}">{SYMBOLS[symbol]}</svg>{escape(text)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def hover_text(heading: str, lines: Iterable[str]) -> str:
    """The heading in bold, then the lines, wrapped where they are too long."""
    bold, plain = ([escape(part) for line in some for part in textwrap.wrap(line, HOVER_WIDTH)] for some in ([heading], lines))
    return f"<b>{'<br>'.join(bold)}</b><br>{'<br>'.join(plain)}"


def in_page_colours(text: str) -> str:
    """The text with every colour of print as a variable of the page's style."""
    names = {light: name for name, (light, _) in PALETTE.items()}
    return re.sub("|".join(names), lambda found: f"var(--{names[found[0]]})", text)


def _variables() -> str:
    light, dark = ("; ".join(f"--{name}: {both[which]}" for name, both in PALETTE.items()) for which in (0, 1))
    return f":root {{ color-scheme: light dark; {light}; }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}; }} }}"

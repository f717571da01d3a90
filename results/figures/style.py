"""Colours that all figures share, in print and on a page that is read in the light or in the dark, and matplotlib's settings."""

from __future__ import annotations

from typing import Any

PAPER, WASH, GRID = "#ffffff", "#f6f8fa", "#e6ebf0"
INK, SOFT, GREY = "#1b2a3a", "#5a6b7c", "#8aa1b8"
FRONT, LINE, BEST, FAMILY = "#d1495b", INK, "#f2b134", "#2a8c82"
VIOLET, BLUE, BROWN, OLIVE = "#7b5ea7", "#4a90c2", "#a0693a", "#7d9a3c"

PALETTE = {
    "paper": (PAPER, "#12181f"),
    "wash": (WASH, "#1c2530"),
    "grid": (GRID, "#2f3b48"),
    "ink": (INK, "#e6ecf2"),
    "soft": (SOFT, "#a7b5c3"),
    "grey": (GREY, "#7d93aa"),
    "front": (FRONT, "#f0707f"),
    "best": (BEST, "#f2b134"),
    "family": (FAMILY, "#4fbfb3"),
    "violet": (VIOLET, "#b195de"),
    "blue": (BLUE, "#72b2e2"),
    "brown": (BROWN, "#d3965f"),
    "olive": (OLIVE, "#a6c55c"),
}
"""Every colour by its name on a page: in the light, as in print, and in the dark."""

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
"""matplotlib settings of every figure."""

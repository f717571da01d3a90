"""Colours and matplotlib settings that all figures share."""

from __future__ import annotations

from typing import Any

INK, SOFT, GREY, GRID = "#1b2a3a", "#5a6b7c", "#8aa1b8", "#e6ebf0"
FRONT, LINE, BEST, FAMILY = "#d1495b", "#1b2a3a", "#f2b134", "#2a8c82"
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

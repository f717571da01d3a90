"""A table of text that fits a terminal: the columns that matter least are left out, and named."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from results.formats import shortened_in_the_middle

SEPARATOR = "  "
TEXT_WIDTH = 80
"""Where there is no terminal to ask."""


def terminal_width() -> int:
    """Columns of the terminal, or what COLUMNS says; in a pipe and in a job's log `TEXT_WIDTH`."""
    return shutil.get_terminal_size((TEXT_WIDTH, 24)).columns


@dataclass(frozen=True)
class Column:
    """A title and a cell for each row. Cells wider than `at_most` are shortened in the middle where room is short."""

    title: str
    cells: Sequence[str]
    is_text: bool = False
    at_most: int | None = None

    @property
    def width(self) -> int:
        return max(map(len, [self.title, *self.cells]))

    @property
    def least_width(self) -> int:
        return self.width if self.at_most is None else min(self.width, max(self.at_most, len(self.title)))


def fitted(columns: Sequence[Column], width: int) -> tuple[list[str], list[str]]:
    """The lines of the table, its head first, and the titles of the columns left out.

    `columns` stand in the order of their importance: those that do not fit `width` characters are left out from the end, the first
    one never. What room is left goes to the columns that could be shortened.
    """
    shown = list(columns)
    while len(shown) > 1 and _total(shown) > width:
        shown.pop()
    room = max(width - _total(shown), 0)
    laid_out = []
    for column in shown:
        given = min(column.width, column.least_width + room)
        room -= given - column.least_width
        cells = [column.title, *(shortened_in_the_middle(cell, given) for cell in column.cells)]
        laid_out.append([cell.ljust(given) if column.is_text else cell.rjust(given) for cell in cells])
    return [SEPARATOR.join(cells).rstrip() for cells in zip(*laid_out, strict=True)], [column.title for column in columns[len(shown) :]]


def _total(columns: Sequence[Column]) -> int:
    return sum(column.least_width for column in columns) + len(SEPARATOR) * (len(columns) - 1)

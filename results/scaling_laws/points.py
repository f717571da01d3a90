"""The measured points of a law: one or two positive variables and a positive value; rows that agree in x are replicates by seed."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Points:
    """x (n, V) and y (n,), a row for each training; raises ValueError for a number that is not positive and finite."""

    x: np.ndarray
    y: np.ndarray
    x_names: tuple[str, ...]
    y_name: str

    def __post_init__(self) -> None:
        for name, values in (*zip(self.x_names, self.x.T, strict=True), (self.y_name, self.y)):
            if (wrong := np.flatnonzero(~(np.isfinite(values) & (values > 0)))).size:
                number = f"{values[wrong[0]]:g}"
                raise ValueError(f"row {wrong[0] + 1}: {name} is {number}; a positive number is expected, the forms take its logarithm")

    @property
    def n(self) -> int:
        return len(self.y)

    def distinct(self) -> Distinct:
        """The distinct x with the mean, the number and the scatter of their rows."""
        x, which, counts = np.unique(self.x, axis=0, return_inverse=True, return_counts=True)
        which = which.reshape(-1)
        means = np.bincount(which, self.y) / counts
        scatter = np.bincount(which, (self.y - means[which]) ** 2)
        return Distinct(x=x, which=which, counts=counts, means=means, scatter=scatter)


@dataclass(frozen=True, kw_only=True)
class Distinct:
    """`which` (n,) names the distinct point of each row; `x` (m, V), `counts`, `means` and `scatter` (m,) belong to the m points.

    `scatter` is the sum of squares of a point's rows around their mean: what seeds alone differ by.
    """

    x: np.ndarray
    which: np.ndarray
    counts: np.ndarray
    means: np.ndarray
    scatter: np.ndarray


def read_points(path: Path, x_names: Sequence[str], y_name: str, where: Mapping[str, str] | None = None) -> Points:
    """The points in a CSV file with a header line, those rows alone whose columns have the values of `where`.

    Raises ValueError that names the file, the row and the column for a missing column, an empty cell, text or nan in place of a number and
    a number that is not positive, and OSError for a file that cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="", skipinitialspace=True)
            columns, rows = list(reader.fieldnames or ()), list(enumerate(reader, start=1))
        return _points(columns, rows, x_names, y_name, where or {})
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _points(
    columns: Sequence[str], rows: Sequence[tuple[int, Mapping[str, str]]], x_names: Sequence[str], y_name: str, where: Mapping[str, str]
) -> Points:
    """`rows` are numbered as they stand in the file, which `where` does not change."""
    for name in (*x_names, y_name, *where):
        if name not in columns:
            raise ValueError(f"no column {name!r}; it has: {', '.join(columns) or 'no header line'}")
    for name, value in where.items():
        found = dict.fromkeys(row[name] for _, row in rows)
        rows = [(number, row) for number, row in rows if row[name] == value]
        if not rows:
            raise ValueError(f"no row has {name}={value}; it has: {', '.join(found)}")
    if not rows:
        raise ValueError("no row below the header line")
    numbers = np.array([[_number(row[name], number, name) for name in (*x_names, y_name)] for number, row in rows])
    return Points(x=numbers[:, :-1], y=numbers[:, -1], x_names=tuple(x_names), y_name=y_name)


def _number(cell: str, row: int, name: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"row {row}: {name} is {cell or 'empty'}; a positive number is expected")
    return value

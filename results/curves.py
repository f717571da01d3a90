"""Robustness curves: the accuracy of a network over the levels of a corruption.

A curve is `(levels, accuracy)`: levels `(L,)`, the first of them the clean image, and accuracy `(S, L)` in percent, a row for each seed. A
level is a percentage of the cells; for the permutation it is log2 of the number of tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

Curve = tuple[np.ndarray, np.ndarray]
Curves = Mapping[str, Mapping[str, Curve]]
"""Networks by label, and the curves of each by name."""

CURVE_NAMES = ("patch_mix_coarse", "patch_mix_fine", "patch_drop", "permutation")
CONFIDENCE = 0.95


def read_curves(paths: Sequence[Path]) -> dict[str, Curve]:
    """The curves in the `robustness.npz` of each seed of a network; raises ValueError if their levels differ."""
    curves: dict[str, Curve] = {}
    for name in CURVE_NAMES:
        levels, accuracy = [], []
        for path in paths:
            with np.load(path) as stored:
                levels.append(stored[f"{name}_levels"])
                accuracy.append(100 * stored[name].mean(axis=0))
        if different := [path for path, found in zip(paths, levels, strict=True) if not np.array_equal(found, levels[0])]:
            raise ValueError(f"{different[0]} and {paths[0]} were measured at different levels of {name}; curves of one network share them")
        curves[name] = (levels[0], np.stack(accuracy))
    return curves


def area_pct(levels: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """Area under each curve by the trapezoidal rule over its width: the mean accuracy `(..., L) -> (...)`, in percent."""
    return np.trapezoid(accuracy, levels, axis=-1) / (levels[-1] - levels[0])


def mean_and_half_width(accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean over the seeds `(S, L) -> (L,)` and half the width of its 95 % interval by Student's t; None for a single seed."""
    from scipy.stats import t

    S = len(accuracy)
    if S == 1:
        return accuracy[0], None
    return accuracy.mean(axis=0), t.ppf((1 + CONFIDENCE) / 2, S - 1) * accuracy.std(axis=0, ddof=1) / np.sqrt(S)

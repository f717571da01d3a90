"""What a row of the table of effects says, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from results.effects.design import Design
from results.formats import count, format_effect, format_interval, format_p


def excludes_zero(row: Mapping[str, Any]) -> bool:
    """Whether the 95 % interval of the effect excludes 0; one that ends at 0 up to rounding does not."""
    # The bootstrap sums in float32, and counts of images make ends at exactly 0 common.
    rounding = 1e-5 * (row["high"] - row["low"])
    return row["low"] > rounding or row["high"] < -rounding


def _is_opposite(row: Mapping[str, Any]) -> bool:
    """Whether the effect goes against the direction that was tested."""
    return row["effect"] * {"two-sided": 0, "greater": 1, "less": -1}[row["alternative"]] < 0


def verdict(row: Mapping[str, Any], design: Design) -> str:
    """The finding first, then what the design could not find and what is missing."""
    if not row["n_seeds"]:
        parts = [f"not measured: no seed has every arm ({row['missing'] or 'no trial yet'})"]
    else:
        parts = [*_finding(row), *_limits(row, design)]
    if row["num_trials_before"]:
        parts.append(f"registered after {count(row['num_trials_before'], 'trial')} of its arms")
    return "; ".join(parts)


def _finding(row: Mapping[str, Any]) -> list[str]:
    """What the test and the intervals show, the conclusion first."""
    unit = f" {row['unit']}" if row["unit"] else ""
    interval = f"interval {format_interval(row['low'], row['high'], row['unit'])}"
    if row["n_seeds"] == 1:
        interval += " over images only"
    test = format_p(row)
    better = "better" if (row["effect"] > 0) == (row["goal"] == "maximize") else "worse"
    size = format_effect(abs(row["effect"]), row["unit"])[1:] + unit
    narrow = f"90 % interval {format_interval(row['low_90'], row['high_90'], row['unit'])}"
    margin = f"{row['margin']:g} point{'' if row['margin'] == 1 else 's'}"
    equivalent = f"no difference of more than {margin}: {narrow}"
    if row["is_converged"] is False:
        parts = [
            f"not converged, so nothing is shown: the training loss still fell ({row['unconverged']})",
            f"after these epochs {better} by {size}, {interval}, {test}",
        ]
    elif row["is_shown"]:
        parts = [f"{better} by {size}: {interval}, {test}"]
    elif row["rejected"]:
        parts = [f"{better} by {size} on these test images, {test}; the interval over other images includes 0: {interval}"]
    elif row["equivalent"]:
        parts = [f"{equivalent}, {test}"]
    elif _is_opposite(row) and excludes_zero(row):
        parts = [f"the opposite of what was tested: {interval} excludes 0, {test}"]
    elif excludes_zero(row):
        parts = [f"inconclusive: {interval} excludes 0, {test} does not reject"]
    else:
        parts = [f"inconclusive: {interval}, {test}"]
        if _is_opposite(row):
            parts.append("the effect is the opposite of what was tested")
    if row["equivalent"] and row["rejected"]:
        parts.append(equivalent)
    elif row["no_harm"] and not row["equivalent"] and not (row["is_shown"] and better == "better"):
        parts.append(f"no harm of more than {margin}: {narrow}")
    return parts


def _limits(row: Mapping[str, Any], design: Design) -> list[str]:
    """What this design could not have found, and what it lacks."""
    parts = []
    smallest = row["smallest_p"] * row["family_size"]
    if smallest > design.alpha:
        needed = row["n_seeds"] + math.ceil(math.log2(smallest / design.alpha))
        held = f"smallest {'p' if row['is_primary'] else 'Holm p'} {min(smallest, 1):.2g}"
        parts.append(f"{count(row['n_seeds'], 'seed')} cannot reject at {design.alpha:g} ({held}), {needed} could")
    if not math.isnan(row["p_mcnemar"]):
        parts.append(f"McNemar's test of these two networks, which says nothing of other trainings: p {row['p_mcnemar']:.2g}, uncorrected")
    if row["could_have_seen"] is False:
        parts.append(f"could not have seen the published {format_effect(row['published'], row['unit'])}")
    if row["missing"]:
        parts.append(f"missing: {row['missing']}")
    return parts

"""How a number is written, wherever a reader meets it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MIN_NETWORKS = 10
"""For an agreement of ranks with an interval: the bootstrap of fewer has too few distinct samples to cover what it promises."""


def count(number: int, noun: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_value(value: Any, digits: int = 4) -> str:
    """A number to so many significant digits, `-` for a missing one."""
    if value is None or value != value:
        return "-"
    if float(value).is_integer() and abs(value) < 10**6:
        return str(int(value))
    return f"{value:.{digits}g}"


def format_effect(value: float, unit: str) -> str:
    """A signed difference in its unit, `-` for one that is missing or infinite."""
    return f"{value:+.{_decimals(unit)}f}" if math.isfinite(value) else "-"


def format_interval(low: float, high: float, unit: str) -> str:
    return f"[{format_effect(low, unit)}, {format_effect(high, unit)}]"


def format_p(row: Mapping[str, Any]) -> str:
    """The p-value that decides a row, with its kind."""
    side = "" if row["alternative"] == "two-sided" else " one-sided"
    return f"p{side} {row['p']:.2g}" if row["is_primary"] else f"Holm p{side} {row['p_holm']:.2g}"


def format_mean(mean: float, sd: float, unit: str) -> str:
    """A mean over seeds with its standard deviation, if there is one."""
    decimals = _decimals(unit)
    return "-" if math.isnan(mean) else f"{mean:.{decimals}f}" + ("" if math.isnan(sd) else f" ± {sd:.{decimals}f}")


def format_loss_fall(row: Mapping[Any, Any]) -> str:
    """How much a level's training loss still fell, in nats, and the conclusion if it had not converged; `-` if it was not kept."""
    if math.isnan(row["loss_fall"]):
        return "-"
    if math.isinf(row["loss_fall"]):
        return "too few epochs to tell"
    # Adding 0 takes the sign off a zero.
    return f"{round(row['loss_fall'], 2) + 0:.2f}" + ("" if row["is_converged"] else ", not converged")


def _decimals(unit: str) -> int:
    return 2 if unit in ("%", "points") else 3


def format_tau(row: Mapping[Any, Any]) -> str:
    """tau with its interval; tau of a constant is undefined, and tau of few networks says nothing."""
    if row["n"] < MIN_NETWORKS:
        return f"too few networks ({row['n']} of {MIN_NETWORKS})"
    return f"{row['tau']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" if row["tau"] == row["tau"] else "constant"


TIMING_MARKS = "~ not to be trusted (profile.json says why); ! not alone on its node"
"""What `timing_marks` mean, for a line below a table."""


def timing_marks(row: Mapping[Any, Any]) -> str:
    """The marks of a measured time; none for a row that says nothing of its circumstances."""
    return ("~" if row.get("is_noisy") == 1 else "") + ("!" if row.get("is_alone") == 0 else "")


def shortened(text: str, width: int) -> str:
    """The text, or as much of it as fits with an ellipsis at its end."""
    return text if len(text) <= width else text[: width - 1] + "…"


def shortened_in_the_middle(text: str, width: int) -> str:
    """The text, or as much of its beginning and its end as fits around an ellipsis: what tells two networks apart stands at the end."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"

"""Trainings that are compared before their end, for studies that halve: after how many epochs, and what a point says of that."""

from __future__ import annotations

from collections.abc import Sequence

REDUCTION = 3
"""The best third of one round goes on to the next, which is three times as long."""

NUM_RUNGS = 3
EPOCHS_AXIS = "epochs_trained"


def rungs_of(epochs: int) -> tuple[int, ...]:
    """The epochs after which trainings of that length are compared, the last one the whole training."""
    return tuple(epochs // REDUCTION**left for left in reversed(range(NUM_RUNGS)))


def stopping(rung: int, epochs: int) -> dict[str, dict[str, int]]:
    """The settings of a candidate that is trained up to a rung."""
    return {"train": {"stop_after": rung}} if rung < epochs else {}


def halving_plan(number: int, rungs: Sequence[int], what: str) -> str:
    """What successive halving of so many points will do, in words."""
    from search.strategies.halving import rung_sizes

    sizes = rung_sizes(number, len(rungs), REDUCTION)
    rounds = ", ".join(f"{size} to epoch {rung}" for size, rung in zip(sizes, rungs, strict=True))
    return f"successive halving of {number} {what}: {rounds}"

"""Whether an arm had converged when its training ended: judged by its own training loss, never by how arms compare.

Arms that have not converged differ in how fast they fit, and a longer training may turn their order around. The obvious measure, the
slope at the end, is blind here: a cosine schedule ends at a rate near zero, and the loss is flat whatever it could still learn. So the
loss is compared between the two quarters of the epochs that make up the second half, where the rate is at half its peak and below.

`MAX_LOSS_FALL` was set by trainings on digits that were made again with 1.7 to 3 times their epochs: where the loss had fallen by
more, the test NLL changed by 0.16 and 0.46 nats; where it had fallen by less, by 0.05 at most. They stand in
results/reports/ablations_digits_cpu_202611.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MAX_LOSS_FALL = 0.1
"""Nats by which the training loss of an arm that counts as converged may fall from the third quarter of the epochs to the last."""

MIN_EPOCHS = 8
"""With fewer epochs a quarter is one epoch, and its loss is noise."""


def loss_fall(losses: Sequence[float] | np.ndarray) -> float:
    """By how many nats the mean loss of the last quarter of the epochs `(E,)` is below that of the quarter before.

    It is infinite for fewer than `MIN_EPOCHS`: no training that short is taken to have converged.
    """
    losses = np.asarray(losses, dtype=float)
    quarter = len(losses) // 4
    if len(losses) < MIN_EPOCHS:
        return math.inf
    return float(losses[-2 * quarter : -quarter].mean() - losses[-quarter:].mean())

"""A pool in which Ctrl-C is pressed."""

from __future__ import annotations

from workers.pool import Event, SerialPool


class InterruptedPool(SerialPool):
    """Runs `num_jobs` jobs; Ctrl-C comes while the next one runs."""

    def __init__(self, num_jobs: int) -> None:
        super().__init__()
        self._num_left = num_jobs

    def poll(self, timeout_s: float) -> list[Event]:
        if self._num_left == 0:
            raise KeyboardInterrupt
        self._num_left -= 1
        return super().poll(timeout_s)

"""Ctrl-C and SIGTERM, obeyed between two steps of the loop."""

from __future__ import annotations

import signal
from types import FrameType


class Interruption:
    """Notes the first signal and raises KeyboardInterrupt at the next `check`; a second signal raises at once.

    An exception out of a signal handler may land in a library's callback, where it is swallowed, or between two ledgers.
    """

    def __init__(self) -> None:
        self._is_requested = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._is_requested:
            raise KeyboardInterrupt
        self._is_requested = True

    def check(self) -> None:
        if self._is_requested:
            raise KeyboardInterrupt

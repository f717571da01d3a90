"""What a command waits for, said once the wait is long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat

LONG_S = 5.0
LATER_S = (10.0, 20.0, 30.0, 60.0)
"""Pauses between one word and the next; the last one counts from then on."""

AT_ONCE_S = 1.5
"""For a command that has said nothing yet: its user sees a line within two seconds."""


@contextmanager
def waiting(what: str, say: Callable[[str], None] | None = None, *, first_s: float = LONG_S) -> Iterator[None]:
    """While the block runs, say `what` and the seconds so far: after `first_s`, then more and more sparsely.

    A block that is over sooner says nothing. `say` prints to standard error unless given.
    """
    tell = say or _print_to_stderr
    pauses_s = chain((first_s,), LATER_S, repeat(LATER_S[-1]))
    with repeating(pauses_s, lambda elapsed_s: tell(f"{what}: {elapsed_s:.0f} s so far")):
        yield


@contextmanager
def repeating(pauses_s: Iterable[float], act: Callable[[float], None]) -> Iterator[None]:
    """While the block runs, call `act` with the seconds since its start after each of these pauses, in a thread of its own."""
    began, is_over = time.monotonic(), threading.Event()

    def run() -> None:
        for pause_s in pauses_s:
            if is_over.wait(pause_s):
                return
            act(time.monotonic() - began)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

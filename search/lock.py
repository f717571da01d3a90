"""One driver per study: lock files in the runs directory and beside the journal, a lease in a storage without common disk."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from results.tracking import user_name

if TYPE_CHECKING:
    import optuna

LEASE_S = 60.0
SETTLE_S = 1.0
POLL_S = 2.0
LEASE_ATTRIBUTE = "driver_lease"


class StudyIsDriven(ValueError):
    """Another driver holds the study; the message says which."""


class Hold(Protocol):
    """The right to drive a study, for as long as it is renewed."""

    def renew(self) -> None: ...

    def release(self) -> None: ...


def _holder() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "kernel": _kernel(),
        "user": user_name() or f"user id {os.getuid()}",
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _kernel() -> str:
    """What process ids are unique within: containers may share a host's name but not its processes. Empty where unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _has_died(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to be gone: a process of this very machine that is no more."""
    if (holder.get("host"), holder.get("kernel")) != (socket.gethostname(), _kernel()):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user
        return False
    return False


def _refusal(study: str, holder: dict[str, Any]) -> StudyIsDriven:
    return StudyIsDriven(f"study {study!r} is being run by {_described(holder)}; wait for it, stop it, or use another --name")


def _described(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} of {holder.get('user')} on {holder.get('host')}, since {holder.get('since')}"


class LockFile:
    """Held through the operating system: it ends with the process, however that ends."""

    def __init__(self, path: Path, study: str):
        from filelock import FileLock, Timeout

        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path)
        self._holder_file = path.with_suffix(".holder.json")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise _refusal(study, self._read_holder()) from None
        self._holder_file.write_text(json.dumps(_holder()))

    def _read_holder(self) -> dict[str, Any]:
        try:
            return json.loads(self._holder_file.read_text())
        except (OSError, json.JSONDecodeError):
            return {}

    def renew(self) -> None:
        """Nothing to do: the operating system keeps the lock."""

    def release(self) -> None:
        self._lock.release()


class Lease:
    """Held by a dated note in the study's attributes; a driver that stops renewing it loses it after a minute.

    One that is found held is taken at once if its holder was killed on this machine; else it is waited for, as a holder
    that lives will renew it before it expires. `say` is told of the wait.
    """

    def __init__(
        self,
        study: optuna.Study,
        *,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._study = study
        self._clock = clock
        self._note = {**_holder(), "token": uuid.uuid4().hex}
        self._wait_until_free(say or (lambda text: None), sleep)
        self._write()
        # Two drivers may both have found it free: the one whose note survives the other's write has it.
        sleep(SETTLE_S)
        self._check_held()

    def renew(self) -> None:
        """Raises StudyIsDriven if another driver has taken the lease since: this one must stop."""
        if self._until - self._clock() < LEASE_S / 2:
            self._check_held()
            self._write()

    def release(self) -> None:
        if self.is_held():
            self._study.set_user_attr(LEASE_ATTRIBUTE, {**self._note, "until": 0.0})

    def is_held(self) -> bool:
        """Whether the study exists and the note in it is still ours."""
        return (self._read() or {}).get("token") == self._note["token"]

    def _wait_until_free(self, say: Callable[[str], None], sleep: Callable[[float], None]) -> None:
        held = self._read()
        if not held or held["until"] <= self._clock() or _has_died(held):
            return
        # Another machine's clock may be far ahead of ours; a minute without renewal is enough by any clock.
        expires = min(held["until"], self._clock() + LEASE_S)
        left_s = expires - self._clock()
        say(f"study {self._study.study_name!r} is held by {_described(held)}; waiting up to {left_s:.0f} s to see whether that one lives")
        while (now := self._clock()) < expires:
            sleep(min(POLL_S, expires - now))
            seen = self._read()
            if not seen or seen["until"] == 0.0:
                return
            if (seen["token"], seen["until"]) != (held["token"], held["until"]):
                raise _refusal(self._study.study_name, seen)

    def _check_held(self) -> None:
        held = self._read()
        if held is None:
            raise StudyIsDriven(f"study {self._study.study_name!r} has been deleted or set aside by another driver")
        if held.get("token") != self._note["token"]:
            raise _refusal(self._study.study_name, held)

    def _read(self) -> dict[str, Any] | None:
        """The note as it is in the storage now, empty if there is none; None if the study is no more."""
        try:
            return self._study.user_attrs.get(LEASE_ATTRIBUTE, {})
        except KeyError:
            return None

    def _write(self) -> None:
        self._until = self._clock() + LEASE_S
        self._study.set_user_attr(LEASE_ATTRIBUTE, {**self._note, "until": self._until})

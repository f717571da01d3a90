"""One driver per study: a lock file beside the journal, or a lease kept in the storage where there is no common disk."""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import optuna

LEASE_S = 60.0
LEASE_ATTRIBUTE = "driver_lease"


class StudyIsDriven(ValueError):
    """Another driver holds the study; the message says which."""


class Hold(Protocol):
    """The right to drive a study, for as long as it is renewed."""

    def renew(self) -> None: ...

    def release(self) -> None: ...


def _holder() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "user": getpass.getuser(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _refusal(study: str, holder: dict[str, Any]) -> StudyIsDriven:
    who = f"process {holder.get('pid')} of {holder.get('user')} on {holder.get('host')}, since {holder.get('since')}"
    return StudyIsDriven(f"study {study!r} is being run by {who}; wait for it, stop it, or use another --name")


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
    """Held by a dated note in the study's attributes; a driver that stops renewing it loses it after a minute."""

    def __init__(self, study: optuna.Study, clock: Callable[[], float] = time.time, settle_s: float = 1.0):
        self._study = study
        self._clock = clock
        self._note = {**_holder(), "token": uuid.uuid4().hex}
        held = study.user_attrs.get(LEASE_ATTRIBUTE)
        if held and held["until"] > clock():
            raise _refusal(study.study_name, held)
        self._write()
        # Two drivers may both have found it free: the one whose note survives the other's write has it.
        time.sleep(settle_s)
        held = study.user_attrs[LEASE_ATTRIBUTE]
        if held["token"] != self._note["token"]:
            raise _refusal(study.study_name, held)

    def _write(self) -> None:
        self._until = self._clock() + LEASE_S
        self._study.set_user_attr(LEASE_ATTRIBUTE, {**self._note, "until": self._until})

    def renew(self) -> None:
        if self._until - self._clock() < LEASE_S / 2:
            self._write()

    def release(self) -> None:
        self._study.set_user_attr(LEASE_ATTRIBUTE, {**self._note, "until": 0.0})

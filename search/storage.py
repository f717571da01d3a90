"""Opening Optuna's storage, whole: a readable error when it cannot be reached, a torn journal mended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.storages.journal import JournalFileSymlinkLock

LOCK_GRACE_S = 5
"""After this time a journal lock is taken from its holder: Optuna's default of 30 s is spent waiting for dead ones."""

GRPC = "grpc://"


class StorageError(ValueError):
    """The storage cannot be opened; the message says which and why."""


def open_storage(location: str | Path) -> BaseStorage:
    """The storage behind a journal file's path, a database URL or `grpc://host:port` of Optuna's proxy.

    Raises StorageError if it cannot be reached or is no Optuna storage.
    """
    text = str(location)
    try:
        if text.startswith(GRPC):
            return _grpc(text)
        if "://" in text:
            from optuna.storages import RDBStorage

            return RDBStorage(text)
        return _journal(Path(text))
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise StorageError(f"Optuna storage {text!r} cannot be opened: {reason}") from error


def _grpc(url: str) -> BaseStorage:
    from optuna.storages import GrpcStorageProxy

    host, _, port = url.removeprefix(GRPC).partition(":")
    storage = GrpcStorageProxy(host=host, port=int(port or 13000))
    storage.wait_server_ready(timeout=10)
    return storage


def _journal(path: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileSymlinkLock(str(path), grace_period=LOCK_GRACE_S)
    if path.exists():
        mend_journal(path, lock)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def mend_journal(path: Path, lock: JournalFileSymlinkLock) -> int:
    """Cut back a last line that a killed writer left torn; returns the number of bytes cut.

    Optuna reads such a file but appends to the torn line, after which nobody can read it. Works under the journal's own
    lock, so a line that is just being written by another process is never cut. Raises ValueError if the file holds
    something else than journal lines.
    """
    lock.acquire()
    try:
        with path.open("r+b") as file:
            content_end = file.seek(0, 2)
            tail_start = _start_of_last_line(file, content_end)
            file.seek(tail_start)
            tail = file.read()
            if not tail or (tail.endswith(b"\n") and _is_json(tail)):
                return 0
            if tail_start == 0 and not tail.startswith(b"{"):
                raise ValueError("the file is not an Optuna journal")
            file.truncate(tail_start)
            return content_end - tail_start
    finally:
        lock.release()


def _start_of_last_line(file, end: int, block: int = 4096) -> int:
    position = max(end - 1, 0)
    while position > 0:
        start = max(position - block, 0)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        position = start
    return 0


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return False
    return True

"""Opening Optuna's storage, whole: a readable error when it cannot be reached, a torn journal mended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from results.paths import without_password

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.storages.journal import JournalFileSymlinkLock
    from optuna.study import Study

LOCK_GRACE_S = 5
"""After this time a journal lock is taken from its holder: Optuna's default of 30 s is spent waiting for dead ones."""

GRPC = "grpc://"

ENTRY_START = b'{"op_code":'
"""How Optuna begins every line of a journal; by it a torn first line is told from a file of something else."""


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
        raise StorageError(f"Optuna storage {without_password(text)!r} cannot be opened: {reason}") from error


def trial_id_of(study: Study, storage: BaseStorage, number: int) -> int:
    """The id under which `storage` keeps the trial of this number: what adopting or ending it takes."""
    return storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(study.study_name), number)


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
    lock, so a line that is just being written by another process is never cut. Raises ValueError, the file untouched, if
    it holds something else than journal lines: a file of the user's may have been named by mistake.
    """
    lock.acquire()
    try:
        with path.open("r+b") as file:
            content_end = file.seek(0, 2)
            if not content_end:
                return 0
            _check_head(file)
            tail_start = _start_of_last_line(file, content_end)
            file.seek(tail_start)
            tail = file.read()
            if tail.endswith(b"\n"):
                if not _is_entry(tail):
                    raise ValueError("the file is not an Optuna journal: its last line is no entry of one")
                return 0
            file.truncate(tail_start)
            return content_end - tail_start
    finally:
        lock.release()


def _check_head(file: BinaryIO) -> None:
    """Raise ValueError unless the first line is a journal's, whole or, as the only one, torn."""
    file.seek(0)
    head = file.read(len(ENTRY_START))
    if head.startswith(b"{"):
        head += file.readline()
    is_torn = not head.endswith(b"\n") and ENTRY_START.startswith(head[: len(ENTRY_START)])
    if not is_torn and not (head.endswith(b"\n") and _is_entry(head)):
        raise ValueError("the file is not an Optuna journal")


def _start_of_last_line(file: BinaryIO, end: int, block: int = 4096) -> int:
    position = max(end - 1, 0)
    while position > 0:
        start = max(position - block, 0)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        position = start
    return 0


def _is_entry(line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError):
        return False
    return isinstance(entry, dict) and "op_code" in entry

"""The identity of files by their contents: a hash of the bytes, read once for each state of a file.

The state of a file is what `stat` tells of it: size, mtime, ctime and inode. A file that was written less than `SETTLED_S` ago
is read every time, as it may change once more without another time stamp (git calls such an entry of its index racy). There is one limit: a
change that keeps all four is not seen. A change whose mtime is set back is seen, because the ctime moves.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SETTLED_S = 2.0
"""The coarsest time stamps of a file system in use (FAT)."""
UNREADABLE = "unreadable"
"""Stands for the hash of a file that cannot be read. A data set skips its image like a damaged one, whatever the bytes are."""
READ_AT_ONCE = 2**24
ATTEMPTS = 3


class File(NamedTuple):
    """A file of a data source."""

    name: str
    """Where it lies in the source: the same wherever the source itself lies."""
    path: str


class FileState(NamedTuple):
    """What tells, without reading it, that a file is still the same."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def is_settled(self, now_ns: int) -> bool:
        """Whether a change from now on must give the file another ctime."""
        return now_ns - self.ctime_ns > SETTLED_S * 1e9


_Hashes = dict[str, tuple[FileState, str]]
"""By path: the state that a file was read in, and its hash."""
_hashed: _Hashes = {}


def hash_files(files: Iterable[File], store: Path | None = None) -> list[str]:
    """32 hex digits of each file's SHA-256, `UNREADABLE` for one that cannot be read.

    A file is read only if its state is new to `store`, a JSON file that is made if needed; without a store, to this process. Processes may
    share a store: each replaces the whole file, and a hash that is lost this way is computed again.
    """
    now_ns = time.time_ns()
    known = _hashed if store is None else _load(store)
    hashes: list[str] = []
    kept: _Hashes = {}
    for _, path in files:
        try:
            entry = known.get(path)
            if entry is None or entry[0] != FileState.of(os.stat(path)):
                entry = _read(path)
        except OSError:
            hashes.append(UNREADABLE)
            continue
        hashes.append(entry[1])
        if entry[0].is_settled(now_ns):
            kept[path] = entry
    if store is None:
        _hashed.update(kept)
    elif kept != known:
        _save(store, kept)
    return hashes


def stamp_of(files: Iterable[File]) -> str:
    """16 hex digits that change when a file is written, renamed, added or removed. Only files that are not settled are read."""
    now_ns = time.time_ns()
    digest = hashlib.sha256()
    for name, path in sorted(files):
        try:
            status = os.stat(path)
            state = FileState.of(status)
            content = "" if state.is_settled(now_ns) or not stat.S_ISREG(status.st_mode) else _read(path)[1]
        except OSError:
            state, content = None, UNREADABLE
        digest.update(f"{name}\0{state}{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _read(path: str) -> tuple[FileState, str]:
    """The hash of a file with its state before the reading, which is not the present one if the file is still being written."""
    attempt = 0
    while True:
        attempt += 1
        with open(path, "rb", buffering=0) as file:
            before = FileState.of(os.fstat(file.fileno()))
            # `file_digest` takes twice as long for small files: it makes a large buffer for each.
            digest = hashlib.sha256(file.read()) if before.size < READ_AT_ONCE else hashlib.file_digest(file, "sha256")
            if attempt == ATTEMPTS or before == FileState.of(os.fstat(file.fileno())):
                return before, digest.hexdigest()[:32]


def _load(store: Path) -> _Hashes:
    try:
        return {path: (FileState(*state), str(content)) for path, (*state, content) in json.loads(store.read_text()).items()}
    # A store that was cut off, or of another version, is as good as none.
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _save(store: Path, entries: _Hashes) -> None:
    store.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=store.parent, prefix=f".{store.name}-")
    try:
        with open(handle, "w") as file:
            json.dump({path: [*state, content] for path, (state, content) in entries.items()}, file)
        os.replace(temporary, store)
    finally:
        Path(temporary).unlink(missing_ok=True)

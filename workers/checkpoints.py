"""Files of a training: checkpoints that survive `kill -9` at any moment, and the weights a finished training leaves.

A checkpoint is `step-00001234-<16 hex digits>.pt`: written under another name, synced, and renamed when it is whole. The digits are
the SHA-256 of its bytes, so name, contents and checksum appear in one step and a damaged file gives itself away.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import nn

from space.model import Model, build_model, model_from_json

KEPT = 2
UNFINISHED = ".writing-"
CHECKPOINT = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")


class _Hashing:
    """A file for `torch.save` that hashes what goes through it."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the state after `step` steps, remove all but the last two checkpoints up to that step, and return the new file."""
    with _appearing_whole(folder) as (file, name_it):
        hashing = _Hashing(file)
        torch.save(state, cast("BinaryIO", hashing))
        path = name_it(f"step-{step:08d}-{hashing.sha256.hexdigest()[:16]}.pt")
    for old in _checkpoints(folder, up_to=step)[:-KEPT]:
        old.unlink()
    return path


def link_checkpoints(source: Path, folder: Path) -> None:
    """Put the checkpoints of `source` into `folder` too: as hard links, or as copies where the file system has no hard links.

    Nothing in `source` changes. A checkpoint that vanishes meanwhile is left out; a damaged one is found when it is read.
    """
    for path in _checkpoints(source):
        target = folder / path.name
        if target.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except FileNotFoundError:
            continue
        except OSError:
            with suppress(FileNotFoundError), path.open("rb") as original, _appearing_whole(folder) as (file, name_it):
                shutil.copyfileobj(original, file)
                name_it(path.name)


def latest_checkpoint(folder: Path, warn: Callable[[str], None], *, up_to: int | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint after at most `up_to` steps, with its state on the CPU; None if there is none.

    A damaged checkpoint is named to `warn` and set aside, and the one before it is used. Files that a killed process left half-written are
    removed. Only the process that writes to `folder` may call this, and only before it writes.
    """
    for unfinished in folder.glob(f"{UNFINISHED}*"):
        unfinished.unlink()
    for path in reversed(_checkpoints(folder, up_to)):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if path.stem.endswith(f"-{digest[:16]}"):
            return path, torch.load(path, map_location="cpu", weights_only=True)
        path.rename(path.with_name(f"damaged-{path.name}"))
        warn(f"checkpoint {path} is damaged, its checksum differs: the one before it is used")
    return None


def save_model(path: Path, network: nn.Module, model: Model, **more: str) -> None:
    """The weights of `network` with the spec of its architecture and `more`, in one file that appears only when it is whole."""
    with _appearing_whole(path.parent) as (file, name_it):
        torch.save({"spec": json.dumps(model.to_json()), **more, "weights": network.state_dict()}, file)
        name_it(path.name)


def load_model(path: Path, device: str = "cpu") -> tuple[nn.Module, Model]:
    """The network that `save_model` stored, in evaluation mode on `device`, and its spec."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    model = model_from_json(json.loads(stored["spec"]))
    network = build_model(model, seed=0)
    network.load_state_dict(stored["weights"])
    return network.eval().to(device), model


def _checkpoints(folder: Path, up_to: int | None = None) -> list[Path]:
    """Oldest first."""
    found = ((CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("step-*.pt"))
    steps = sorted((int(match.group(1)), path) for match, path in found if match)
    return [path for step, path in steps if up_to is None or step <= up_to]


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[tuple[BinaryIO, Callable[[str], Path]]]:
    """A temporary file, and the function that gives the written file its name. A file that gets no name is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{UNFINISHED}{uuid.uuid4().hex}"
    with temporary.open("xb") as file:

        def name_it(name: str) -> Path:
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, folder / name)
            _sync_folder(folder)
            return folder / name

        try:
            yield file, name_it
        finally:
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

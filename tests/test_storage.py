"""Opening Optuna's storage after a crash, and errors that a user can read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileSymlinkLock

from search.lock import Lease, LockFile, StudyIsDriven
from search.storage import StorageError, mend_journal, open_storage


def make_study(path: Path, num_trials: int) -> None:
    study = optuna.create_study(study_name="s", storage=open_storage(path), load_if_exists=True)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=num_trials)


@pytest.mark.parametrize("torn_bytes", [1, 7, 20])
def test_a_torn_last_line_is_cut_back_and_the_study_goes_on(tmp_path: Path, torn_bytes: int):
    journal = tmp_path / "optuna.journal"
    make_study(journal, 3)
    journal.write_bytes(journal.read_bytes()[:-torn_bytes])
    make_study(journal, 2)
    trials = optuna.load_study(study_name="s", storage=open_storage(journal)).trials
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]


def test_a_whole_journal_is_left_as_it_is(tmp_path: Path):
    journal = tmp_path / "optuna.journal"
    make_study(journal, 2)
    before = journal.read_bytes()
    assert mend_journal(journal, JournalFileSymlinkLock(str(journal))) == 0
    assert journal.read_bytes() == before


def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path: Path):
    notes = tmp_path / "notes.txt"
    notes.write_text("dear diary")
    with pytest.raises(StorageError, match="not an Optuna journal"):
        open_storage(notes)
    assert notes.read_text() == "dear diary"


@pytest.mark.parametrize("location", ["postgres://nowhere:1/x", "sqlite:////nonexistent/folder/x.db"])
def test_a_storage_that_cannot_be_reached_is_named(location: str):
    with pytest.raises(StorageError, match="cannot be opened"):
        open_storage(location)


def test_a_second_driver_is_refused_and_told_who_holds_the_study(tmp_path: Path):
    hold = LockFile(tmp_path / "s.lock", "s")
    code = f"from pathlib import Path; from search.lock import LockFile; LockFile(Path({str(tmp_path / 's.lock')!r}), 's')"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"is being run by process {os.getpid()} of" in other.stderr
    hold.release()
    LockFile(tmp_path / "s.lock", "s").release()


def test_a_lease_keeps_others_out_until_it_expires():
    now = [1000.0]
    study = optuna.create_study()
    lease = Lease(study, clock=lambda: now[0], settle_s=0)
    with pytest.raises(StudyIsDriven, match=f"process {os.getpid()}"):
        Lease(study, clock=lambda: now[0], settle_s=0)
    now[0] += 45
    lease.renew()
    now[0] += 45
    with pytest.raises(StudyIsDriven):
        Lease(study, clock=lambda: now[0], settle_s=0)
    now[0] += 61
    Lease(study, clock=lambda: now[0], settle_s=0)

"""Opening Optuna's storage after a crash, and errors that a user can read."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileSymlinkLock
from optuna.trial import TrialState
from test_faults import driver

from results.paths import journal_lock
from search.lock import LEASE_ATTRIBUTE, LEASE_S, Lease, LockFile, StudyIsDriven
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


def sqlite_file() -> bytes:
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE trials (number INTEGER, note TEXT)")
    database.execute("INSERT INTO trials VALUES (1, 'a line\nand another')")
    database.commit()
    return database.serialize()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"dear diary", id="one line without end"),
        pytest.param(b"dear diary\n", id="one line"),
        pytest.param(b"milk\nbread\nbutter", id="lines without end"),
        pytest.param(b"milk\nbread\nbutter\n", id="lines"),
        pytest.param(b'{"score": 1.0}', id="a JSON object without end"),
        pytest.param(b'{"score": 1.0}\n{"score": 2.0}\n{"sco', id="lines of JSON"),
        pytest.param(b'{\n "op_code": 0\n}\n', id="indented JSON"),
        pytest.param(b"[1, 2]\n", id="a JSON array"),
        pytest.param(b'{"op_code":0}\nmilk\n', id="a whole last line that is no entry"),
        pytest.param(sqlite_file(), id="SQLite"),
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path: Path, content: bytes):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(StorageError, match="not an Optuna journal"):
        open_storage(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"{", b'{"op_c', b'{"op_code":0,"worker_id"'])
def test_a_journal_torn_in_its_first_line_begins_anew(tmp_path: Path, content: bytes):
    journal = tmp_path / "optuna.journal"
    journal.write_bytes(content)
    assert mend_journal(journal, JournalFileSymlinkLock(str(journal))) == len(content)
    make_study(journal, 1)


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


def test_one_journal_has_one_lock_however_it_is_named(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "optuna.journal")
    assert journal_lock(tmp_path / "link", "s") == journal_lock(tmp_path / "optuna.journal", "s")
    assert journal_lock(tmp_path / "optuna.journal", "s") != journal_lock(tmp_path / "optuna.journal", "t")


def test_a_user_id_without_a_name_can_hold_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nameless)
    LockFile(tmp_path / "s.lock", "s").release()
    assert json.loads((tmp_path / "s.holder.json").read_text())["user"] == f"user id {os.getuid()}"


class Clock:
    """Time that passes only when it is slept, and what happens meanwhile."""

    def __init__(self):
        self.now = 1000.0
        self.meanwhile = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lease(study: optuna.Study, clock: Clock, said: list[str] | None = None) -> Lease:
    return Lease(study, clock=clock, sleep=clock.sleep, say=None if said is None else said.append)


def held_by(study: optuna.Study, clock: Clock, **changes: object) -> None:
    """A lease just taken, with another driver's particulars in its note."""
    lease(study, clock)
    study.set_user_attr(LEASE_ATTRIBUTE, {**study.user_attrs[LEASE_ATTRIBUTE], "token": "another", **changes})


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lease_that_is_renewed_keeps_others_out(clock: Clock):
    study, said = optuna.create_study(), []
    first = lease(study, clock)
    clock.meanwhile = first.renew
    with pytest.raises(StudyIsDriven, match=f"process {os.getpid()}"):
        lease(study, clock, said)
    assert len(said) == 1
    assert "waiting up to" in said[0]


def test_a_lease_that_is_not_renewed_is_taken_when_it_expires(clock: Clock):
    study = optuna.create_study()
    first, before = lease(study, clock), clock.now
    second = lease(study, clock)
    assert clock.now - before >= LEASE_S - 2
    assert second.is_held()
    assert not first.is_held()


def test_a_lease_dated_by_a_clock_far_ahead_is_waited_for_no_longer_than_one_lasts(clock: Clock):
    study = optuna.create_study()
    held_by(study, clock, host="elsewhere", until=clock.now + 10_000)
    before = clock.now
    assert lease(study, clock).is_held()
    assert clock.now - before <= LEASE_S + 2


def test_a_lease_given_back_during_the_wait_is_taken(clock: Clock):
    study, said = optuna.create_study(), []
    first, before = lease(study, clock), clock.now
    clock.meanwhile = first.release
    assert lease(study, clock, said).is_held()
    assert clock.now - before < LEASE_S / 2


def test_the_lease_of_a_process_killed_on_this_machine_is_taken_at_once(clock: Clock):
    study, said = optuna.create_study(), []
    held_by(study, clock, pid=dead_pid())
    assert lease(study, clock, said).is_held()
    assert said == []


@pytest.mark.parametrize("place", [{"host": "elsewhere"}, {"kernel": "of another container"}])
def test_a_process_number_of_another_machine_tells_nothing(clock: Clock, place: dict[str, str]):
    study, said = optuna.create_study(), []
    held_by(study, clock, pid=dead_pid(), **place)
    lease(study, clock, said)
    assert len(said) == 1


def test_a_driver_that_lost_its_lease_stops_and_leaves_it_to_the_other(clock: Clock):
    study = optuna.create_study()
    first = lease(study, clock)
    clock.now += LEASE_S + 1
    second = lease(study, clock)
    with pytest.raises(StudyIsDriven):
        first.renew()
    first.release()
    assert second.is_held()
    second.renew()


def test_a_driver_whose_study_was_deleted_stops(clock: Clock, tmp_path: Path):
    storage = open_storage(f"sqlite:///{tmp_path / 'optuna.db'}")
    study = optuna.create_study(study_name="s", storage=storage)
    hold = lease(study, clock)
    optuna.delete_study(study_name="s", storage=storage)
    clock.now += LEASE_S
    with pytest.raises(StudyIsDriven, match="deleted or set aside"):
        hold.renew()
    hold.release()


def test_two_drivers_that_find_a_study_free_at_once_do_not_both_get_it(clock: Clock):
    study = optuna.create_study()

    def other_writes_too() -> None:
        note = study.user_attrs[LEASE_ATTRIBUTE]
        study.set_user_attr(LEASE_ATTRIBUTE, {**note, "token": "another"})

    clock.meanwhile = other_writes_too
    with pytest.raises(StudyIsDriven):
        lease(study, clock)


@pytest.mark.slow
def test_a_driver_killed_on_a_database_is_resumed_at_once_to_exactly_the_asked_trials(tmp_path: Path):
    runs, storage = tmp_path / "runs", f"sqlite:///{tmp_path / 'optuna.db'}"
    flags = ["--trials", "5", "--storage", storage]
    killed = driver(runs, *flags, pool="serial", die_at=("mlflow", 2)).wait()
    assert killed.returncode == -signal.SIGKILL
    resumed = driver(runs, *flags, pool="serial").wait()
    assert resumed.returncode == 0, resumed.stderr
    assert "waiting up to" not in resumed.stdout
    trials = optuna.load_study(study_name="faulty/search", storage=open_storage(storage)).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 5

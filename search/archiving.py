"""Setting a study aside under a dated name in every ledger; nothing is deleted, and a crash on the way loses nothing."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import chain, count

import optuna
from optuna.storages import BaseStorage

from results.mlflow_store import archivable_experiment, archive_experiment, experiment_named
from results.paths import RunPaths
from results.records import write_json_atomically
from search.lock import Hold


@dataclass(frozen=True, kw_only=True)
class Archiving:
    """Moves the study `name` out of the way; whoever makes one holds the study.

    What is to be done is written down first: a driver that is killed on the way leaves it to the next start to finish.
    """

    name: str
    first_phase: str
    paths: RunPaths
    tracking_uri: str
    storage: BaseStorage
    hold: Hold

    def run(self) -> None:
        """Give the study's things a dated name, so that its own is free; raises ValueError before anything is moved."""
        experiment = archivable_experiment(self.tracking_uri, self.name)
        study_ids = {
            study_name: self.storage.get_study_id_from_name(study_name)
            for study_name in optuna.get_all_study_names(self.storage)
            if study_name.rpartition("/")[0] == self.name
        }
        if study_ids or experiment or self.paths.study_dir(self.name).exists():
            write_json_atomically(self.paths.archiving(self.name), {"archived": self._dated_name(), "study_ids": study_ids})
            self.finish()

    def finish(self) -> None:
        """Do what was begun, if it was; every step may have been done already, in part or whole."""
        intent_file = self.paths.archiving(self.name)
        if not intent_file.exists():
            return
        intent = json.loads(intent_file.read_text())
        archived: str = intent["archived"]
        # The first phase last: on a database its study holds our lease.
        for study_name in sorted(intent["study_ids"], key=lambda each: each == f"{self.name}/{self.first_phase}"):
            self._move_study(study_name, intent["study_ids"][study_name], f"{archived}/{study_name.rpartition('/')[2]}")
        if experiment_named(self.tracking_uri, archived) is None:
            archive_experiment(self.tracking_uri, self.name, archived)
        work, archived_work = self.paths.study_dir(self.name), self.paths.study_dir(archived)
        if work.exists() and not archived_work.exists():
            work.rename(archived_work)
        intent_file.unlink()

    def _move_study(self, study_name: str, study_id: int, new_name: str) -> None:
        names = optuna.get_all_study_names(self.storage)
        # A study of that name but another id was made after ours was moved: it is not ours to move.
        if study_name not in names or self.storage.get_study_id_from_name(study_name) != study_id:
            return
        if new_name in names:
            optuna.delete_study(study_name=new_name, storage=self.storage)
        optuna.copy_study(from_study_name=study_name, from_storage=self.storage, to_storage=self.storage, to_study_name=new_name)
        # A copy can take longer than a lease lasts.
        self.hold.renew()
        optuna.delete_study(study_name=study_name, storage=self.storage)

    def _dated_name(self) -> str:
        """A name that no ledger has yet, even if two studies are set aside within a second."""
        dated = f"{self.name}@{time.strftime('%Y%m%d-%H%M%S')}"
        taken = {study_name.rpartition("/")[0] for study_name in optuna.get_all_study_names(self.storage)}

        def is_free(name: str) -> bool:
            return name not in taken and not self.paths.study_dir(name).exists() and experiment_named(self.tracking_uri, name) is None

        return next(name for name in chain([dated], (f"{dated}-{number}" for number in count(2))) if is_free(name))

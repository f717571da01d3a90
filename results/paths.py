"""Where everything of a runs directory lies, in one place."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

SQLITE = "sqlite:///"


def default_runs(environment: Mapping[str, str]) -> Path:
    """`$VITSCALE_RUNS`, else `runs` of the current directory; absolute."""
    return Path(environment.get("VITSCALE_RUNS") or "runs").expanduser().absolute()


def place_flags(runs: Path, tracking_uri: str | None, environment: Mapping[str, str]) -> str:
    """The flags, after a space, by which another command finds what is stored there; empty if it finds it without."""
    flags = [] if runs == default_runs(environment) else ["--runs", str(runs)]
    flags += ["--tracking-uri", tracking_uri] if tracking_uri else []
    return "".join(f" {shlex.quote(flag)}" for flag in flags)


@dataclass(frozen=True)
class RunPaths:
    """The files of a runs directory; `root` is made absolute. Nothing is created."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root).expanduser().absolute())

    @property
    def journal(self) -> Path:
        """Optuna's default storage."""
        return self.root / "optuna.journal"

    @property
    def mlflow_uri(self) -> str:
        """MLflow's default store."""
        return f"{SQLITE}{self.root / 'mlflow.db'}"

    @property
    def artifact_root(self) -> Path:
        """The artifacts of the default MLflow store."""
        return self.root / "mlflow-artifacts"

    @property
    def data_hashes(self) -> Path:
        """Hashes of the files of data sets, so that no start reads all their bytes again."""
        return self.root / "data-hashes"

    def study_dir(self, study_name: str) -> Path:
        """The work directories of all trials of a study."""
        return self.root / "work" / _file_name(study_name)

    def workdir(self, study_name: str, phase: str, number: int) -> Path:
        """The files of one trial: outcome, checkpoints."""
        return self.study_dir(study_name) / _file_name(phase) / f"{number:06d}"

    def lock(self, study_name: str) -> Path:
        """The lock that the one driver of the study holds."""
        return self.root / f"{_file_name(study_name)}.lock"

    def archiving(self, study_name: str) -> Path:
        """The file that exists while the study is being set aside under a dated name."""
        return self.root / f"{_file_name(study_name)}.archiving.json"


def journal_lock(journal: Path, study_name: str) -> Path:
    """The lock that the one driver of the study holds in this journal, which several runs directories may share."""
    journal = journal.resolve()
    return journal.with_name(f"{journal.name}.{_file_name(study_name)}.lock")


def sqlite_path(uri: str) -> Path | None:
    """The database file of a sqlite URI; None for any other URI."""
    return Path(uri.removeprefix(SQLITE)).absolute() if uri.startswith(SQLITE) else None


def without_password(url: str) -> str:
    """The URL with its password replaced by `***`."""
    password = urlsplit(url).password
    return url.replace(f":{password}@", ":***@") if password else url


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.=+@-]", "_", name)

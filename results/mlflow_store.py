"""The ledger of what was measured: a run per trial in MLflow, written by the driver alone.

One experiment per study; in it a parent run per invocation of the driver and a child run per trial that was evaluated.
A run of kind `trial` is found by its tag `trial_key`, which holds phase and number. While it is RUNNING (or KILLED, when
its driver is gone) it may be taken up again; FINISHED and FAILED are final, so a trial is never recorded twice. The
driver holds the study's lock (search/lock.py): whatever is RUNNING when a tracker is made belongs to a dead driver.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from results.formats import shortened
from results.mlflow_views import VIEW_TAG, leaderboard_view, view_address
from results.paths import sqlite_path, without_password
from results.records import Failure, Measurement, Metric, Outcome
from results.tracking import RunStatus, TrialRecord, user_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run, RunTag
    from mlflow.entities import Metric as Point

PAGE_SIZE = 1000
"""Runs per request; a result of MLflow is one page, and only its token says that more follow."""

MAX_BATCH_PARAMS = 100
MAX_PARAM_CHARACTERS = 500
"""MLflow's limits of one request and of one value; newer servers take longer values, older ones refuse them."""

MAX_TAG_CHARACTERS = 8000
MAX_NAME_CHARACTERS = 250
FLUSH_INTERVAL_S = 5.0
FLUSH_POINTS = 500
CHECK_TIMEOUT_S = 5

CANDIDATE_FILE = "candidate.json"
TRACEBACK_FILE = "traceback.txt"
PARAMS_FILE = "params.json"
"""All parameters of a run, written where one is too long for MLflow, which then holds its beginning and an ellipsis."""

DESIGNS_FILE = "designs.json"
DESIGNS_TAG = "designs"
"""Tag of a parent run: the phases that have a design. The designs themselves are its artifact."""
QUESTION_FILE = "question.json"
QUESTION_TAG = "question"
"""Tag of a parent run: the kind of question that its study answers. The question itself is its artifact."""

CURVE = "curve/"
"""Prefix of the metrics that were reported while a trial ran; without it the last point could hide the final value."""

ELAPSED = "elapsed_s"
FINAL_STATUSES = ("FINISHED", "FAILED")
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
STUDY_ID_TAG = "study_id"


class UnreadableStudy(ValueError):
    """A study or store that cannot be read; the message says what there is instead."""


@dataclass(frozen=True, kw_only=True)
class StudyRuns:
    """The MLflow runs of a study over all invocations, in the order they began: a parent for each invocation, and the trials."""

    uri: str
    study_name: str
    client: MlflowClient
    parents: tuple[Run, ...]
    trials: tuple[Run, ...]


@dataclass(kw_only=True)
class _OpenRun:
    run_id: str
    artifact_uri: str
    logged: Mapping[str, float] = field(default_factory=dict)
    points: list[tuple[str, float, int, int]] = field(default_factory=list)
    flushed_at: float = field(default_factory=time.monotonic)


class MlflowTracker:
    """Writes to MLflow's store or server behind `uri`.

    A new tracker sets the runs that dead invocations left RUNNING to KILLED. A trial that is opened again continues in its own run,
    which moves under the new parent: a parent lists the trials that ended under it. `artifact_root` is used for a store without a
    server (default: `mlflow-artifacts` beside a sqlite file); a server chooses its own. `invocation` holds the
    settings of the parent run, `command` among them if known; `objectives` the metrics of each phase that decide its rank.
    `measured` are the names, by phase, of all that is measured: with the objectives they make the phase's leaderboard in MLflow.
    `designs` is the JSON, by phase, of what will be tested, and `question` that of what the study as a whole answers: both stand in the
    parent run before the first trial does.
    `study_id` tells this study from others of its name: ValueError is raised if the experiment holds one of those.
    """

    def __init__(
        self,
        uri: str,
        study_name: str,
        *,
        study_id: str = "",
        artifact_root: Path | None = None,
        invocation: Mapping[str, str],
        objectives: Mapping[str, Sequence[Metric]],
        measured: Mapping[str, Collection[str]] | None = None,
        designs: Mapping[str, Any] | None = None,
        question: Mapping[str, Any] | None = None,
    ):
        self.uri = uri
        self.study_name = study_name
        path = sqlite_path(uri)
        if path is not None:
            artifact_root = artifact_root or path.parent / "mlflow-artifacts"
            _create_sqlite_store(path)
        self._client = mlflow_client(uri)
        self._experiment_id = self._open_experiment(artifact_root, study_id)
        for run in self._runs("attributes.status = 'RUNNING'"):
            self._client.set_terminated(run.info.run_id, "KILLED")
        for phase, metrics in objectives.items():
            view = leaderboard_view(phase, metrics, (measured or {}).get(phase, ()))
            self._client.set_experiment_tag(self._experiment_id, VIEW_TAG + phase, view)
        self._phases = tuple(objectives)
        self._user = _user_tags()
        self.parent_run_id = self._open_parent(invocation, objectives)
        if designs:
            self._client.log_text(self.parent_run_id, json.dumps(designs, indent=1), DESIGNS_FILE)
            self._client.set_tag(self.parent_run_id, DESIGNS_TAG, ", ".join(designs))
        if question:
            self._client.log_text(self.parent_run_id, json.dumps(question, indent=1), QUESTION_FILE)
            self._client.set_tag(self.parent_run_id, QUESTION_TAG, question["kind"])
        self._open: dict[str, _OpenRun] = {}
        self._highest: dict[str, int] = {}

    def open(self, trial: TrialRecord) -> None:
        key = trial_key(trial.phase, trial.number)
        if key not in self._open and (known := self._find(trial.phase, trial.number)):
            if known.info.status not in FINAL_STATUSES:
                self._open[key] = self._take_up(known)
        elif key not in self._open:
            self._open[key] = self._create(trial)

    def report(self, trial: TrialRecord, name: str, value: float, step: int) -> None:
        run = self._open.get(trial_key(trial.phase, trial.number))
        if run is None:
            return
        run.points.append((name, float(value), step, _now_ms()))
        if len(run.points) >= FLUSH_POINTS:
            self._flush(run)

    def flush(self) -> None:
        # Not left to the next point: that may be an epoch away.
        for run in self._open.values():
            if run.points and time.monotonic() - run.flushed_at > FLUSH_INTERVAL_S:
                self._flush(run)

    def record(self, trial: TrialRecord, outcome: Outcome, artifacts: Path | None = None) -> None:
        self.open(trial)
        run = self._open.pop(trial_key(trial.phase, trial.number), None)
        if run is None:
            return
        from mlflow.entities import Metric as Point
        from mlflow.entities import RunTag

        self._flush(run)
        now = _now_ms()
        # A driver killed after log_batch and before the end of this function left the values there: they are not logged twice.
        values = {name: float(value) for name, value in _metric_values(outcome).items() if run.logged.get(name) != float(value)}
        self._log(
            run.run_id,
            params=trial.params,
            metrics=[Point(name, value, now, 0) for name, value in values.items()],
            tags=[RunTag(name, text[:MAX_TAG_CHARACTERS]) for name, text in {**_trial_tags(trial), **_outcome_tags(outcome)}.items()],
        )
        if artifacts is not None and artifacts.is_dir():
            self._copy_files(run, artifacts)
        self._write_text(run, CANDIDATE_FILE, json.dumps(dict(trial.candidate), indent=1))
        if isinstance(outcome, Failure) and outcome.traceback:
            self._write_text(run, TRACEBACK_FILE, outcome.traceback)
        self._client.set_terminated(run.run_id, "FAILED" if isinstance(outcome, Failure) else "FINISHED")

    def finished_outcome(self, phase: str, number: int) -> Outcome | None:
        run = self._find(phase, number)
        if run is None or run.info.status not in FINAL_STATUSES:
            return None
        return recorded_outcome(run, lambda name: read_artifact(self._client, run, name) or "")

    def mark_family(self, phase: str, numbers: Sequence[int]) -> None:
        wanted = {number: str(step) for step, number in enumerate(numbers)}
        marked = {int(run.data.tags["trial"]): run for run in self._runs(f"tags.phase = '{phase}' and tags.family_step != ''")}
        for number, run in marked.items():
            if number not in wanted:
                self._client.delete_tag(run.info.run_id, "family_step")
        for number, step in wanted.items():
            run = marked.get(number) or self._find(phase, number)
            if run is not None and run.data.tags.get("family_step") != step:
                self._client.set_tag(run.info.run_id, "family_step", step)

    def attach(self, *, description: str, files: Sequence[Path]) -> None:
        """Give the parent run these files, and parent and experiment a description in Markdown that MLflow's pages show."""
        for file in files:
            self._client.log_artifact(self.parent_run_id, str(file))
        self._client.set_tag(self.parent_run_id, NOTE_TAG, description[:MAX_TAG_CHARACTERS])
        self._client.set_experiment_tag(self._experiment_id, NOTE_TAG, description[: MAX_TAG_CHARACTERS // 2])

    def summarize(self, *, metrics: Mapping[str, float], params: Mapping[str, str]) -> None:
        """Give the parent run what came out of the study. Called once, because MLflow refuses to change a parameter."""
        from mlflow.entities import Metric as Point
        from mlflow.entities import Param

        now = _now_ms()
        self._client.log_batch(
            self.parent_run_id,
            metrics=[Point(name, float(value), now, 0) for name, value in metrics.items()],
            params=[Param(name, shortened(value, MAX_PARAM_CHARACTERS)) for name, value in params.items()],
        )

    @property
    def view_addresses(self) -> dict[str, str]:
        """Where a browser shows the leaderboard of each phase, `STUDY/PHASE: address`."""
        return {f"{self.study_name}/{phase}": view_address(self.uri, self._experiment_id, phase) for phase in self._phases}

    def close(self, status: RunStatus) -> None:
        for run in self._open.values():
            self._flush(run)
            self._client.set_terminated(run.run_id, "KILLED")
        self._open.clear()
        self._client.set_terminated(self.parent_run_id, status)

    def _open_experiment(self, artifact_root: Path | None, study_id: str) -> str:
        experiment = self._client.get_experiment_by_name(self.study_name)
        if experiment is None:
            location = None if artifact_root is None or not _is_database(self.uri) else artifact_root.absolute().as_uri()
            tags = {"mlflow.experimentKind": "custom_model_development", STUDY_ID_TAG: study_id}
            return self._client.create_experiment(self.study_name, location, tags=tags)
        if experiment.lifecycle_stage != "active":
            raise ValueError(
                f"experiment {self.study_name!r} was deleted in MLflow ({self.uri}); restore it there, or give the study another name"
            )
        if experiment.tags.get(STUDY_ID_TAG, study_id) != study_id:
            raise ValueError(
                f"experiment {self.study_name!r} in MLflow ({without_password(self.uri)}) records another study of that name, of another "
                "Optuna storage; use another --name, or --fresh to set it aside"
            )
        return experiment.experiment_id

    def _open_parent(self, invocation: Mapping[str, str], objectives: Mapping[str, Sequence[Metric]]) -> str:
        command = invocation.get("command", "")
        tags = {
            "kind": "invocation",
            "study": self.study_name,
            "command": command,
            "objectives": json.dumps({phase: [metric.to_json() for metric in metrics] for phase, metrics in objectives.items()}),
            "mlflow.source.name": command or self.study_name,
            **self._user,
        }
        name = f"{self.study_name} {time.strftime('%Y-%m-%d %H:%M:%S')}"
        run_id = self._client.create_run(self._experiment_id, tags=tags, run_name=name).info.run_id
        self._log(run_id, params={name: value for name, value in invocation.items() if name != "command"})
        return run_id

    def _log(self, run_id: str, *, params: Mapping[str, Any], metrics: Sequence[Point] = (), tags: Sequence[RunTag] = ()) -> None:
        """One request, one more for every `MAX_BATCH_PARAMS` further parameters, and one if a parameter is too long for MLflow."""
        from mlflow.entities import Param

        if any(len(str(value)) > MAX_PARAM_CHARACTERS for value in params.values()):
            self._client.log_text(run_id, json.dumps(dict(params), indent=1), PARAMS_FILE)
        shown = [Param(name, shortened(str(value), MAX_PARAM_CHARACTERS)) for name, value in params.items()]
        for start in range(MAX_BATCH_PARAMS, len(shown), MAX_BATCH_PARAMS):
            self._client.log_batch(run_id, params=shown[start : start + MAX_BATCH_PARAMS])
        self._client.log_batch(run_id, metrics=metrics, params=shown[:MAX_BATCH_PARAMS], tags=tags)

    def _create(self, trial: TrialRecord) -> _OpenRun:
        tags = {
            PARENT_TAG: self.parent_run_id,
            "kind": "trial",
            "trial_key": trial_key(trial.phase, trial.number),
            "phase": trial.phase,
            "trial": str(trial.number),
            "label": trial.label,
            "digest": trial.digest,
            **self._user,
        }
        tags |= _trial_tags(trial)
        tags = {name: text[:MAX_TAG_CHARACTERS] for name, text in tags.items()}
        run = self._client.create_run(self._experiment_id, tags=tags, run_name=shortened(trial.label, MAX_NAME_CHARACTERS))
        self._highest[trial.phase] = max(self._highest.get(trial.phase, -1), trial.number)
        return _OpenRun(run_id=run.info.run_id, artifact_uri=run.info.artifact_uri or "")

    def _take_up(self, run: Run) -> _OpenRun:
        run_id = run.info.run_id
        self._client.update_run(run_id, status="RUNNING")
        self._client.set_tag(run_id, PARENT_TAG, self.parent_run_id)
        return _OpenRun(run_id=run_id, artifact_uri=run.info.artifact_uri or "", logged=run.data.metrics)

    def _find(self, phase: str, number: int) -> Run | None:
        """The run of a trial, a final one first. A number above all recorded ones costs no request."""
        if phase not in self._highest:
            newest = self._client.search_runs(
                [self._experiment_id], f"tags.phase = '{phase}'", order_by=["tags.trial_key DESC"], max_results=1
            )
            self._highest[phase] = int(newest[0].data.tags["trial"]) if newest else -1
        if number > self._highest[phase]:
            return None
        found = self._runs(f"tags.trial_key = '{trial_key(phase, number)}'")
        found.sort(key=lambda run: (run.info.status not in FINAL_STATUSES, run.info.start_time))
        return found[0] if found else None

    def _runs(self, filter_string: str) -> list[Run]:
        return search_runs(self._client, [self._experiment_id], filter_string)

    def _flush(self, run: _OpenRun) -> None:
        from mlflow.entities import Metric as Point

        points, run.points = run.points, []
        run.flushed_at = time.monotonic()
        if points:
            self._client.log_batch(run.run_id, metrics=[Point(CURVE + name, value, now, step) for name, value, step, now in points])

    def _write_text(self, run: _OpenRun, name: str, text: str) -> None:
        """Write an artifact; in a local folder as a plain file, which saves MLflow's request for the run (4 ms)."""
        folder = _local_folder(run.artifact_uri)
        if folder is None:
            self._client.log_text(run.run_id, text, name)
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    def _copy_files(self, run: _OpenRun, source: Path) -> None:
        folder = _local_folder(run.artifact_uri)
        if folder is None:
            self._client.log_artifacts(run.run_id, str(source))
        else:
            shutil.copytree(source, folder, dirs_exist_ok=True)


def _trial_tags(trial: TrialRecord) -> dict[str, str]:
    """Tags that only some trials have; `reused_from` may be known only when the trial ends."""
    names = ("proxy_digest", "recipe_digest", "settings_digest", "weights_digest", "reused_from")
    return {name: str(value) for name in names if (value := getattr(trial, name)) is not None}


def trial_key(phase: str, number: int) -> str:
    """Phase and padded number, so that sorting the keys of a phase as text sorts them by number."""
    return f"{phase}/{number:09d}"


def recorded_outcome(run: Run, read_text: Callable[[str], str]) -> Outcome:
    """The outcome of a final run; `read_text(name)` gives one of its text artifacts."""
    tags, metrics = run.data.tags, run.data.metrics
    elapsed_s = metrics.get(ELAPSED, 0.0)
    if run.info.status == "FAILED":
        kind: Any = tags.get("failure_kind", "error")
        return Failure(kind=kind, message=tags.get("failure_message", ""), traceback=read_text(TRACEBACK_FILE), elapsed_s=elapsed_s)
    circumstances = json.loads(tags["circumstances"])
    return Measurement(
        values={name: value for name, value in metrics.items() if name != ELAPSED and not name.startswith(CURVE)},
        elapsed_s=elapsed_s,
        device=circumstances["device"],
        versions=circumstances["versions"],
        seed=circumstances["seed"],
        num_threads=circumstances["num_threads"],
        warnings=tuple(circumstances["warnings"]),
    )


def _metric_values(outcome: Outcome) -> dict[str, float]:
    if isinstance(outcome, Failure):
        return {ELAPSED: outcome.elapsed_s}
    return {ELAPSED: outcome.elapsed_s, **outcome.values}


def _outcome_tags(outcome: Outcome) -> dict[str, str]:
    if isinstance(outcome, Failure):
        return {"failure_kind": outcome.kind, "failure_message": outcome.message or outcome.kind}
    circumstances: dict[str, Any] = {
        "device": outcome.device,
        "seed": outcome.seed,
        "num_threads": outcome.num_threads,
        "versions": dict(outcome.versions),
        "warnings": list(outcome.warnings),
    }
    while len(text := json.dumps(circumstances)) > MAX_TAG_CHARACTERS and circumstances["warnings"]:
        circumstances["warnings"] = circumstances["warnings"][: len(circumstances["warnings"]) // 2]
    return {"circumstances": text}


def mlflow_client(uri: str) -> MlflowClient:
    """A client that sends no telemetry and does not log its migrations."""
    import logging

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # A client of a server prints two lines for every run that ends.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(uri)


def search_runs(client: MlflowClient, experiment_ids: list[str], filter_string: str = "") -> list[Run]:
    """Every run that matches, over all pages."""
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs(experiment_ids, filter_string, max_results=PAGE_SIZE, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            return found


def check_tracking(uri: str) -> None:
    """Raise ValueError in one line if the store or server cannot be used; takes a few seconds at most. Creates nothing."""
    path = sqlite_path(uri)
    scheme = urlsplit(uri).scheme
    if path is not None:
        _check_sqlite(path)
        if not path.exists() or not path.stat().st_size:
            return
    elif _is_database(uri):
        _check_database(uri)
    elif scheme not in ("http", "https") and not uri.startswith("databricks"):
        raise ValueError(f"MLflow tracking URI {uri!r} is not supported; use sqlite:////PATH/mlflow.db, http://HOST:PORT or a database URL")
    try:
        with _impatient():
            mlflow_client(uri).search_experiments(max_results=1)
    except Exception as error:
        raise ValueError(f"MLflow tracking {without_password(uri)!r} cannot be used: {_reason(error)}") from error


def experiment_named(uri: str, name: str) -> Experiment | None:
    """The experiment of this name, deleted or not; None if there is none. Creates nothing."""
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return None
    return mlflow_client(uri).get_experiment_by_name(name)


def archivable_experiment(uri: str, study_name: str) -> Experiment | None:
    """The study's experiment; raises ValueError if it was deleted, because MLflow does not rename deleted experiments."""
    experiment = experiment_named(uri, study_name)
    if experiment is not None and experiment.lifecycle_stage != "active":
        raise ValueError(
            f"experiment {study_name!r} was deleted in MLflow ({without_password(uri)}) and cannot be set aside;"
            " restore it there, or give the study another name"
        )
    return experiment


def archive_experiment(uri: str, study_name: str, new_name: str) -> bool:
    """Give the study's experiment another name; nothing is deleted. False if there is no such experiment.

    Called by whoever holds the study. A run that is still RUNNING was left by a dead driver and is closed.
    """
    experiment = archivable_experiment(uri, study_name)
    if experiment is None:
        return False
    if experiment_named(uri, new_name) is not None:
        raise ValueError(f"experiment {study_name!r} cannot be archived as {new_name!r}: MLflow ({uri}) has an experiment of that name")
    client = mlflow_client(uri)
    for run in search_runs(client, [experiment.experiment_id], "attributes.status = 'RUNNING'"):
        client.set_terminated(run.info.run_id, "KILLED")
    client.rename_experiment(experiment.experiment_id, new_name)
    return True


def view_addresses(uri: str) -> dict[str, str]:
    """Where a browser shows the leaderboards of all studies of a store, `STUDY/PHASE: address`. Creates nothing.

    Raises ValueError if the store or server cannot be used.
    """
    check_tracking(uri)
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return {}
    return {
        f"{experiment.name}/{phase}": view_address(uri, experiment.experiment_id, phase)
        for experiment in mlflow_client(uri).search_experiments()
        for phase in (tag.removeprefix(VIEW_TAG) for tag in experiment.tags if tag.startswith(VIEW_TAG))
    }


def read_study(uri: str, study_name: str) -> StudyRuns:
    """All runs of a study; raises UnreadableStudy if the store or the study does not exist. Creates nothing."""
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise UnreadableStudy(f"no MLflow store at {path}; run a study first, or name another place with --runs or --tracking-uri")
    try:
        check_tracking(uri)
    except ValueError as error:
        raise UnreadableStudy(str(error)) from error
    client = mlflow_client(uri)
    experiment = client.get_experiment_by_name(study_name)
    if experiment is None:
        names = sorted(found.name for found in client.search_experiments() if found.name != "Default")
        near = difflib.get_close_matches(study_name, names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}" if near else ""
        raise UnreadableStudy(f"no study {study_name!r} in {uri}{hint}; studies there: {', '.join(names) or 'none'}")
    runs = sorted(search_runs(client, [experiment.experiment_id]), key=lambda run: run.info.start_time)
    parents, trials = (tuple(run for run in runs if run.data.tags.get("kind") == kind) for kind in ("invocation", "trial"))
    return StudyRuns(uri=uri, study_name=study_name, client=client, parents=parents, trials=trials)


def read_candidate(runs: StudyRuns, run: Run) -> dict[str, Any]:
    """The candidate of one of a study's runs as it was recorded; raises UnreadableStudy if its file is gone."""
    text = read_artifact(runs.client, run, CANDIDATE_FILE)
    if not text:
        raise UnreadableStudy(f"run {run.info.run_id} of study {runs.study_name!r} has no {CANDIDATE_FILE}")
    return json.loads(text)


def find_candidate(uri: str, digest: str) -> dict[str, Any] | None:
    """The candidate, of any experiment, whose model digest begins with `digest` (4 hex digits at least).

    Returns its JSON as it was recorded, None if no run has it. Raises ValueError for a malformed or ambiguous digest.
    """
    digest = digest.lower()
    if len(digest) < 4 or any(letter not in "0123456789abcdef" for letter in digest):
        raise ValueError(f"{digest!r} is no digest; expected at least 4 hexadecimal digits")
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return None
    client = mlflow_client(uri)
    experiment_ids = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = search_runs(client, experiment_ids, f"tags.digest LIKE '{digest}%'") if experiment_ids else []
    digests = sorted({run.data.tags["digest"] for run in runs})
    if len(digests) > 1:
        raise ValueError(f"digest {digest!r} is ambiguous: {', '.join(digests[:5])}{', ...' if len(digests) > 5 else ''}")
    for run in runs:
        if run.info.status in FINAL_STATUSES and (text := read_artifact(client, run, CANDIDATE_FILE)):
            return json.loads(text)
    return None


def _create_sqlite_store(path: Path) -> None:
    """Make MLflow's tables in a hidden file and rename it when it is complete: MLflow cannot continue half a migration."""
    if path.exists() and path.stat().st_size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder:
        unfinished = Path(folder) / path.name
        mlflow_client(f"sqlite:///{unfinished}").search_experiments(max_results=1)
        path.unlink(missing_ok=True)
        try:
            os.link(unfinished, path)
        except FileExistsError:  # another study's driver was faster
            return
        except OSError:  # a file system without hard links
            os.replace(unfinished, path)


def _check_sqlite(path: Path) -> None:
    where = f"MLflow store {str(path)!r} cannot be used"
    if path.exists():
        try:
            with sqlite3.connect(path.as_uri() + "?mode=rw", uri=True, timeout=CHECK_TIMEOUT_S) as database:
                database.execute("PRAGMA schema_version").fetchone()
        except sqlite3.Error as error:
            raise ValueError(f"{where}: {error}") from error
        if not os.access(path, os.W_OK):
            raise ValueError(f"{where}: it is not writable")
        return
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{where}: {str(parent)!r} is not a folder that can be written to")


def _check_database(uri: str) -> None:
    """Connect once, because MLflow tries a dead database fifteen times."""
    import sqlalchemy

    options = {} if uri.startswith("sqlite") else {"connect_args": {"connect_timeout": CHECK_TIMEOUT_S}}
    try:
        engine = sqlalchemy.create_engine(uri, **options)
        engine.connect().close()
        engine.dispose()
    except Exception as error:
        raise ValueError(f"MLflow tracking {without_password(uri)!r} cannot be used: {_reason(error)}") from error


@contextmanager
def _impatient() -> Iterator[None]:
    """MLflow's requests fail after seconds instead of seven retries."""
    wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(CHECK_TIMEOUT_S)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    text = str(error)
    for words, reason in (
        ("refused", "connection refused"),
        ("timed out", f"no answer within {CHECK_TIMEOUT_S} s"),
        ("resolve", "the host name cannot be resolved"),
    ):
        if words in text:
            return reason
    line = text.strip().split("\n")[0] or type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."


def _is_database(uri: str) -> bool:
    return urlsplit(uri).scheme.split("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")


def _local_folder(artifact_uri: str) -> Path | None:
    parts = urlsplit(artifact_uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(unquote(parts.path))
    return Path(artifact_uri) if artifact_uri.startswith("/") else None


def fetch_artifact(client: MlflowClient, run: Run, name: str, target: Path) -> bool:
    """Put a run's artifact into the folder `target`; False if the run has none of that name."""
    folder = _local_folder(run.info.artifact_uri or "")
    if folder is not None:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
            return True
        return False
    if not any(artifact.path == name for artifact in client.list_artifacts(run.info.run_id)):
        return False
    client.download_artifacts(run.info.run_id, name, str(target))
    return True


def read_artifact(client: MlflowClient, run: Run, name: str) -> str | None:
    """The text of a run's artifact, None if it has none of that name."""
    with tempfile.TemporaryDirectory() as folder:
        return (Path(folder) / name).read_text() if fetch_artifact(client, run, name, Path(folder)) else None


def _user_tags() -> dict[str, str]:
    user = user_name()
    return {} if user is None else {"mlflow.user": user}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

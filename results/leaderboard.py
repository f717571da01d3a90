"""The leaderboard of a study: every finished trial with its rank, as a table, CSV and one HTML page.

    python -m results.leaderboard STUDY [--top N] [--phase P] [--csv FILE] [--html FILE] [--runs DIR] [--tracking-uri URI]

Ranks are within a phase. A network's rank follows from the mean, over the phase's objectives, of its rank in each (ties
share); so the first is always on the Pareto front, and a network that dominates another stands above it. One measurement
counts once: trials that were given the measurement of an earlier one are left out.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.paths import RunPaths, default_runs, sqlite_path
from results.records import Metric
from results.tracking import CURVE, DESIGNS_TAG, check_tracking, mlflow_client, search_runs

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from results.study_effects import Effects
    from results.tracking import MlflowTracker

TABLE_WIDTH = 120
SHORT_DIGEST = 8
LEADING_COLUMNS = ("rank", "is_front", "family_step", "label", "digest", "proxy_digest", "phase", "trial")
TRAILING_COLUMNS = ("elapsed_s", "params", "device", "seed", "run_id")
COST_METRICS = ("gmacs", "params_m", "depth")


class LeaderboardError(ValueError):
    """A study or store that cannot be read; the message says what there is instead."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the numbers come from."""

    study: str
    tracking_uri: str
    commands: tuple[str, ...]
    first: str
    last: str
    versions: Mapping[str, str]
    devices: tuple[str, ...]
    seeds: tuple[int, ...]

    def lines(self) -> list[tuple[str, str]]:
        """Title and text, for people."""
        return [
            ("study", self.study),
            ("command", "; ".join(self.commands[-3:]) or "not recorded"),
            ("measured", f"{self.first} to {self.last} (UTC)" if self.first != self.last else f"{self.first} (UTC)"),
            ("device", ", ".join(self.devices)),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            ("seeds", ", ".join(map(str, self.seeds))),
            ("store", self.tracking_uri),
        ]


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """All finished trials of a study, ranked.

    `frame` has a row per measurement; `objectives` the metrics that decide the rank in each phase, in the order the phases
    ran; `num_failed` counts failures by phase and kind, `num_reused` the trials given an earlier measurement. `effects` are
    those of the study's designs, where it has any, and `effects_failure` says why they could not be stated.
    """

    frame: pd.DataFrame
    objectives: Mapping[str, tuple[Metric, ...]]
    num_failed: Mapping[str, Mapping[str, int]]
    num_reused: Mapping[str, int]
    provenance: Provenance
    effects: tuple[Effects, ...] = ()
    effects_failure: str = ""

    @property
    def phases(self) -> list[str]:
        """Those with at least one measurement."""
        found = set(self.frame["phase"])
        return [phase for phase in self.objectives if phase in found] + sorted(found - set(self.objectives))

    def phase(self, name: str) -> pd.DataFrame:
        """The rows of a phase by rank, without columns it does not fill."""
        return self.frame.loc[self.frame["phase"] == name].dropna(axis="columns", how="all")

    def metric_names(self, phase: str) -> list[str]:
        """Objectives first, each with its standard error, then what is derived from the network, then the rest."""
        known = [name for name in self.phase(phase).columns if name not in (*LEADING_COLUMNS, *TRAILING_COLUMNS)]
        first = [metric.name for metric in self.objectives.get(phase, ())]
        first = list(dict.fromkeys([*(name for metric in first for name in (metric, f"{metric}_stderr")), *COST_METRICS]))
        return [name for name in first if name in known] + [name for name in known if name not in first]

    def summary(self, phase: str) -> str:
        rows = self.phase(phase)
        objectives = ", ".join(f"{metric.name} ({metric.goal})" for metric in self.objectives.get(phase, ())) or "none"
        failed = self.num_failed.get(phase, {})
        parts = [f"{len(rows)} measured", f"{sum(rows['is_front'])} on the Pareto front"]
        if reused := self.num_reused.get(phase, 0):
            parts.append(f"{_count(reused, 'repeat')} left out")
        if failed:
            parts.append(f"{sum(failed.values())} failed ({', '.join(f'{count} {kind}' for kind, count in failed.items())})")
        return f"{'; '.join(parts)}; objectives: {objectives}"


def load(uri: str, study: str) -> pd.DataFrame:
    """All finished trials of the study; see `load_results`."""
    return _results(_runs(_client(uri), uri, study), study, uri).frame


def load_results(uri: str, study: str) -> StudyResults:
    """Everything MLflow holds of the study, over all invocations.

    Raises LeaderboardError if the store or the study does not exist; never creates a store.
    """
    client = _client(uri)
    runs = _runs(client, uri, study)
    results = _results(runs, study, uri)
    parents = [run for run in runs if run.data.tags["kind"] == "invocation"]
    if not any(DESIGNS_TAG in run.data.tags for run in parents):
        return results
    from results.study_effects import load_effects

    trials = [run for run in runs if run.data.tags["kind"] == "trial"]
    try:
        return replace(results, effects=load_effects(client, study, parents, trials))
    except Exception as error:  # whatever is wrong with the effects, the measurements stand
        return replace(results, effects_failure=_effects_failure(error))


def _effects_failure(error: Exception) -> str:
    return f"effects could not be stated: {type(error).__name__}: {error}"


def _client(uri: str) -> MlflowClient:
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise LeaderboardError(f"no MLflow store at {path}; run a study first, or name another place with --runs or --tracking-uri")
    try:
        check_tracking(uri)
    except ValueError as error:
        raise LeaderboardError(str(error)) from error
    return mlflow_client(uri)


def _runs(client: MlflowClient, uri: str, study: str) -> list[Run]:
    """The study's runs of trials and invocations, in the order they began."""
    experiment = client.get_experiment_by_name(study)
    if experiment is None:
        names = sorted(found.name for found in client.search_experiments() if found.name != "Default")
        near = difflib.get_close_matches(study, names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}" if near else ""
        raise LeaderboardError(f"no study {study!r} in {uri}{hint}; studies there: {', '.join(names) or 'none'}")
    runs = search_runs(client, [experiment.experiment_id])
    runs.sort(key=lambda run: run.info.start_time)
    return [run for run in runs if run.data.tags.get("kind") in ("trial", "invocation")]


def _results(runs: Sequence[Run], study: str, uri: str) -> StudyResults:
    parents = [run for run in runs if run.data.tags["kind"] == "invocation"]
    trials = [run for run in runs if run.data.tags["kind"] == "trial"]
    objectives: dict[str, tuple[Metric, ...]] = {}
    for parent in parents:
        for phase, metrics in json.loads(parent.data.tags.get("objectives", "{}")).items():
            objectives[phase] = tuple(Metric(**metric) for metric in metrics)
    failed: dict[str, Counter[str]] = {}
    for run in trials:
        if run.info.status == "FAILED":
            tags = run.data.tags
            failed.setdefault(tags["phase"], Counter())[tags.get("failure_kind", "error")] += 1
    finished = [run for run in trials if run.info.status == "FINISHED"]
    kept, reused = _first_measurements(finished)
    circumstances = [json.loads(run.data.tags["circumstances"]) for run in kept]
    frame = _ranked(_frame(kept, circumstances), objectives)
    times = sorted(run.info.end_time or run.info.start_time for run in finished)
    return StudyResults(
        frame=frame,
        objectives=objectives,
        num_failed=failed,
        num_reused=reused,
        provenance=Provenance(
            study=study,
            tracking_uri=uri,
            commands=tuple(dict.fromkeys(parent.data.tags["command"] for parent in parents if parent.data.tags.get("command"))),
            first=_date(times[0]) if times else "",
            last=_date(times[-1]) if times else "",
            versions={name: version for found in circumstances for name, version in found["versions"].items()},
            devices=tuple(sorted({found["device"] for found in circumstances})),
            seeds=tuple(sorted({found["seed"] for found in circumstances})),
        ),
    )


def _first_measurements(finished: Sequence[Run]) -> tuple[list[Run], Counter[str]]:
    """The earliest trial of each network measured in a phase under a recipe and a seed, and how many others were left out."""
    first: dict[tuple[Any, ...], Run] = {}
    left_out: Counter[str] = Counter()
    # A trial that was itself given its measurement comes after all that were not, whatever its number.
    for run in sorted(finished, key=lambda run: ("reused_from" in run.data.tags, int(run.data.tags["trial"]))):
        tags = run.data.tags
        digests = (tags["digest"], tags.get("proxy_digest"), tags.get("recipe_digest"))
        key = (tags["phase"], *digests, json.loads(tags["circumstances"])["seed"])
        if key in first:
            left_out[tags["phase"]] += 1
        first.setdefault(key, run)
    return list(first.values()), left_out


def _frame(runs: Sequence[Run], circumstances: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for run, circumstance in zip(runs, circumstances, strict=True):
        tags, metrics = run.data.tags, run.data.metrics
        rows.append(
            {
                "label": tags["label"],
                "digest": tags["digest"],
                "proxy_digest": tags.get("proxy_digest"),
                "phase": tags["phase"],
                "trial": int(tags["trial"]),
                "family_step": float(tags["family_step"]) if "family_step" in tags else None,
                **{name: value for name, value in metrics.items() if not name.startswith(CURVE)},
                "params": json.dumps(run.data.params),
                "device": circumstance["device"],
                "seed": circumstance["seed"],
                "run_id": run.info.run_id,
            }
        )
    return pd.DataFrame(rows, columns=None if rows else pd.Index([*LEADING_COLUMNS, *TRAILING_COLUMNS]))


def _ranked(frame: pd.DataFrame, objectives: Mapping[str, Sequence[Metric]]) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    from results.pareto import mean_ranks, pareto_front, to_minimize

    order = [*objectives, *sorted(set(frame["phase"]) - set(objectives))]
    parts = []
    for phase in order:
        rows = frame.loc[frame["phase"] == phase].sort_values(by="trial", ignore_index=True)
        metrics = objectives.get(phase, ())
        if not len(rows):
            continue
        if metrics:
            values = rows.reindex(columns=[metric.name for metric in metrics]).to_numpy(dtype=float)
            costs = to_minimize(values, [metric.goal for metric in metrics])
            score = mean_ranks(costs)
            rows = rows.assign(rank=pd.Series(score).rank(method="min").astype(int), is_front=pareto_front(costs))
            rows = rows.iloc[np.argsort(score, kind="stable")]
        else:
            rows = rows.assign(rank=range(1, len(rows) + 1), is_front=False)
        parts.append(rows)
    ranked = pd.concat(parts, ignore_index=True) if parts else frame
    metrics = [name for name in ranked.columns if name not in (*LEADING_COLUMNS, *TRAILING_COLUMNS)]
    return ranked.reindex(columns=[*LEADING_COLUMNS, *metrics, *TRAILING_COLUMNS])


def agreement(results: StudyResults, phase: str) -> pd.DataFrame:
    """What the phase's expensive scores add: their rank agreement with the metrics that cost nothing."""
    from results.rank_quality import TRIVIAL_METRICS, agreement_table

    scores = [metric.name for metric in results.objectives.get(phase, ()) if metric.name not in TRIVIAL_METRICS]
    return agreement_table(results.phase(phase), scores)


def text_table(results: StudyResults, phase: str, top: int) -> str:
    """The best of a phase for a terminal of 120 columns."""
    rows = results.phase(phase)
    names = results.metric_names(phase)
    errors = {name for name in names if name.removesuffix("_stderr") != name and name.removesuffix("_stderr") in names}
    shown = rows.head(top)
    columns = [
        ("rank", [f"{rank}{'*' if is_front else ' '}" for rank, is_front in zip(shown["rank"], shown["is_front"], strict=True)]),
        ("digest", [digest[:SHORT_DIGEST] for digest in shown["digest"]]),
        ("trial", [str(number) for number in shown["trial"]]),
    ]
    label_width = min(max([len(label) for label in shown["label"]], default=5), 46)
    left = TABLE_WIDTH - label_width - sum(max(map(len, [title, *cells])) + 2 for title, cells in columns)
    num_hidden = 0
    for name in [name for name in names if name not in errors] + [name for name in ("elapsed_s",) if name in shown]:
        cells = [format_value(value) for value in shown[name]]
        if f"{name}_stderr" in errors:
            spread = [format_value(value, digits=2) for value in shown[f"{name}_stderr"]]
            cells = [f"{cell} ±{error}" for cell, error in zip(cells, spread, strict=True)]
        width = max(map(len, [name, *cells])) + 2
        if width > left:
            num_hidden += 1
            continue
        left -= width
        columns.append((name, cells))
    columns.insert(1, ("label", [_cut(label, label_width) for label in shown["label"]]))
    lines = []
    widths = [max(map(len, [title, *cells])) for title, cells in columns]
    for cells in [[title for title, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]:
        aligned = [
            cell.ljust(width) if title in ("label", "digest") else cell.rjust(width)
            for cell, width, (title, _) in zip(cells, widths, columns, strict=True)
        ]
        lines.append("  ".join(aligned).rstrip())
    notes, command = ["* on the Pareto front"], f"python -m results.leaderboard {results.provenance.study}"
    if len(rows) > top:
        notes.append(f"{_count(len(rows) - top, 'more row')}: {command} --top {len(rows)}")
    if num_hidden:
        notes.append(f"{_count(num_hidden, 'more column')}: {command} --csv FILE")
    return "\n".join([*lines, *textwrap.wrap("; ".join(notes), TABLE_WIDTH, break_on_hyphens=False)])


def agreement_text(table: pd.DataFrame) -> str:
    """The agreement table, a line per expensive score, at most 120 columns."""
    lines = []
    for score, rows in table.groupby("score", sort=False):
        lines.append(f"{score}, Kendall's tau-b [95 % bootstrap interval], n = {rows['n'].max()}:")
        lines += [f"    {row['baseline']:<32}{format_tau(row)}" for row in rows.to_dict("records")]
    return "\n".join(lines)


def format_tau(row: Mapping[Any, Any]) -> str:
    """tau with its interval; tau of a constant is undefined."""
    return f"{row['tau']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" if row["tau"] == row["tau"] else "constant"


def family_text(results: StudyResults, phase: str) -> str:
    """The networks a phase yields, in the order it found them; empty if it marked none."""
    rows = family(results.phase(phase))
    names = [name for name in (*COST_METRICS, *(metric.name for metric in results.objectives.get(phase, ()))) if name in rows]
    lines = []
    for row in rows.to_dict("records"):
        values = ", ".join(f"{name} {format_value(row[name])}" for name in names)
        scored = f" (scored: {str(row['proxy_digest'])[:SHORT_DIGEST]})" if row.get("proxy_digest") else ""
        lines.append(f"{int(row['family_step']):>3}  {_cut(row['label'], 60)}  {row['digest'][:SHORT_DIGEST]}{scored}\n     {values}")
    return "\n".join(lines)


def family(rows: pd.DataFrame) -> pd.DataFrame:
    """The marked networks among the rows, in their order."""
    return rows.dropna(subset="family_step").sort_values("family_step") if "family_step" in rows else rows.head(0)


def format_value(value: Any, digits: int = 4) -> str:
    """A number to so many significant digits, `-` for a missing one."""
    if value is None or value != value:
        return "-"
    if float(value).is_integer() and abs(value) < 10**6:
        return str(int(value))
    return f"{value:.{digits}g}"


def attach_leaderboard(tracker: MlflowTracker) -> StudyResults:
    """Give the tracker's parent run the leaderboard as CSV, HTML and PNG, and a description that shows its head."""
    from results.plots import write_png

    results = load_results(tracker.uri, tracker.study)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"leaderboard.{kind}" for kind in ("csv", "html", "png")]
        write_csv(results, files[0])
        write_html(results, files[1])
        write_png(results, files[2])
        if results.effects:
            from results.study_effects import write_files

            try:
                write_files(results.effects, Path(folder))
            except Exception as error:  # whatever is wrong with the effects, the measurements stand
                results = replace(results, effects_failure=_effects_failure(error))
        tracker.attach(description=markdown(results), files=sorted(Path(folder).iterdir()))
    return results


def markdown(results: StudyResults, top: int = 5) -> str:
    """A short description of the study with the head of each phase's leaderboard."""
    blocks = [f"## {results.provenance.study}"]
    for phase in results.phases:
        names = [metric.name for metric in results.objectives.get(phase, ())]
        rows = results.phase(phase)
        names += [name for name in COST_METRICS if name in rows and name not in names]
        lines = [f"| rank | label | digest | {' | '.join(names)} |", "|---:|---|---|" + "---:|" * len(names)]
        for row in rows.head(top).to_dict("records"):
            label = str(row["label"]).replace("|", "\\|")
            cells = [f"{row['rank']}{'*' if row['is_front'] else ''}", label, f"`{row['digest'][:SHORT_DIGEST]}`"]
            lines.append(f"| {' | '.join([*cells, *(format_value(row[name]) for name in names)])} |")
        blocks += [f"### {phase}", results.summary(phase) + " (* on the Pareto front)", "\n".join(lines)]
    for effects in results.effects:
        blocks += [f"### effects: {effects.phase}", effects.registration + ".", effects.markdown]
    if results.effects_failure:
        blocks.append(results.effects_failure)
    provenance = [f"- {title}: {text}" for title, text in results.provenance.lines() if title not in ("study", "store")]
    return "\n\n".join([*blocks, "\n".join(provenance), "The whole table: `leaderboard.csv`, `leaderboard.html` among the artifacts."])


def write_csv(results: StudyResults, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    results.frame.to_csv(path, index=False)


def write_html(results: StudyResults, path: Path) -> None:
    """One page that needs nothing else."""
    from results.page import render

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(results))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m results.leaderboard", description="Show what a study has measured, best first.")
    parser.add_argument("study", metavar="STUDY", help="the study's name, as given to search/run.py")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="rows to print per phase (default: 20)")
    parser.add_argument("--phase", metavar="P", help="only this phase")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all rows and columns as CSV")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page: figures, sortable table, provenance")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the figure of scores and MACs")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="runs directory (default: $VITSCALE_RUNS, else ./runs)")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow store or server (default: sqlite in the runs directory)")
    options = parser.parse_args(arguments)
    if options.top < 1:
        parser.error(f"--top is {options.top}; at least 1 is expected")
    uri = options.tracking_uri or RunPaths(options.runs or default_runs(os.environ)).mlflow_uri
    try:
        results = load_results(uri, options.study)
        if options.phase is not None:
            results = _only_phase(results, options.phase)
        print_results(results, options.top)
        for path, write in ((options.csv, write_csv), (options.html, write_html), (options.png, _write_png)):
            if path is not None:
                write(results, path)
                print(f"written: {path}")
    except (LeaderboardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def print_results(results: StudyResults, top: int) -> None:
    """Print the head of every phase's table, the family it grew, what the expensive scores add, and the effects of its design."""
    if not results.phases:
        num_failed = sum(sum(kinds.values()) for kinds in results.num_failed.values())
        print(f"study {results.provenance.study!r} has no finished trial yet ({num_failed} failed)")
    for phase in results.phases:
        print(textwrap.fill(f"{results.provenance.study}/{phase}: {results.summary(phase)}", TABLE_WIDTH) + "\n")
        print(text_table(results, phase, top) + "\n")
        if text := family_text(results, phase):
            print(f"the family, in the order it grew:\n{text}\n")
        if text := agreement_text(agreement(results, phase)):
            print(f"what the expensive scores add over what costs nothing:\n{text}\n")
    for effects in results.effects:
        print(effects.text)
    if results.effects_failure:
        print(results.effects_failure)


def _write_png(results: StudyResults, path: Path) -> None:
    from results.plots import write_png

    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(results, path)


def _only_phase(results: StudyResults, phase: str) -> StudyResults:
    if phase not in results.phases:
        raise LeaderboardError(f"no measurement in a phase {phase!r}; phases: {', '.join(results.phases) or 'none'}")
    frame = results.frame[results.frame["phase"] == phase].reset_index(drop=True)
    effects = tuple(one for one in results.effects if one.phase == phase)
    return replace(results, frame=frame, objectives={phase: results.objectives.get(phase, ())}, effects=effects)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _date(time_ms: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")


if __name__ == "__main__":
    sys.exit(main())

"""One table of a study: every finished trial with its measurement, its rank and whether it is on the Pareto front.

Ranks are within a phase. The networks on the Pareto front of its objectives come first, then the others; in each part the mean,
over the objectives, of a network's rank in each decides (ties share). A phase with a design compares levels over seeds
(`results/effects`), so its trials, which are single seeds, have no rank. One measurement counts once: trials that were given the
measurement of an earlier one are left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from results.formats import count
from results.mlflow_store import CURVE, DESIGNS_TAG, StudyRuns, UnreadableStudy, read_study
from results.pareto import front_first_ranks, pareto_front, to_minimize
from results.rank_quality import TRIVIAL_METRICS, agreement_table
from results.records import COST_METRICS, Metric, stderr_name

if TYPE_CHECKING:
    import pandas as pd

    from results.mlflow_store import Run

LEADING_COLUMNS = ("rank", "is_front", "family_step", "label", "digest", "proxy_digest", "phase", "trial")
TRAILING_COLUMNS = ("elapsed_s", "params", "device", "seed", "run_id")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the numbers come from."""

    study_name: str
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
            ("study", self.study_name),
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
    ran; `designed` are the phases whose trials have no rank. `num_failed` counts failures by phase and kind, `num_reused` the trials
    given an earlier measurement.
    """

    frame: pd.DataFrame
    objectives: Mapping[str, tuple[Metric, ...]]
    designed: frozenset[str]
    num_failed: Mapping[str, Mapping[str, int]]
    num_reused: Mapping[str, int]
    provenance: Provenance

    @property
    def phases(self) -> list[str]:
        """The phases with at least one measurement, in the order they ran."""
        found = set(self.frame["phase"])
        return [phase for phase in self.objectives if phase in found] + sorted(found - set(self.objectives))

    def phase(self, name: str) -> pd.DataFrame:
        """The rows of a phase by rank, without its empty columns; "rank" is there and empty in a phase with a design."""
        rows = self.frame.loc[self.frame["phase"] == name]
        return rows.loc[:, rows.notna().any() | (rows.columns == "rank")]

    def metric_names(self, phase: str) -> list[str]:
        """The metrics of a phase: objectives, each with its standard error, then costs of the network, then the rest."""
        known = [name for name in self.phase(phase).columns if name not in (*LEADING_COLUMNS, *TRAILING_COLUMNS)]
        first = [metric.name for metric in self.objectives.get(phase, ())]
        first = list(dict.fromkeys([*(name for metric in first for name in (metric, stderr_name(metric))), *COST_METRICS]))
        return [name for name in first if name in known] + [name for name in known if name not in first]

    def first(self, phase: str) -> dict[str, Any]:
        """Of the network that ranks first in the phase: its label and digest, its objectives and costs. All values are of this one."""
        row = self.phase(phase).iloc[0]
        names = ["label", "digest", *(metric.name for metric in self.objectives.get(phase, ())), *COST_METRICS]
        return {name: row[name] for name in names if name in row}

    def only(self, phase: str) -> StudyResults:
        """The results of one phase; raises UnreadableStudy for a phase without any."""
        if phase not in self.phases:
            raise UnreadableStudy(f"no measurement in a phase {phase!r}; phases: {', '.join(self.phases) or 'none'}")
        frame = self.frame[self.frame["phase"] == phase].reset_index(drop=True)
        return replace(self, frame=frame, objectives={phase: self.objectives.get(phase, ())})

    def rank_rule(self, phase: str) -> str:
        """How the networks of a phase are ranked, in a sentence."""
        if phase in self.designed:
            return "Its trials are single seeds and have no rank; levels are ranked by their means over seeds."
        objectives = [f"{metric.name} ({metric.goal})" for metric in self.objectives.get(phase, ())]
        if not objectives:
            return "It has no objective, so trials are ranked in their order."
        if len(objectives) == 1:
            return f"Networks are ranked by {objectives[0]}."
        each = f"{', '.join(objectives[:-1])} and {objectives[-1]}"
        return f"Networks on the Pareto front rank first, then the others; within each part the mean of the ranks in {each} decides."

    def summary(self, phase: str) -> str:
        """What the phase has measured and how it is ranked, in two sentences."""
        rows = self.phase(phase)
        failed = self.num_failed.get(phase, {})
        parts = [f"{len(rows)} measured"]
        if len(self.objectives.get(phase, ())) > 1 and phase not in self.designed:
            parts.append(f"{sum(rows['is_front'])} on the Pareto front")
        if reused := self.num_reused.get(phase, 0):
            parts.append(f"{count(reused, 'repeat')} left out")
        if failed:
            parts.append(f"{sum(failed.values())} failed ({', '.join(f'{count} {kind}' for kind, count in failed.items())})")
        return f"{'; '.join(parts)}. {self.rank_rule(phase)}"


def load(uri: str, study_name: str) -> pd.DataFrame:
    """All finished trials of the study, ranked; raises UnreadableStudy if the store or the study does not exist."""
    return results_of(read_study(uri, study_name)).frame


def results_of(runs: StudyRuns) -> StudyResults:
    """The ranked measurements of a study's runs; it may have none."""
    objectives: dict[str, tuple[Metric, ...]] = {}
    for parent in runs.parents:
        for phase, metrics in json.loads(parent.data.tags.get("objectives", "{}")).items():
            objectives[phase] = tuple(Metric(**metric) for metric in metrics)
    failed: dict[str, Counter[str]] = {}
    for run in runs.trials:
        if run.info.status == "FAILED":
            tags = run.data.tags
            failed.setdefault(tags["phase"], Counter())[tags.get("failure_kind", "error")] += 1
    finished = [run for run in runs.trials if run.info.status == "FINISHED"]
    kept, reused = _first_measurements(finished)
    circumstances = [json.loads(run.data.tags["circumstances"]) for run in kept]
    designed = frozenset(phase for parent in runs.parents for phase in parent.data.tags.get(DESIGNS_TAG, "").split(", ") if phase)
    frame = _ranked(_frame(kept, circumstances), objectives, designed)
    times = sorted(run.info.end_time or run.info.start_time for run in finished)
    return StudyResults(
        frame=frame,
        objectives=objectives,
        designed=designed,
        num_failed=failed,
        num_reused=reused,
        provenance=Provenance(
            study_name=runs.study_name,
            tracking_uri=runs.uri,
            commands=tuple(dict.fromkeys(parent.data.tags["command"] for parent in runs.parents if parent.data.tags.get("command"))),
            first=_date(times[0]) if times else "",
            last=_date(times[-1]) if times else "",
            versions={name: version for found in circumstances for name, version in found["versions"].items()},
            devices=tuple(sorted({found["device"] for found in circumstances})),
            seeds=tuple(sorted({found["seed"] for found in circumstances})),
        ),
    )


def _first_measurements(finished: Sequence[Run]) -> tuple[list[Run], Counter[str]]:
    """The first trial of each (phase, network, recipe, settings of its own, seed), and how many repeats each phase has."""
    first: dict[tuple[Any, ...], Run] = {}
    left_out: Counter[str] = Counter()
    # A trial that reused a measurement is never the first, even if its number is lower.
    for run in sorted(finished, key=lambda run: ("reused_from" in run.data.tags, int(run.data.tags["trial"]))):
        tags = run.data.tags
        digests = (tags["digest"], *(tags.get(name) for name in ("proxy_digest", "recipe_digest", "settings_digest", "weights_digest")))
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


def _ranked(frame: pd.DataFrame, objectives: Mapping[str, Sequence[Metric]], designed: Collection[str]) -> pd.DataFrame:
    import pandas as pd

    order = [*objectives, *sorted(set(frame["phase"]) - set(objectives))]
    parts = []
    for phase in order:
        rows = frame.loc[frame["phase"] == phase].sort_values(by="trial", ignore_index=True)
        metrics = objectives.get(phase, ())
        if not len(rows):
            continue
        if phase in designed:
            rows = rows.assign(rank=pd.Series([None] * len(rows), dtype=object), is_front=False)
        elif metrics:
            values = rows.reindex(columns=[metric.name for metric in metrics]).to_numpy(dtype=float)
            costs = to_minimize(values, [metric.goal for metric in metrics])
            rows = rows.assign(rank=front_first_ranks(costs), is_front=pareto_front(costs)).sort_values(by="rank", kind="stable")
        else:
            rows = rows.assign(rank=range(1, len(rows) + 1), is_front=False)
        parts.append(rows)
    ranked = pd.concat(parts, ignore_index=True) if parts else frame
    metrics = [name for name in ranked.columns if name not in (*LEADING_COLUMNS, *TRAILING_COLUMNS)]
    return ranked.reindex(columns=[*LEADING_COLUMNS, *metrics, *TRAILING_COLUMNS])


def agreement(results: StudyResults, phase: str) -> pd.DataFrame:
    """Rank agreement of the phase's expensive scores with metrics that cost nothing: a low one means that a score adds something.

    A phase with a design, whose trials are seeds of few networks, has none.
    """
    objectives = () if phase in results.designed else results.objectives.get(phase, ())
    scores = [metric.name for metric in objectives if metric.name not in TRIVIAL_METRICS]
    return agreement_table(results.phase(phase), scores)


def family(rows: pd.DataFrame) -> pd.DataFrame:
    """The marked networks among the rows, in their order."""
    return rows.dropna(subset="family_step").sort_values("family_step") if "family_step" in rows else rows.head(0)


def _date(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")

"""How fast are networks where they run, and does the number of multiply-adds tell it?

Parameters of the question: `rows`, `[{"label": ..., "name": ..., "setting": ...}]` in the order of the list: the label of a trial, the
network's name, and how it was run.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from results.answers import Answer
from results.columns import TEXT_WIDTH, Column, fitted
from results.formats import MIN_NETWORKS, TIMING_MARKS, count, format_value, timing_marks
from results.score_quality import EQUAL_SIZE, Estimate, equal_size_pairs, judge

if TYPE_CHECKING:
    import pandas as pd

    from results.study_results import StudyResults

COUNTS = {"gmacs": "MACs", "params_m": "parameters"}
TIMES = {"latency_to_anchor": "ratio to the anchor", "latency_ms": "milliseconds"}
SHOWN = (
    "latency_ms",
    "latency_to_anchor",
    "gmacs",
    "latency_p90_ms",
    "latency_p99_ms",
    "best_throughput_img_s",
    "best_batch_size",
    "memory_mb",
    "params_m",
    "energy_mj_img",
)
TITLES = {
    "latency_ms": "ms",
    "latency_to_anchor": "to anchor",
    "latency_p90_ms": "p90",
    "latency_p99_ms": "p99",
    "best_throughput_img_s": "best img/s",
    "best_batch_size": "at batch",
    "memory_mb": "MB",
    "energy_mj_img": "mJ/img",
}
LEAST_NAME_WIDTH = 24


def answer(results: StudyResults, parameters: Mapping[str, Any]) -> Answer:
    """The networks measured so far, fastest first under each setting; raises ValueError if there are none."""
    frame = _measured(results, parameters)
    agreements = _agreements(frame)
    return Answer(
        title=f"Speed of {count(len(set(frame['name'])), 'network')}",
        text=_text(frame, agreements, len(parameters["rows"])),
        table=frame,
        summary={
            "rows": [_plain(row) for row in frame.to_dict("records")],
            "agreement": [{name: _number(value) for name, value in row.items()} for row in agreements],
        },
    )


def _measured(results: StudyResults, parameters: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each measurement: name and setting, then its metrics; settings in the order of the list, the fastest first in each."""
    import pandas as pd

    if not results.phases:
        raise ValueError("no network is measured so far")
    (phase,) = results.phases
    asked = pd.DataFrame(parameters["rows"])
    order = list(dict.fromkeys(asked["setting"]))
    asked["order"] = [order.index(setting) for setting in asked["setting"]]
    columns = ["label", "digest", *results.metric_names(phase), "device"]
    frame = asked.merge(results.phase(phase)[columns], on="label").sort_values(["order", "latency_to_anchor"], kind="stable")
    return frame.drop(columns=["label", "order"]).reset_index(drop=True)


def _agreements(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """For each setting with enough networks, each count and each time: tau over all pairs and over those of equal MACs."""
    rows = []
    for setting, networks in frame.groupby("setting", sort=False):
        if len(networks) < MIN_NETWORKS:
            continue
        for time in TIMES:
            verdict = judge(networks, target=time, scores=list(COUNTS), trivial=list(COUNTS), params="gmacs", macs="params_m")
            pairs = equal_size_pairs(networks["gmacs"].to_numpy(float))
            times = networks[time].to_numpy(float)
            factors = np.exp(np.abs(np.log(times[:, None] / times[None, :])))[np.triu(pairs)]
            for quality in verdict.qualities:
                rows.append(
                    {
                        "setting": setting,
                        "count": quality.score,
                        "time": time,
                        "n": quality.num_networks,
                        **_interval("tau", quality.tau),
                        **_interval("tau_equal_macs", quality.tau_equal_size),
                        "num_equal_pairs": verdict.num_equal_pairs,
                        "median_factor": float(np.median(factors)) if len(factors) else math.nan,
                        "largest_factor": float(factors.max()) if len(factors) else math.nan,
                    }
                )
    return rows


def _interval(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _text(frame: pd.DataFrame, agreements: list[dict[str, Any]], num_asked: int) -> str:
    blocks = [f"{setting}\n{_table(rows)}" for setting, rows in frame.groupby("setting", sort=False)]
    notes = [TIMING_MARKS] if any(timing_marks(row) for row in frame.to_dict("records")) else []
    if len(frame) < num_asked:
        notes.append(f"{num_asked - len(frame)} of {num_asked} have no measurement (yet): what failed is in MLflow, with its reason.")
    blocks += ["\n".join(notes)] if notes else []
    blocks += [_agreement_text([row for row in agreements if row["setting"] == setting]) for setting in _settings(agreements)]
    if not agreements:
        blocks.append(f"Whether MACs tell latency is asked of {MIN_NETWORKS} networks or more under one setting.")
    return "\n\n".join(blocks)


def _settings(agreements: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["setting"] for row in agreements))


def _table(rows: pd.DataFrame) -> str:
    shown = rows.loc[:, rows.notna().any()].to_dict("records")
    columns = [Column("network", [str(row["name"]) for row in shown], is_text=True, at_most=LEAST_NAME_WIDTH)]
    columns.append(Column("", [timing_marks(row) for row in shown], is_text=True))
    for name in SHOWN:
        if shown and name in shown[0]:
            columns.append(Column(TITLES.get(name, name), [_short(row[name]) for row in shown]))
    lines, left_out = fitted([column for column in columns if column.title or any(column.cells)], TEXT_WIDTH)
    notes = [textwrap.fill(f"left out for {TEXT_WIDTH} columns: {', '.join(left_out)}", TEXT_WIDTH)] if left_out else []
    return "\n".join([*lines, *notes])


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else format_value(value, digits=3)


def _agreement_text(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    lines = [
        f"Kendall's tau-b with latency, {first['n']} networks, {first['setting']}:",
        f"{'':<12}{'latency as':<22}{'all pairs':<22}at equal MACs",
    ]
    for row in rows:
        cells = f"{_shown(row, 'tau'):<22}{_shown(row, 'tau_equal_macs')}"
        lines.append(f"{COUNTS[row['count']]:<12}{TIMES[row['time']]:<22}{cells}".rstrip())
    words = f"95 % bootstrap intervals over networks. Equal MACs: they differ by at most {EQUAL_SIZE:.0%} of the larger."
    if first["num_equal_pairs"]:
        ratio = next(row for row in rows if row["time"] == "latency_to_anchor")
        words += (
            f" Of the {count(first['num_equal_pairs'], 'pair')} with equal MACs the slower takes {ratio['median_factor']:.2f} times as "
            f"long in the median, {ratio['largest_factor']:.1f} times at most."
        )
    else:
        words += " No two of these networks have equal MACs."
    return "\n".join([*lines, textwrap.fill(words, TEXT_WIDTH)])


def _shown(row: Mapping[str, Any], name: str) -> str:
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]" if math.isfinite(value) else "-"


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): _number(value) for name, value in row.items() if value == value}


def _number(value: Any) -> Any:
    """A number as JSON has it: None for one that is not finite."""
    return value if not isinstance(value, float) or math.isfinite(value) else None

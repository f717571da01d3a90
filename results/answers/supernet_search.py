"""How far can a supernet be trusted, and does the search find more than size?

Parameters of the question: `trust`, the phase that trained subnets alone, and `alone`, the metric of their accuracy; `scores`,
`{phase: [metrics]}`, what else was measured on the same subnets, and `inherited`, the metric among them that is their accuracy with the
weights of the supernet; `retrain`, the phase that trained the networks of the comparison, and `levels`, their names.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from results.answers import Answer
from results.columns import TEXT_WIDTH, Column, fitted
from results.formats import MIN_NETWORKS, count, format_mean, format_value
from results.rank_quality import RankAgreement, partial_rank_agreement, rank_agreement, resampled_taus
from results.score_quality import Estimate, estimate

if TYPE_CHECKING:
    import pandas as pd

    from results.study_results import StudyResults

MACS, PARAMS = "gmacs", "params_m"
NUM_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Trust:
    """How well each predictor ranks the subnets of `frame` by their accuracy alone, given nothing and given MACs.

    `gain` is the tau of inherited accuracy minus that of MACs, over the same draws of subnets.
    """

    frame: pd.DataFrame
    tau: Mapping[str, RankAgreement]
    partial: Mapping[str, RankAgreement]
    gain: Estimate


def answer(results: StudyResults, parameters: Mapping[str, Any]) -> Answer:
    """The trust table first, then the networks that were compared; raises ValueError if there is neither yet."""
    trust = _trust(results, parameters)
    compared = _compared(results, parameters)
    if trust is None and not len(compared):
        raise ValueError("no network of the comparison is trained yet")
    blocks = [_trust_in_words(trust, parameters), _comparison_in_words(compared)]
    table = trust.frame if trust is not None else compared
    return Answer(
        title="Does searching a supernet find more than size?",
        text="\n\n".join(block for block in blocks if block),
        table=table,
        summary={"trust": _trust_summary(trust), "networks": _records(compared)},
    )


def _trust(results: StudyResults, parameters: Mapping[str, Any]) -> Trust | None:
    """None if fewer subnets were trained than an interval takes."""
    inherited, alone = parameters["inherited"], parameters["alone"]
    if parameters["trust"] not in results.phases:
        return None
    frame = results.phase(parameters["trust"])
    frame = frame.loc[~frame["digest"].duplicated(), ["label", "digest", alone, MACS, PARAMS]]
    goals = {metric.name: metric.goal for metrics in results.objectives.values() for metric in metrics}
    predictors = {MACS: 1.0, PARAMS: 1.0}
    for phase, metrics in parameters["scores"].items():
        if phase in results.phases:
            rows = results.phase(phase).drop_duplicates("digest").set_index("digest")
            for metric in metrics:
                found = dict(zip(rows.index, rows[metric].to_numpy(float), strict=True))
                frame = frame.assign(**{metric: [found.get(digest, math.nan) for digest in frame["digest"]]})
                predictors[metric] = -1.0 if goals.get(metric) == "minimize" else 1.0
    if inherited not in frame or len(frame.dropna(subset=[alone, inherited])) < MIN_NETWORKS:
        return None
    predictors = {inherited: predictors.pop(inherited), **predictors}
    tau, partial = {}, {}
    for name, sign in predictors.items():
        rows = frame.dropna(subset=[name, alone])
        score, accuracy, macs = sign * rows[name].to_numpy(float), rows[alone].to_numpy(float), rows[MACS].to_numpy(float)
        tau[name] = rank_agreement(score, accuracy, seed=0)
        # Given MACs, MACs themselves have nothing left to say.
        if name != MACS:
            partial[name] = partial_rank_agreement(score, accuracy, macs, seed=0)
    return Trust(frame=frame, tau=tau, partial=partial, gain=_gain(frame.dropna(subset=[alone, inherited]), inherited, alone))


def _gain(rows: pd.DataFrame, inherited: str, alone: str) -> Estimate:
    n = len(rows)
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES)
    # The first draw takes every subnet once: it gives the value, the others its interval.
    draws = np.concatenate([np.ones((1, n), dtype=draws.dtype), draws])
    accuracy = rows[alone].to_numpy(float)
    one, other = (resampled_taus(rows[name].to_numpy(float), accuracy, draws) for name in (inherited, MACS))
    return estimate(one - other)


def _trust_in_words(trust: Trust | None, parameters: Mapping[str, Any]) -> str:
    if trust is None:
        return textwrap.fill(
            "How far the supernet can be trusted is not measured: --trust N trains N subnets alone and compares.", TEXT_WIDTH
        )
    alone = parameters["alone"]
    names = list(trust.tau)
    lines, _ = fitted(
        [
            Column("ranks subnets by", names, is_text=True),
            Column("tau", [_interval(trust.tau[name]) for name in names]),
            Column("given MACs", [_interval(trust.partial[name]) if name in trust.partial else "-" for name in names]),
            Column("n", [str(trust.tau[name].num_points) for name in names]),
        ],
        TEXT_WIDTH,
    )
    n = trust.tau[parameters["inherited"]].num_points
    low, high = (trust.frame[MACS].min(), trust.frame[MACS].max())
    notes = [
        f"Kendall's tau-b with {alone} of {count(n, 'subnet')} trained alone, {low:.3g} to {high:.3g} GMAC, and partial tau given MACs; "
        "95 % bootstrap intervals over subnets. Scores are turned so that more is better.",
        _verdict(trust, parameters),
    ]
    return "\n".join(["How far the supernet can be trusted:", *lines, "", *(textwrap.fill(note, TEXT_WIDTH) for note in notes)])


def _verdict(trust: Trust, parameters: Mapping[str, Any]) -> str:
    """In words what the intervals say; an interval that holds 0 says nothing either way."""
    given = trust.partial[parameters["inherited"]]
    beyond = "tell subnets of equal MACs apart" if given.low > 0 else "are not shown to tell subnets of equal MACs apart"
    found = trust.gain
    if found.low > 0:
        compared = "They rank better than MACs alone"
    elif found.high < 0:
        compared = "MACs alone rank better than they do"
    else:
        compared = "Neither they nor MACs alone are shown to rank better"
    return f"Inherited weights {beyond}. {compared}: tau {found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}] more."


def _interval(found: RankAgreement) -> str:
    if math.isnan(found.tau):
        return "-"
    return f"{found.tau:+.2f}" + ("" if math.isnan(found.low) else f" [{found.low:+.2f}, {found.high:+.2f}]")


def _compared(results: StudyResults, parameters: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each network of the comparison: its level, costs, seeds, and test accuracy as mean and standard deviation over seeds."""
    import pandas as pd

    rows = results.phase(parameters["retrain"]) if parameters["retrain"] in results.phases else results.frame.head(0)
    rows = rows.assign(network=[json.loads(params)["network"] for params in rows["params"]])
    made = []
    for level in parameters["levels"]:
        own = rows.loc[rows["network"] == level]
        if len(own):
            accuracy = own["test_top1_pct"].to_numpy(float)
            made.append(
                {
                    "network": level,
                    "test_top1_pct": float(accuracy.mean()),
                    "sd": float(accuracy.std(ddof=1)) if len(own) > 1 else math.nan,
                    "num_seeds": len(own),
                    **{name: float(own[name].iloc[0]) for name in (MACS, PARAMS)},
                }
            )
    return pd.DataFrame(made)


def _comparison_in_words(compared: pd.DataFrame) -> str:
    if not len(compared):
        return ""
    cells: dict[str, Sequence[Any]] = {name: list(compared[name]) for name in compared.columns}
    lines, _ = fitted(
        [
            Column("network", cells["network"], is_text=True),
            Column("test top-1, %", [format_mean(mean, sd, "%") for mean, sd in zip(cells["test_top1_pct"], cells["sd"], strict=True)]),
            Column("seeds", list(map(str, cells["num_seeds"]))),
            Column("GMAC", [format_value(value) for value in cells[MACS]]),
            Column("million parameters", [format_value(value) for value in cells[PARAMS]]),
        ],
        TEXT_WIDTH,
    )
    return "\n".join(["Searched, hand-made and random networks, trained alike (mean ± SD over seeds):", *lines])


def _records(compared: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as JSON, None for a standard deviation of one seed."""
    return [{str(name): value if value == value else None for name, value in row.items()} for row in compared.to_dict("records")]


def _trust_summary(trust: Trust | None) -> dict[str, Any] | None:
    if trust is None:
        return None

    def numbers(found: RankAgreement) -> dict[str, float | None]:
        return {name: value if math.isfinite(value := getattr(found, name)) else None for name in ("tau", "low", "high")}

    return {
        name: {"all": numbers(found), "given_macs": numbers(trust.partial[name]) if name in trust.partial else None}
        for name, found in trust.tau.items()
    }

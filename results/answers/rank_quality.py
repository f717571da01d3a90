"""Do scores of untrained networks rank a table of trained ones, and better than counting parameters?

Parameters of the question: `target` (the name of what was measured), `networks` (`[{"digest": ..., "target": ...}]`), and `scores`,
`{score: metric}` by the name that a user typed, in the order of the answer.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from results.answers import Answer
from results.figures import score_quality as figure
from results.formats import count
from results.records import COST_METRICS
from results.score_quality import EQUAL_SIZE, Estimate, ScoreQuality, Verdict, judge

if TYPE_CHECKING:
    import pandas as pd

    from results.study_results import StudyResults

TRIVIAL = (*COST_METRICS, "width", "kernel_product", "closed_form")
WIDTH = 80
SHOWN_REGRET = 5
SUMMARY = ("tau", "low", "high", "tau_equal_size", "partial_tau", "regret_at_5", "seconds_per_network")


def answer(results: StudyResults, parameters: Mapping[str, Any]) -> Answer:
    """Judge the scores on the networks that have them so far; raises ValueError for fewer than 10."""
    target, scores = parameters["target"], parameters["scores"]
    frame = _networks(results, parameters)
    found = {name: metric for name, metric in scores.items() if metric in frame}
    absent = [name for name in scores if name not in found]
    named = frame.rename(columns={metric: name for name, metric in found.items() if name != metric})
    sizes = {metric: name for name, metric in found.items()}
    verdict = judge(
        named,
        target=target,
        scores=list(found),
        trivial=[name for name, metric in found.items() if metric in TRIVIAL],
        params=sizes.get("params_m", "params_m"),
        macs=sizes.get("gmacs", "gmacs"),
    )
    costs = {name: _cost(results, metric) for name, metric in found.items()}
    table = _table(verdict, costs)
    return Answer(
        title=f"How well scores rank {verdict.num_networks} trained networks by {target}",
        text=_text(verdict, costs, absent),
        table=table,
        summary=_summary(verdict, costs) | {name: dict.fromkeys(SUMMARY) for name in absent},
        figure=figure.page_figure(verdict),
        legend=tuple(("circle", colour, title) for title, _, colour in figure.SERIES),
        draw=partial(figure.write_png, verdict),
    )


def _networks(results: StudyResults, parameters: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each network of the table: its target, and each of its metrics turned so that higher promises more."""
    import pandas as pd

    goals = {metric.name: metric.goal for metrics in results.objectives.values() for metric in metrics}
    frame = pd.DataFrame(parameters["networks"]).rename(columns={"target": parameters["target"]})
    for phase in results.phases:
        rows = results.phase(phase).drop_duplicates("digest").set_index("digest")
        for metric in results.metric_names(phase):
            if metric not in frame:
                sign = -1.0 if goals.get(metric) == "minimize" and metric not in TRIVIAL else 1.0
                values = dict(zip(rows.index, sign * rows[metric].to_numpy(float), strict=True))
                frame[metric] = [values.get(digest, math.nan) for digest in frame["digest"]]
    return frame


def _cost(results: StudyResults, metric: str) -> tuple[float, int]:
    """Mean seconds that the evaluator of a metric takes for a network, and how many networks it failed on."""
    for phase in results.phases:
        if metric in results.metric_names(phase):
            return float(results.phase(phase)["elapsed_s"].to_numpy(float).mean()), sum(results.num_failed.get(phase, {}).values())
    return math.nan, 0


def _table(verdict: Verdict, costs: Mapping[str, tuple[float, int]]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for one in verdict.qualities:
        seconds, failed = costs[one.score]
        row: dict[str, Any] = {"score": one.score, "is_trivial": one.is_trivial, "n": one.num_networks}
        numbers = {"tau": one.tau, "tau_equal_size": one.tau_equal_size, "partial_tau": one.partial_tau}
        numbers |= {f"regret_at_{k}": found for k, found in one.regret.items()} | ({"gain": one.gain} if one.gain else {})
        for name, found in numbers.items():
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(row | {"beats_baselines": one.beats_baselines, "seconds_per_network": seconds, "failed": failed})
    return pd.DataFrame(rows)


def _summary(verdict: Verdict, costs: Mapping[str, tuple[float, int]]) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        one.score: {
            "tau": number(one.tau.value),
            "low": number(one.tau.low),
            "high": number(one.tau.high),
            "tau_equal_size": number(one.tau_equal_size.value),
            "partial_tau": number(one.partial_tau.value),
            "regret_at_5": number(one.regret[5].value),
            "seconds_per_network": number(costs[one.score][0]),
        }
        for one in verdict.qualities
    }


def _text(verdict: Verdict, costs: Mapping[str, tuple[float, int]], absent: Sequence[str]) -> str:
    share = f"{EQUAL_SIZE:.0%}"
    lines = [
        f"{'':<16}{'all pairs':^18}{'at equal size':^18}{'given size':^18}{'regret':>10}",
        f"{'score':<16}{'tau':^18}{'tau':^18}{'partial tau':^18}{f'best of {SHOWN_REGRET}':>10}",
    ]
    for one in sorted(verdict.qualities, key=_by_equal_size):
        cells = "".join(f"{_shown(found):^18}" for found in (one.tau, one.tau_equal_size, one.partial_tau))
        regret = one.regret[SHOWN_REGRET].value
        lines.append(f"{_shown_name(one):<16}{cells}{'-' if math.isnan(regret) else f'{regret:.2f}':>10}")
    notes = [
        "(t) costs nothing to know. Kendall's tau-b, 95 % bootstrap interval over networks. "
        f"At equal size: the {verdict.num_equal_pairs:,} pairs whose parameters differ by at most {share}. Given size: parameters and MACs "
        f"held fixed. Regret: how far the best of the {SHOWN_REGRET} best-scored lies below the best network, in {verdict.target}.",
        *_subset_in_words(verdict),
        *_verdict_in_words(verdict),
        *_costs_in_words(costs),
        *([f"No network has {', '.join(absent)}: what failed is in MLflow, with its reason."] if absent else []),
    ]
    return "\n".join([*lines, "", *(textwrap.fill(note, WIDTH) for note in notes)])


def _by_equal_size(one: ScoreQuality) -> float:
    value = one.tau_equal_size.value
    return -value if math.isfinite(value) else math.inf


def _shown_name(one: ScoreQuality) -> str:
    return f"{one.score[:12]} (t)" if one.is_trivial else one.score[:15]


def _shown(found: Estimate) -> str:
    if not found.is_defined:
        return "-"
    return f"{_short(found.value)} [{_short(found.low)},{_short(found.high)}]"


def _short(value: float) -> str:
    """`+.60`, and `+1.0`: never more than four characters."""
    return f"{value:+.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:+.1f}"


def _subset_in_words(verdict: Verdict) -> list[str]:
    if verdict.num_compared == verdict.num_networks:
        return []
    pairs = f"Pairs are those of {verdict.num_compared:,} networks drawn at random"
    return [f"{pairs}; regret is over all {verdict.num_networks:,}, its interval not."]


def _verdict_in_words(verdict: Verdict) -> list[str]:
    judged = [one for one in verdict.qualities if not one.is_trivial]
    if not verdict.best_baseline:
        return ["No trivial baseline was scored: name some in --scores (params, macs, depth, width) to compare with."]
    baseline = next(one for one in verdict.qualities if one.score == verdict.best_baseline)
    best = f"{baseline.score}, {_shown(baseline.tau_equal_size)}"
    words = [f"At equal size the best of what costs nothing is {best}, chosen on these very networks."]
    if verdict.beating:
        gains = [f"{one.score} by {_shown(one.gain)}" for one in judged if one.beats_baselines and one.gain]
        words.append(f"Better than that, after Bonferroni's correction for {count(len(judged), 'score')}: {', '.join(gains)}.")
    elif judged:
        words.append(f"{judged[0].score} does not beat it." if len(judged) == 1 else f"None of the {len(judged)} scores beats it.")
    if (found := verdict.combination) is not None:
        decided = found.gain.low > 0 or found.gain.high < 0
        words.append(
            f"A ridge regression on the ranks of {count(len(found.scores), 'score')} reaches {_shown(found.tau)} on networks held out by "
            f"nested cross-validation, the best single score {_shown(found.single_tau)}: a difference of {_shown(found.gain)}"
            + ("." if decided else ", which 0 is within.")
        )
    return words


def _costs_in_words(costs: Mapping[str, tuple[float, int]]) -> list[str]:
    by_time: dict[str, list[str]] = {}
    for name, (seconds, _) in costs.items():
        by_time.setdefault(f"{seconds:.2g} s", []).append(name)
    words = ["A network takes " + "; ".join(f"{time} for {', '.join(names)}" for time, names in by_time.items()) + "."]
    failed = ", ".join(f"{name} on {count(number, 'network')}" for name, (_, number) in costs.items() if number)
    return [*words, f"Failed: {failed}."] if failed else words

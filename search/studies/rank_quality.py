"""Rank quality: do training-free scores tell anything beyond the number of parameters, on networks that were really trained?

Every network of a table is scored like any other candidate, a phase for each evaluator, so that a score that fails takes no other with
it, and a later run with more scores measures only those. The target is not part of the measurements: another one is judged at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from results.answers import Question
from results.formats import MIN_NETWORKS, count
from results.paths import RunPaths
from search.fixed_points import grid, refuse_flags_of_a_search
from search.study import Options, Phase, RunSettings, SettingsError, Study, study
from search.trained_table import TrainedNetwork, digest_of_networks, read_table
from space.model import require_arch, resized
from space.registry import SpecError, unknown_name
from space.search_space import Axis, Candidate, SearchSpace
from workers.evaluate import subject_of
from workers.evaluator import Call, Context, scores

ALIASES = {"params": "params_m", "macs": "gmacs"}
BASELINES = ("params", "macs", "depth", "width")
ALL = "all"
ROW = "row"


@dataclass(frozen=True, kw_only=True)
class RankQualityOptions(Options):
    """Which networks, what was measured on them, and the scores that are judged."""

    table: str = field(default="", metadata={"help": "a JSONL file of trained networks, or study:NAME for those of a study"})
    target: str = field(default="", metadata={"help": "what was measured, e.g. c100_kd_acc, or a metric of the study"})
    scores: str = field(
        default=f"{','.join(BASELINES)},nsc", metadata={"help": "names separated by commas, or all: every score that needs no training"}
    )
    family: str = field(default="autoformer", metadata={"help": "what reads the architectures of the table"})


@study("rank_quality", options=RankQualityOptions)
def rank_quality(run: RunSettings) -> Study:
    """Judge training-free scores on a table of trained networks: do they rank better than counting parameters?"""
    options: RankQualityOptions = run.options
    refuse_flags_of_a_search(run, "every network of the table is scored")
    for name in ("table", "target"):
        if not getattr(options, name):
            raise SettingsError(f"--{name} is missing: {RankQualityOptions.__dataclass_fields__[name].metadata['help']}")
    networks = read_table(
        options.table,
        options.target,
        family=options.family,
        tracking_uri=run.tracking_uri or RunPaths(run.runs).mlflow_uri,
        img_size=run.img_size,
        num_classes=run.num_classes,
    )
    if len(networks) < MIN_NETWORKS:
        raise SettingsError(
            f"--table {options.table} has {count(len(networks), 'network')}; at least {MIN_NETWORKS} are needed to judge a score"
        )
    space = table_space(networks, run.proxy_img_size)
    measured, asked, notes = _chosen(options.scores, run, space.decode({ROW: 0}))
    if repeated := [network for network in networks if network.num_rows > 1]:
        notes.append(
            f"{count(len(repeated), 'network')} of the table stand in several rows, {repeated[0].id} first: their targets are averaged"
        )
    phases = [
        Phase(
            name=name,
            space=space,
            evaluators=(run.call(name),),
            objectives=tuple(metrics),
            propose=grid([{ROW: row} for row in range(len(networks))]),
            plan=f"{len(networks)} networks of the table, each scored once",
            failures_are_data=True,
        )
        for name, metrics in measured.items()
    ]
    question = Question(
        kind="rank_quality",
        parameters={
            "target": options.target,
            "networks": [{"digest": network.model.digest, "target": network.target} for network in networks],
            "scores": asked,
        },
    )
    return Study(phases=tuple(phases), notes=tuple(notes), question=question)


def table_space(networks: tuple[TrainedNetwork, ...], proxy_img_size: int | None) -> SearchSpace:
    """One axis, the row of the table; the networks are scored at `proxy_img_size` pixels where one is given."""

    def decode(params: Mapping[str, Any]) -> Candidate:
        network = networks[params[ROW]]
        proxy = None
        if proxy_img_size is not None and proxy_img_size != network.model.img_size:
            proxy = resized(require_arch(network.model, "--proxy-img-size"), img_size=proxy_img_size)
        return Candidate(model=network.model, proxy=proxy, label=network.id)

    return SearchSpace(name=f"trained/{digest_of_networks(networks)}", axes=(Axis(name=ROW, choices=range(len(networks))),), decode=decode)


def _chosen(text: str, run: RunSettings, first: Candidate) -> tuple[dict[str, list[str]], dict[str, str], list[str]]:
    """The metrics by the evaluator that measures them, those to judge by their name here, and what is left out of `all`, with the reason.

    An evaluator's phase lists all of its metrics, so that it is the same phase whichever of them are asked for. The costs are always
    measured: size is what scores are compared at.
    """
    by_metric = scores()
    # Costs first, as every view shows them.
    offered = {
        metric: by_metric[metric] for metric in sorted(by_metric, key=lambda name: (by_metric[name] != "cost", by_metric[name], name))
    }
    wanted = [ALIASES.get(name.strip(), name.strip()) for name in text.split(",")]
    takes_all = wanted == [ALL]
    short = {metric: alias for alias, metric in ALIASES.items()}
    evaluators_asked = {"cost": None}
    asked: dict[str, str] = {}
    notes = []
    for name in offered if takes_all else wanted:
        if name not in offered:
            raise unknown_name("score", name, [*ALIASES, *offered], "--scores")
        evaluator = offered[name]
        if reason := why_not(run.call(evaluator), first):
            if not takes_all:
                raise SettingsError(f"--scores {name}: {reason}")
            notes.append(f"left out: {name} ({reason})")
            continue
        asked[short.get(name, name)] = name
        evaluators_asked[evaluator] = None
    measured = {evaluator: [metric for metric, by in offered.items() if by == evaluator] for evaluator in evaluators_asked}
    return measured, asked, notes


def why_not(call: Call, candidate: Candidate) -> str:
    """Why the network of a candidate cannot have the score; empty if it can, or if only a measurement would tell."""
    network = subject_of(call, candidate)
    try:
        call.evaluator.check(network, None, call.settings)
        if call.evaluator.is_free:
            call.evaluator.function(network, Context(seed=0), call.settings)
    except SpecError as error:
        return str(error)
    return ""
